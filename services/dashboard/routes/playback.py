"""Playback: how sampled completions were written."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Response

from services.dashboard.access import RunAccess, RunOfPath
from services.dashboard.animation import Theme, animation
from services.dashboard.playback import UnreadableSample, frame, order_map, playback, reference
from services.dashboard.playback_models import OrderMap, Playback, SampleIterations
from services.dashboard.problems import ProblemError, documented
from services.dashboard.routes.series import Iteration
from services.dashboard.tables import Strict
from services.store import schema

router = APIRouter(tags=["samples"], responses=documented(404, 409, 422, 503), route_class=Strict)

SampleId = Annotated[int, Path(ge=0, le=2**63 - 1, description="Id of the sample")]
GREEDY = ("base", "trained")
SVG = "image/svg+xml"
_MOST = 500
"""Samples that one may point to."""
_MOST_FRAMES = 200
"""The same with their texts."""


@router.get("/runs/{run_id}/samples/{sample_id}", operation_id="getSample", summary="A completion to play back")
def get_sample(run: RunOfPath, sample_id: SampleId) -> Playback:
    """The completion with the step, order, confidence and entropy of each of its tokens, and what learning made of it.
    409: the sample is damaged or not one of Unmask's."""
    row, document = _played(run, sample_id)
    table = schema.samples.c
    group = [table.kind == row["kind"], table.iteration == row["iteration"], table.group_id == row["group_id"]]
    when = table.kind.in_(GREEDY) if row["kind"] in GREEDY else (table.kind == row["kind"]) & (table.row == row["row"])
    problem = [table.problem_id == row["problem_id"], when]
    document.siblings = [reference(other) for other in _briefly(run, group, table.row)]
    found = _briefly(run, problem, table.iteration.desc(), table.kind, more=("completion", "data"))
    document.counterparts = [frame(other) for other in reversed(found)]
    document.has_order_map = row["kind"] == "train" and _has_order_map(run, row["iteration"])
    return document


@router.get(
    "/runs/{run_id}/samples/{sample_id}/animation",
    operation_id="getAnimation",
    summary="A completion as an animated SVG",
    response_class=Response,
    responses={200: {"content": {SVG: {"schema": {"type": "string"}}}}},
)
def get_animation(
    run: RunOfPath,
    sample_id: SampleId,
    beside: Annotated[int | None, Query(ge=0, le=2**63 - 1, description="Id of a sample to show beside it")] = None,
    theme: Annotated[Theme, Query(description="Its colours")] = "light",
) -> Response:
    """How the completion was written, over and over, without any script: for slides and pages. 409: a sample is damaged
    or not one of Unmask's."""
    found = [_played(run, each)[1] for each in (sample_id, beside) if each is not None]
    name = "-".join(["playback", *(str(play.id) for play in found)])
    return Response(
        animation(found, theme), media_type=SVG, headers={"Content-Disposition": f'inline; filename="{name}.svg"'}
    )


@router.get("/runs/{run_id}/sample-iterations", operation_id="listSampleIterations", summary="Where samples are")
def list_sample_iterations(run: RunOfPath) -> SampleIterations:
    """How many samples there are of which kind, for every iteration that kept some."""
    table = schema.samples.c
    place = (table.iteration, table.kind)
    query = sa.select(*place, sa.func.count().label("samples")).where(table.run_id == run.id)
    rows = run.reader.select(query.group_by(*place).order_by(*place))
    names = ("iteration", "kind", "samples")
    return SampleIterations(run_id=run.id, **{name: [row[name] for row in rows] for name in names})


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


def _played(run: RunAccess, sample_id: int) -> tuple[dict[str, Any], Playback]:
    """A sample's row and document. Raises ProblemError."""
    row = run.reader.sample(run.id, sample_id)
    if row is None:
        raise ProblemError(404, f"run {run.id!r} has no sample {sample_id}")
    try:
        return row, playback(row)
    except UnreadableSample as error:
        raise ProblemError(409, f"sample {sample_id} can't be played back: {error}") from None


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


def _briefly(run: RunAccess, where: list[Any], *order: Any, more: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Samples without their texts and trajectories, but for the columns in ``more``."""
    table = schema.samples.c
    names = ("id", "kind", "iteration", "group_id", "row", "problem_id", "correct", "reward", *more)
    query = sa.select(*(table[name] for name in names)).where(table.run_id == run.id, *where)
    return run.reader.select(query.order_by(*order).limit(_MOST_FRAMES if more else _MOST))
