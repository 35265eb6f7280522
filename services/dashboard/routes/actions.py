"""Control of a run: what it is asked to do, and the trail. Writing wants the token."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from rewards.errors import StoreError
from services.dashboard.access import RunOfPath
from services.dashboard.action_models import Action, ActionRequest
from services.dashboard.audit import record, require, who
from services.dashboard.models import Page
from services.dashboard.problems import ProblemError, documented
from services.dashboard.rate import Rate
from services.dashboard.security import RequireToken
from services.dashboard.tables import Strict
from services.store import actions, schema
from services.store.catalog import READ_LIMIT_S
from services.store.reader import Reader

router = APIRouter(tags=["control"], responses=documented(404, 422, 503), route_class=Strict)

MAX_OPEN = 10
"""Actions of a run that may wait at once."""

_rate = Rate(burst=30, every_s=1.0)

Number = Annotated[int, Path(ge=1, le=2**63 - 1)]
Cursor = Annotated[int | None, Query(ge=1, le=2**63 - 1, description="next_cursor of the page before")]
Limit = Annotated[int, Query(ge=1, le=200, description="Items on a page")]


@router.post(
    "/runs/{run_id}/actions",
    operation_id="requestAction",
    summary="Ask a run for something",
    status_code=202,
    dependencies=[RequireToken],
    responses=documented(401, 403, 409, 413, 429),
)
def request_action(request: Request, response: Response, run: RunOfPath, wanted: ActionRequest) -> Action:
    """Stop, pause, resume, checkpoint or set_actors. The answer says that it was asked for; the run's controller takes
    it within a second or two, does it, and only then the action is ``done``, with what happened. A run that is over or
    silent refuses at once (409)."""
    require(_rate)
    by, arguments = who(request), wanted.arguments()
    url = request.app.state.catalog.store_url(run.id)
    engine = schema.open_engine(url, create=False, transaction_s=READ_LIMIT_S)
    try:
        if actions.open_requests(Reader(engine).select, run.id) >= MAX_OPEN:
            raise ProblemError(429, f"{MAX_OPEN} actions of this run are waiting already", headers={"Retry-After": "5"})
        asked = actions.request(engine, run.id, wanted.action, arguments, by)
    except (StoreError, *schema.UNANSWERED) as error:
        reason = schema.short_reason(error)
        record(by, wanted.action, f"not asked for: {reason}", run=run.id, **arguments)
        raise StoreError(f"cannot ask in the run store {engine.url}: {reason}") from error
    finally:
        engine.dispose()
    record(by, wanted.action, asked.result or f"{asked.status} as {asked.id}", run=run.id, **arguments)
    if asked.status == "refused":
        raise ProblemError(409, asked.result or "refused")
    response.headers["Location"] = f"{request.url.path}/{asked.id}"
    return Action.of(asked)


@router.get("/runs/{run_id}/actions", operation_id="listActions", summary="What a run was asked for")
def list_actions(
    run: RunOfPath,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Action]:
    """The audit trail of a run, newest first: who asked for what and when, and what the controller made of it."""
    found = actions.newest(run.reader.select, run_id=run.id, limit=limit + 1, before_id=cursor)
    return page_of([Action.of(each) for each in found], limit)


@router.get("/runs/{run_id}/actions/{action_id}", operation_id="getAction", summary="How an action stands")
def get_action(run: RunOfPath, action_id: Number) -> Action:
    """requested, accepted, done, refused or expired."""
    found = actions.find(run.reader.select, action_id, run_id=run.id)
    if found is None:
        raise ProblemError(404, f"run {run.id!r} has no action {action_id}")
    return Action.of(found)


def page_of(items: list[Any], limit: int) -> Page[Any]:
    more = len(items) > limit
    return Page(items=items[:limit], next_cursor=str(items[limit - 1].id) if more else None)
