"""The event stream."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from services.dashboard.access import access
from services.dashboard.changes import AllRuns, Key, OneRun, Source
from services.dashboard.problems import ProblemError, documented
from services.dashboard.stream import Hub
from services.dashboard.tables import Strict

router = APIRouter(tags=["live"], route_class=Strict)

HEARTBEAT_S = 10
SEND_TIMEOUT_S = 30
"""A client that takes no bytes for this long is disconnected."""

_EXAMPLE = (
    'event: metrics\r\nid: 1732288000-42\r\ndata: {"iteration": 7, "values": {"reward/mean": 0.5}}\r\n\r\n'
    'event: event\r\nid: 1732288000-43\r\ndata: {"id": 9, "level": "info", "kind": "start", "text": "..."}\r\n\r\n'
)


@router.get(
    "/stream",
    operation_id="stream",
    summary="What changes, as server-sent events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "Named events with JSON data, until either side ends it; a comment at least every ten "
            "seconds. With `run`: `run` (RunSummary), `metrics` (iteration, values by name), `event` (Event), `worker` "
            "(Worker), `checkpoint` (Checkpoint), `sample` (Sample without its texts), "
            "`truncated` (after: forget what lies beyond that iteration), `reset` (load everything anew). Without: "
            "`run` of every run, then of those that change, and `removed` (id). `unreadable` and `readable` (reason) "
            "tell how the store is; `dropped` (reason) ends the stream of a client that is too slow. Ids name places "
            "in the order of changes: with Last-Event-ID nothing is missed or told twice.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EXAMPLE}},
        },
        **documented(404, 422, 503),
    },
)
async def stream(
    request: Request,
    run: Annotated[str | None, Query(min_length=1, max_length=200, description="Only this run's changes")] = None,
    since: Annotated[str | None, Query(max_length=900, description="marker of a run's answer")] = None,
    last_event_id: Annotated[str | None, Header(max_length=900, description="id of the last event received")] = None,
) -> EventSourceResponse:
    """Follow one run, or the list of runs."""
    state = request.app.state
    place = _place(last_event_id if last_event_id is not None else since)
    if run is not None:
        await run_in_threadpool(access, state.catalog, run)  # an unknown run is a 404, not an empty stream
    source: Source = AllRuns(state.index) if run is None else OneRun(state.catalog, state.annotations, run)
    hub: Hub = state.hub
    peer = request.client.host if request.client else ""
    if hub.full(peer):
        raise ProblemError(503, f"{hub.clients} event streams are open, and no more are given to you; try again later")

    async def frames() -> AsyncIterator[ServerSentEvent]:
        async with hub.joined(run, source, peer) as feed:
            async for event in feed.follow(place):
                yield event

    return EventSourceResponse(
        frames(), ping=HEARTBEAT_S, send_timeout=SEND_TIMEOUT_S, headers={"Cache-Control": "no-store"}
    )


def _place(text: str | None) -> Key | None:
    if not text:
        return None
    try:
        return Key.parse(text)
    except ValueError:
        raise ProblemError(
            422, "Last-Event-ID (or since) is no id of this stream; leave it out to begin anew"
        ) from None
