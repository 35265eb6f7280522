"""What belongs to a run: events, workers, checkpoints, samples."""

from typing import Annotated, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request

from services.dashboard.access import RunOfPath
from services.dashboard.checkpoints import checkpoints_of
from services.dashboard.models import Checkpoints, Event, EventKind, EventKinds, Page, Sample, Worker, Workers
from services.dashboard.problems import ProblemError, documented
from services.dashboard.routes.series import Iteration
from services.dashboard.shown import question
from services.dashboard.starts import Starts, starts_of
from services.dashboard.tables import Table
from services.store import schema

router = APIRouter(responses=documented(404, 422, 503), route_class=Table)

MOST_KINDS = 100

Word = Annotated[str | None, Query(max_length=100)]
Limit = Annotated[int, Query(ge=1, le=500, description="Items on a page")]
RowId = Annotated[int | None, Query(ge=0, le=2**63 - 1)]


@router.get("/runs/{run_id}/events", operation_id="listEvents", summary="Events of a run", tags=["runs"])
def list_events(
    run: RunOfPath,
    level: Annotated[Literal["info", "warning", "error"] | None, Query(description="Only this level")] = None,
    kind: Annotated[Word, Query(description="Only this kind")] = None,
    limit: Limit = 100,
    order: Annotated[Literal["newest", "oldest"], Query(description="Which come first")] = "newest",
    cursor: Annotated[RowId, Query(description="next_cursor of the page before")] = None,
) -> Page[Event]:
    """What happened, newest first unless asked otherwise."""
    newest = order == "newest"
    bound = {} if cursor is None else {"before_id": cursor} if newest else {"after_id": cursor}
    rows = run.reader.events(run.id, level=level, kind=kind, limit=limit + 1, newest=newest, **bound)
    items = [Event(**row) for row in (rows[::-1] if newest else rows)[:limit]]
    return Page(items=items, next_cursor=str(items[-1].id) if len(rows) > limit else None)


@router.get(
    "/runs/{run_id}/event-kinds", operation_id="listEventKinds", summary="Kinds of a run's events", tags=["runs"]
)
def list_event_kinds(run: RunOfPath) -> EventKinds:
    """Those that there are, with how many events each has; by name."""
    events = schema.events.c
    query = sa.select(events.kind, sa.func.count().label("count")).where(events.run_id == run.id).group_by(events.kind)
    rows = run.reader.select(query.order_by(events.kind).limit(MOST_KINDS))
    return EventKinds(run_id=run.id, items=[EventKind(**row) for row in rows])


@router.get("/runs/{run_id}/workers", operation_id="listWorkers", summary="Actors and ranks of a run", tags=["workers"])
def list_workers(run: RunOfPath) -> Workers:
    """The newest state of each."""
    return Workers(run_id=run.id, items=[Worker(**row) for row in run.reader.workers(run.id)])


@router.get("/runs/{run_id}/checkpoints", operation_id="listCheckpoints", summary="Checkpoints of a run", tags=["runs"])
def list_checkpoints(run: RunOfPath, request: Request) -> Checkpoints:
    """With what was measured at each, whether it is still there, and the commands that take it; by rising iteration."""
    folder = request.app.state.catalog.folder(run.id)
    return Checkpoints(run_id=run.id, items=checkpoints_of(run.reader, run.id, folder))


@router.get("/runs/{run_id}/starts", operation_id="listStarts", summary="Starts of a run", tags=["runs"])
def list_starts(run: RunOfPath, request: Request) -> Starts:
    """With which command, code, versions and machine, how long the run worked, and how to go on."""
    row = run.reader.run(run.id)
    if row is None:
        raise ProblemError(404, f"no run named {run.id!r} here")
    return starts_of(run.reader, row, request.app.state.catalog.folder(run.id))


@router.get("/runs/{run_id}/samples", operation_id="listSamples", summary="Sampled completions", tags=["samples"])
def list_samples(
    run: RunOfPath,
    iteration: Annotated[Iteration, Query(description="Only of this iteration")] = None,
    kind: Annotated[Word, Query(description="Only this kind: train, base, trained, ...")] = None,
    correct: Annotated[bool | None, Query(description="Only right ones, or only wrong ones")] = None,
    q: Annotated[Word, Query(description="Only those with this in the problem's id, the prompt or the text")] = None,
    limit: Limit = 100,
    cursor: Annotated[str | None, Query(max_length=200, description="next_cursor of the page before")] = None,
) -> Page[Sample]:
    """Newest iteration first, without their trajectories."""
    try:
        found = run.reader.samples(
            run.id, iteration=iteration, kind=kind, correct=correct, text=q or None, limit=limit, cursor=cursor
        )
    except ValueError as error:
        raise ProblemError(422, str(error)) from None
    return Page(items=[Sample(**row, question=question(row)) for row in found.rows], next_cursor=found.next)
