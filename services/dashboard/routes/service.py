"""How the service itself does, for people and machines that keep it running."""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from services.dashboard import prometheus
from services.dashboard.index import RunIndex
from services.dashboard.models import Health
from services.dashboard.problems import ProblemError, documented
from services.dashboard.security import RequireToken
from services.dashboard.tables import Strict

router = APIRouter(tags=["service"])
api = APIRouter(tags=["control"], route_class=Strict)
"""Below /api/v1."""


@router.get("/healthz", operation_id="getHealth", summary="Whether the process answers")
async def healthz() -> Health:
    """Touches no store: restart the process when this doesn't answer."""
    return Health(status="ok")


@router.get("/readyz", operation_id="getReadiness", summary="Whether runs can be shown", responses=documented(503))
def readyz(request: Request) -> Health:
    """Lists the runs. A single run that can't be read makes it degraded, a folder or server that can't 503."""
    index: RunIndex = request.app.state.index
    settings = request.app.state.settings
    if settings.store_url is None and not settings.runs_dir.is_dir():
        raise ProblemError(503, f"there is no folder {settings.runs_dir}")
    runs = index.runs()
    unreadable = sum(known.summary.unreadable is not None for known in runs.values())
    return Health(status="degraded" if unreadable else "ok", runs=len(runs), unreadable=unreadable)


@api.get(
    "/token",
    operation_id="checkToken",
    summary="Whether the token that comes along is the right one",
    status_code=204,
    dependencies=[RequireToken],
    responses=documented(401, 403, 422, 429),
)
def check_token() -> None:
    """204; 401 where it isn't, or none came."""


@router.get(
    "/metrics",
    operation_id="getPrometheus",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus' text format",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": 'unmask_runs{status="running"} 1.0\n'}},
        },
        **documented(503),
    },
)
def metrics(request: Request) -> Response:
    """Runs by status, and figures of the newest runs."""
    return Response(prometheus.exposition(request.app.state), media_type=CONTENT_TYPE_LATEST)
