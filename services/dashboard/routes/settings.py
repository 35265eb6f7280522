"""The settings of a run, and how they differ from another run's."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from services.dashboard.about import flat
from services.dashboard.access import RunAccess, RunOfPath, access
from services.dashboard.models import ConfigDiff, Difference, RunConfiguration
from services.dashboard.problems import ProblemError, documented
from services.dashboard.tables import Strict, Table

router = APIRouter(tags=["runs"], responses=documented(404, 422, 503), route_class=Strict)
tables = APIRouter(tags=["runs"], responses=documented(404, 422, 503), route_class=Table)


@tables.get("/runs/{run_id}/config", operation_id="getConfig", summary="Resolved settings of a run")
def get_config(run: RunOfPath) -> RunConfiguration:
    """The settings that the run was started with, defaults filled in."""
    return RunConfiguration(run_id=run.id, config=_config(run))


@router.get("/runs/{run_id}/config-diff", operation_id="getConfigDiff", summary="Settings that differ from another run")
def get_config_diff(
    request: Request,
    run: RunOfPath,
    other: Annotated[str, Query(min_length=1, max_length=200, description="Name of the other run")],
) -> ConfigDiff:
    """Settings by their full key, where the two runs differ."""
    second = access(request.app.state.catalog, other)
    left, right = flat(_config(run)), flat(_config(second))
    differences = [
        Difference(
            key=key,
            value=left.get(key),
            other=right.get(key),
            only_in=None if key in left and key in right else run.id if key in left else other,
        )
        for key in sorted({*left, *right})
        if key not in left or key not in right or left[key] != right[key]
    ]
    equal = len({*left, *right}) - len(differences)
    return ConfigDiff(run_id=run.id, other_id=other, differences=differences, equal=equal)


def _config(run: RunAccess) -> dict[str, Any]:
    found = run.reader.run(run.id)
    if found is None:
        raise ProblemError(404, f"no run named {run.id!r} here")
    config = found["config"]
    return config if isinstance(config, dict) else {}
