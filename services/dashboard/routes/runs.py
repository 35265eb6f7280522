"""The list of runs, and one run."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from services.dashboard.access import RunOfPath
from services.dashboard.ahead import ahead
from services.dashboard.index import RunIndex, summarise
from services.dashboard.models import Latest, RunDetail, RunList
from services.dashboard.problems import ProblemError, documented
from services.dashboard.settings import Settings

router = APIRouter(tags=["runs"])

SortKey = Literal[
    "created", "-created", "id", "-id", "status", "-status", "task", "-task", "method", "-method", "iteration",
    "-iteration", "reward", "-reward", "solve_rate", "-solve_rate", "tokens_per_s", "-tokens_per_s", "heartbeat",
    "-heartbeat",
]  # fmt: skip
Word = Annotated[str, Query(max_length=100)]
Limit = Annotated[int, Query(ge=1, le=500, description="Items on a page")]


@router.get("/runs", operation_id="listRuns", summary="List of runs", responses=documented(422, 503))
def list_runs(
    request: Request,
    status: Annotated[list[Word], Query(max_length=20, description="Only these; repeat it for more")] = [],  # noqa: B006
    task: Annotated[Word | None, Query(description="Only runs of this task")] = None,
    method: Annotated[Word | None, Query(description="Only runs of this objective")] = None,
    q: Annotated[Word | None, Query(description="Only runs with this in their name, task or method")] = None,
    sort: Annotated[SortKey, Query(description="A leading - is descending; unknown values come last")] = "-created",
    limit: Limit = 100,
    cursor: Annotated[str | None, Query(max_length=200, description="next_cursor of the page before")] = None,
) -> RunList:
    """Runs that match every filter given."""
    index: RunIndex = request.app.state.index
    found = [known.summary for known in index.runs().values()]
    if status:
        found = [run for run in found if run.status in status]
    if task is not None:
        found = [run for run in found if run.task == task]
    if method is not None:
        found = [run for run in found if run.method == method]
    if q:
        found = [run for run in found if q.lower() in f"{run.id}\n{run.task}\n{run.method}".lower()]
    field, descending = sort.removeprefix("-"), sort.startswith("-")
    found.sort(key=lambda run: run.id, reverse=descending)
    known = [run for run in found if _known(getattr(run, field))]
    known.sort(key=lambda run: getattr(run, field), reverse=descending)
    ordered = known + [run for run in found if not _known(getattr(run, field))]
    begin = 0
    if cursor is not None:
        places = {run.id: place for place, run in enumerate(ordered)}
        if cursor not in places:
            raise ProblemError(422, "the cursor's run is not in this list (any more); begin again without a cursor")
        begin = places[cursor] + 1
    items = ordered[begin : begin + limit]
    more = begin + limit < len(ordered)
    settings: Settings = request.app.state.settings
    folder = "" if settings.store_url else str(settings.runs_dir)
    return RunList(items=items, next_cursor=items[-1].id if more else None, total=len(ordered), folder=folder)


@router.get(
    "/runs/{run_id}",
    operation_id="getRun",
    summary="A run with its newest figures",
    responses=documented(404, 422, 503),
)
def get_run(request: Request, run: RunOfPath) -> RunDetail:
    """Everything about a run that is not a series or a list."""
    marker = run.reader.marker(run.id)  # before the figures: what comes in between is told again, not lost
    row = run.reader.run(run.id)
    if row is None:
        raise ProblemError(404, f"no run named {run.id!r} here")
    latest = run.reader.latest_metrics(run.id)
    summary = summarise(row, latest, run.reader.workers(run.id), ahead(request.app.state.catalog, row))
    newest = {name: Latest(iteration=entry["iteration"], value=entry["value"]) for name, entry in latest.items()}
    return RunDetail(**summary.model_dump(), latest=newest, summary=row["summary"], marker=marker)


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"))
