"""Evaluations of a run."""

from fastapi import APIRouter, Request
from pydantic import Field

from services.dashboard.access import RunOfPath
from services.dashboard.evaluations import Evaluation, evaluations
from services.dashboard.models import Model
from services.dashboard.problems import documented
from services.dashboard.tables import Strict

router = APIRouter(tags=["runs"], responses=documented(404, 422, 503), route_class=Strict)


class EvaluationList(Model):
    """What learner.evaluate left in the run's folder."""

    run_id: str
    items: list[Evaluation] = Field(description="The newest first; none for a store by URL, which has no folder")


@router.get("/runs/{run_id}/evaluations", operation_id="listEvaluations", summary="Evaluations of a run")
def list_evaluations(request: Request, run: RunOfPath) -> EvaluationList:
    """Solve rates and pass@k with intervals, of base and adapter, by way of decoding."""
    folder = request.app.state.catalog.folder(run.id)
    return EvaluationList(run_id=run.id, items=[] if folder is None else evaluations(folder))
