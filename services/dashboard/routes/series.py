"""The figures of a run: metrics over iterations, and the ledger."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query

from services.dashboard.access import RunOfPath
from services.dashboard.metric_reference import METRICS
from services.dashboard.models import (
    STATES,
    Ledger,
    MetricEntry,
    MetricNames,
    MetricReference,
    Metrics,
    Series,
)
from services.dashboard.problems import ProblemError, documented
from services.dashboard.tables import Strict, Table

router = APIRouter(tags=["metrics"], responses=documented(404, 422, 503), route_class=Strict)
tables = APIRouter(tags=["metrics"], responses=documented(404, 422, 503), route_class=Table)

MAX_NAMES = 50
LARGEST = 2**31 - 1

Name = Annotated[str, Query(min_length=1, max_length=200)]
Iteration = Annotated[int | None, Query(ge=0, le=LARGEST)]


@router.get("/runs/{run_id}/metric-names", operation_id="listMetricNames", summary="Names of a run's metrics")
def list_metric_names(run: RunOfPath) -> MetricNames:
    """Every name that ``metrics`` can be asked for."""
    return MetricNames(run_id=run.id, names=run.reader.metric_names(run.id))


@tables.get("/runs/{run_id}/metrics", operation_id="getMetrics", summary="Metrics over iterations")
def get_metrics(
    run: RunOfPath,
    name: Annotated[list[Name], Query(min_length=1, max_length=MAX_NAMES, description="Metric; repeat it for more")],
    first: Annotated[Iteration, Query(description="From this iteration on")] = None,
    last: Annotated[Iteration, Query(description="Up to this iteration")] = None,
    points: Annotated[int, Query(ge=2, le=2000, description="Points of a series at most")] = 500,
) -> Metrics:
    """Series of at most ``points`` points: the mean, lowest and highest value of each bucket of iterations."""
    if first is not None and last is not None and first > last:
        raise ProblemError(422, f"first={first} is behind last={last}")
    names = list(dict.fromkeys(name))
    series = run.reader.series(run.id, names, first=first, last=last, points=points)
    return Metrics(run_id=run.id, series={name: Series.model_validate(one) for name, one in series.items()})


@router.get("/metric-reference", operation_id="getMetricReference", summary="What metrics mean")
def get_metric_reference() -> MetricReference:
    """The same for all runs."""
    entries = sorted(METRICS, key=lambda metric: "{" in metric.name)
    return MetricReference(items=[MetricEntry.model_validate(metric, from_attributes=True) for metric in entries])


@router.get("/runs/{run_id}/ledger", operation_id="getLedger", summary="Prompt groups by state")
def get_ledger(run: RunOfPath) -> Ledger:
    """The ledger after the newest iteration."""
    return ledger_of(run.id, run.reader.latest_metrics(run.id))


def ledger_of(run_id: str, latest: Mapping[str, Mapping[str, Any]]) -> Ledger:
    """The ledger as the metrics tell it."""
    counts = {name: int(entry["value"]) for name, entry in latest.items() if math.isfinite(entry["value"])}
    states = {state: counts.get(f"ledger/{state}", 0) for state in STATES}
    return Ledger(
        run_id=run_id,
        iteration=latest["ledger/issued"]["iteration"] if "ledger/issued" in latest else None,
        **states,
        dropped_by_reason=_below("ledger/dropped/", counts),
        recoveries=_below("machine/ledger_", counts),
        balanced=states["issued"] == sum(states[state] for state in STATES[1:]),
    )


def _below(prefix: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}
