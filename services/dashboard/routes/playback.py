"""Playback: how sampled completions were written."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query

from services.dashboard.access import RunAccess, RunOfPath
from services.dashboard.playback import UnreadableSample, order_map, playback, reference
from services.dashboard.playback_models import OrderMap, Playback
from services.dashboard.problems import ProblemError, documented
from services.dashboard.routes.series import Iteration
from services.dashboard.tables import Strict
from services.store import schema

router = APIRouter(tags=["samples"], responses=documented(404, 409, 422, 503), route_class=Strict)

SampleId = Annotated[int, Path(ge=0, le=2**63 - 1, description="Id of the sample")]
GREEDY = ("base", "trained")
_MOST = 500
"""Samples that one may point to."""


@router.get("/runs/{run_id}/samples/{sample_id}", operation_id="getSample", summary="A completion to play back")
def get_sample(run: RunOfPath, sample_id: SampleId) -> Playback:
    """The completion with the step, order, confidence and entropy of each of its tokens, and what learning made of it.
    409: the sample is damaged or not one of Unmask's."""
    row = run.reader.sample(run.id, sample_id)
    if row is None:
        raise ProblemError(404, f"run {run.id!r} has no sample {sample_id}")
    try:
        document = playback(row)
    except UnreadableSample as error:
        raise ProblemError(409, f"sample {sample_id} can't be played back: {error}") from None
    table = schema.samples.c
    group = [table.kind == row["kind"], table.iteration == row["iteration"], table.group_id == row["group_id"]]
    problem = [table.problem_id == row["problem_id"], table.kind.in_(GREEDY)]
    document.siblings = [reference(other) for other in _briefly(run, group, table.row)]
    found = _briefly(run, problem, table.kind, table.iteration.desc())
    document.counterparts = [reference(other) for other in sorted(found, key=lambda other: other["iteration"])]
    document.has_order_map = row["kind"] == "train" and _has_order_map(run, row["iteration"])
    return document


@router.get("/runs/{run_id}/order-map", operation_id="getOrderMap", summary="Order in which a whole batch was written")
def get_order_map(
    run: RunOfPath, iteration: Annotated[Iteration, Query(description="Default: the newest")] = None
) -> OrderMap:
    """How often each position was drawn at each denoising step, over all completions of an iteration. 409: the sample
    that holds it is damaged."""
    try:
        found = _order_map(run, iteration)
    except UnreadableSample as error:
        raise ProblemError(409, f"the order map can't be read: {error}") from None
    if found is None:
        which = "any iteration" if iteration is None else f"iteration {iteration}"
        raise ProblemError(404, f"run {run.id!r} kept no order map of {which}")
    return found


def _has_order_map(run: RunAccess, iteration: int) -> bool:
    try:
        return _order_map(run, iteration) is not None
    except UnreadableSample:
        return False


def _order_map(run: RunAccess, iteration: int | None) -> OrderMap | None:
    """An iteration's map (None: the newest one's), which is kept with its first sample. Raises UnreadableSample."""
    table = schema.samples.c
    where = [table.run_id == run.id, table.kind == "train"]
    if iteration is not None:
        where.append(table.iteration == iteration)
    row = run.reader.first_sample(*where, order=(table.iteration.desc(), table.group_id, table.row))
    if row is None:
        return None
    try:
        return order_map(row)
    except UnreadableSample as error:
        raise UnreadableSample(f"sample {row['id']}: {error}") from None


def _briefly(run: RunAccess, where: list[Any], *order: Any) -> list[dict[str, Any]]:
    """Samples without their texts and trajectories."""
    table = schema.samples.c
    names = ("id", "kind", "iteration", "group_id", "row", "problem_id", "correct", "reward")
    query = sa.select(*(table[name] for name in names)).where(table.run_id == run.id, *where)
    return run.reader.select(query.order_by(*order).limit(_MOST))
