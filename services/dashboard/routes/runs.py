"""The list of runs, and one run."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from services.dashboard.about import about, best_held_out
from services.dashboard.access import RunOfPath
from services.dashboard.action_models import Annotation, AnnotationRequest
from services.dashboard.ahead import ahead
from services.dashboard.annotations import ANNOTATE
from services.dashboard.audit import record, require, who
from services.dashboard.index import RunIndex, summarise
from services.dashboard.models import Latest, RunDetail, RunList
from services.dashboard.problems import ProblemError, documented
from services.dashboard.rate import Rate
from services.dashboard.search import matches
from services.dashboard.security import RequireToken
from services.dashboard.settings import Settings
from services.dashboard.tables import Strict, Table

router = APIRouter(tags=["runs"], route_class=Strict)
tables = APIRouter(tags=["runs"], route_class=Table)

_annotations = Rate(burst=200, every_s=0.2)

Status = Literal["running", "paused", "finished", "stopped", "failed", "lost", "unreadable"]
SortKey = Literal[
    "created", "-created", "id", "-id", "status", "-status", "task", "-task", "method", "-method", "iteration",
    "-iteration", "reward", "-reward", "solve_rate", "-solve_rate", "tokens_per_s", "-tokens_per_s", "heartbeat",
    "-heartbeat", "held_out", "-held_out", "held_out_best", "-held_out_best", "seed", "-seed",
]  # fmt: skip
Word = Annotated[str, Query(max_length=100)]
Text = Annotated[str, Query(max_length=199)]
Limit = Annotated[int, Query(ge=1, le=500, description="Items on a page")]


@tables.get("/runs", operation_id="listRuns", summary="List of runs", responses=documented(422, 503))
def list_runs(
    request: Request,
    status: Annotated[list[Status], Query(max_length=20, description="Only these; repeat it for more")] = [],  # noqa: B006
    task: Annotated[Word | None, Query(description="Only runs of this task")] = None,
    method: Annotated[Word | None, Query(description="Only runs of this objective")] = None,
    q: Annotated[
        Text | None,
        Query(
            description="Only runs that have every word of it in their name, task, method, host, recipe, tags or note, "
            "or as a setting: lr=0.003, learner.lr=3e-3, seed=2"
        ),
    ] = None,
    archived: Annotated[bool, Query(description="Archived runs too")] = False,
    sort: Annotated[SortKey, Query(description="A leading - is descending; unknown values come last")] = "-created",
    limit: Limit = 100,
    cursor: Annotated[str | None, Query(max_length=200, description="next_cursor of the page before")] = None,
) -> RunList:
    """Runs that match every filter given."""
    index: RunIndex = request.app.state.index
    every = index.runs().values()
    found = [known.summary for known in every if q is None or matches(known, q)]
    shelved = sum(run.archived for run in found)
    if not archived:
        found = [run for run in found if not run.archived]
    if status:
        found = [run for run in found if run.status in status]
    if task is not None:
        found = [run for run in found if run.task == task]
    if method is not None:
        found = [run for run in found if run.method == method]
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
    following = items[-1].id if more else None
    return RunList(items=items, next_cursor=following, total=len(ordered), archived=shelved, folder=folder)


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
    catalog = request.app.state.catalog
    beside = about(run.reader, row).fields() | best_held_out(run.reader, row)
    beside |= request.app.state.annotations.all().get(run.id, {})
    summary = summarise(row, latest, run.reader.workers(run.id), ahead(catalog, row), beside)
    newest = {name: Latest(iteration=entry["iteration"], value=entry["value"]) for name, entry in latest.items()}
    more = {"latest": newest, "summary": row["summary"], "marker": marker}
    return RunDetail(**summary.model_dump(), **more)


@router.patch(
    "/runs/{run_id}/annotation",
    operation_id="annotateRun",
    summary="Tags, a note, archive a run, or take note of its warnings",
    dependencies=[RequireToken],
    responses=documented(401, 403, 404, 413, 422, 429, 503),
)
def annotate_run(request: Request, run: RunOfPath, told: AnnotationRequest) -> Annotation:
    """What is left out of the request stays as it is. It is the dashboard's record; the run's store isn't touched."""
    require(_annotations)
    by, changes = who(request), told.model_dump(exclude_unset=True)
    record(by, ANNOTATE, "written", run=run.id, **changes)
    return Annotation(run_id=run.id, **request.app.state.annotations.write(run.id, changes, by))


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"))
