"""Runs that are submitted as jobs, and what is known of settings before. What was submitted is read with the token
only: settings and logs of jobs may hold anything."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response

from services.dashboard import jobs
from services.dashboard.action_models import Recipe, RecipeList, Setting, SettingList, Submission, SubmissionRequest
from services.dashboard.annotations import records
from services.dashboard.audit import record, require, who
from services.dashboard.jobs import Checked, RayRefused, RayUnavailable, SettingsRefused
from services.dashboard.models import Page
from services.dashboard.problems import ProblemError, documented
from services.dashboard.rate import Rate
from services.dashboard.routes.actions import Cursor, Limit, Number, page_of
from services.dashboard.security import RequireToken
from services.dashboard.tables import Strict
from services.store import actions
from services.store.reader import Reader

router = APIRouter(tags=["control"], responses=documented(404, 422, 503), route_class=Strict)

SUBMIT = "submit"

_checks = Rate(burst=10, every_s=3.0)  # each is a process for a second or two


@router.get("/recipes", operation_id="listRecipes", summary="Recipes that a run can be submitted from")
def list_recipes(request: Request) -> RecipeList:
    """What ships with this version, and whether runs can be submitted from here."""
    address = request.app.state.settings.ray_address
    items = [Recipe(name=each.name, summary=each.summary, text=each.text) for each in jobs.recipes()]
    return RecipeList(items=items, submission=address is not None, ray_address=address)


@router.get("/settings", operation_id="listSettings", summary="Every setting, with its meaning, unit and default")
def list_settings(
    recipe: Annotated[str, Query(min_length=1, max_length=100, description="Whose values are shown")] = "sudoku",
) -> SettingList:
    """What ``learner.main`` takes as key.sub=value, or ``learner.sft`` of a recipe whose name begins with ``sft_``, and
    the recipe's values."""
    try:
        return SettingList(recipe=recipe, items=[Setting(**each) for each in jobs.settings_of(recipe)])
    except SettingsRefused as error:
        raise ProblemError(404, str(error)) from None
    except RayUnavailable as error:
        raise ProblemError(503, str(error)) from None


@router.post(
    "/submissions",
    operation_id="submitRun",
    summary="Submit a run, or check its settings",
    status_code=202,
    dependencies=[RequireToken],
    responses=documented(401, 403, 409, 413, 429, 502) | {200: {"model": Submission, "description": "Checked only"}},
)
def submit_run(request: Request, response: Response, wanted: SubmissionRequest) -> Submission:
    """Start a run from a recipe as a job of the Ray cluster. With ``dry`` the settings are only checked (200)."""
    require(_checks)
    by, settings = who(request), request.app.state.settings
    try:
        checked = jobs.check(wanted.recipe, wanted.overrides, settings.runs_dir, settings.store_url)
    except SettingsRefused as error:
        record(by, SUBMIT, f"refused: {error}", recipe=wanted.recipe, overrides=wanted.overrides)
        raise ProblemError(422, str(error)) from None
    except RayUnavailable as error:
        raise ProblemError(503, str(error)) from None
    if wanted.dry:
        response.status_code = 200
        return Submission(status="checked", run_id=checked.run_id, config=checked.config)
    asked, job_id = _submit(request, by, wanted, checked)
    response.headers["Location"] = f"{request.url.path}/{asked.id}"
    return Submission.of(asked).model_copy(update={"config": checked.config, "job_id": job_id})


@router.get(
    "/submissions",
    operation_id="listSubmissions",
    summary="Runs that were submitted from here",
    dependencies=[RequireToken],
    responses=documented(401, 403, 429),
)
def list_submissions(
    request: Request,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Submission]:
    """Newest first, as they stand now."""
    engine = records(request.app.state.settings, create=False)
    if engine is None:
        return Page(items=[], next_cursor=None)
    try:
        read = Reader(engine).select
        found = actions.newest(read, run_id=None, limit=limit + 1, before_id=cursor)
        if _settle_open(request, engine, found[:limit]):
            found = actions.newest(read, run_id=None, limit=limit + 1, before_id=cursor)
    finally:
        engine.dispose()
    return page_of([Submission.of(each) for each in found], limit)


@router.get(
    "/submissions/{submission_id}",
    operation_id="getSubmission",
    summary="How a submitted run stands",
    dependencies=[RequireToken],
    responses=documented(401, 403, 429),
)
def get_submission(request: Request, submission_id: Number) -> Submission:
    """``done`` when the run is in the list of runs, ``refused`` when its job ended before; with the end of its log."""
    engine = records(request.app.state.settings, create=False)
    try:
        found = None if engine is None else actions.find(Reader(engine).select, submission_id, run_id=None)
        if engine is None or found is None:
            raise ProblemError(404, f"there is no submission {submission_id}")
        shown = Submission.of(found)
        if shown.job_id is None:
            return shown
        job = _job(request.app.state.jobs, shown.job_id)
        if found.status == "accepted":
            if job.over:
                request.app.state.catalog.catch_up()
            _settle(request, engine, found, job if job.over else None)
            found = actions.find(Reader(engine).select, submission_id, run_id=None) or found
        return Submission.of(found).model_copy(
            update={"job_status": job.status, "job_message": job.message, "log": job.log}
        )
    finally:
        if engine is not None:
            engine.dispose()


def _submit(request: Request, by: str, wanted: SubmissionRequest, checked: Checked) -> tuple[actions.Action, str]:
    engine = records(request.app.state.settings, create=True)
    assert engine is not None
    arguments: dict[str, Any] = {"recipe": wanted.recipe, "overrides": wanted.overrides, "run_id": checked.run_id}
    try:
        arguments["life_before"] = _life(request, checked.run_id)
        if arguments["life_before"] is not None and checked.config["run"]["resume"] == "never":
            raise ProblemError(409, f"there is a run {checked.run_id} already; take another run.name, or resume=auto")
        asked = actions.request(engine, None, SUBMIT, arguments, by)
        try:
            job_id = request.app.state.jobs.submit(checked)
        except (RayUnavailable, RayRefused) as error:
            actions.settle(engine, asked.id, "refused", str(error))
            record(by, SUBMIT, str(error), **arguments)
            raise ProblemError(503 if isinstance(error, RayUnavailable) else 502, str(error)) from None
        actions.accept(engine, asked.id, arguments | {"job_id": job_id}, "Ray has taken the job")
        record(by, SUBMIT, f"submitted as {job_id}", **arguments)
        return actions.find(Reader(engine).select, asked.id, run_id=None) or asked, job_id
    finally:
        engine.dispose()


def _job(ray: jobs.Jobs, job_id: str) -> jobs.JobState:
    try:
        return ray.state(job_id)
    except (RayUnavailable, RayRefused) as error:
        return jobs.JobState("unknown", str(error), "", over=False)


def _settle_open(request: Request, engine: sa.Engine, found: list[actions.Action]) -> bool:
    """Settle what has come to an end; whether anything has. Ray is asked once for all that have no run yet."""
    waiting = [each for each in found if each.status == "accepted" and each.arguments.get("job_id")]
    left = [each for each in waiting if not _settle(request, engine, each, None)]
    if not left:
        return bool(waiting)
    try:
        ended = request.app.state.jobs.ended([each.arguments["job_id"] for each in reversed(left)])  # the oldest first
    except (RayUnavailable, RayRefused):
        ended = {}
    if ended:
        request.app.state.catalog.catch_up()
    for each in left:
        if job := ended.get(each.arguments["job_id"]):
            _settle(request, engine, each, job)
    return bool(ended) or len(left) < len(waiting)


def _settle(request: Request, engine: sa.Engine, asked: actions.Action, ended: jobs.JobState | None) -> bool:
    """It was successful when there is a run: the job alone proves nothing. Whether it has come to an end. Before
    ``ended`` is given, the catalog must have caught up: a run that died as soon as it had started may not be listed.
    """
    run_id, before = asked.arguments["run_id"], (None, asked.arguments.get("life_before"))
    if _life(request, run_id) not in before:
        return actions.settle(engine, asked.id, "done", f"run {run_id} has started")
    if ended is None:
        return False
    last = ended.log.strip().splitlines()[-1:] or [ended.message]
    what = "there is no run" if ended.status == "unknown" else f"the job {ended.status} before there was a run"
    return actions.settle(engine, asked.id, "refused", f"{what}: {last[0]}"[:1000])


def _life(request: Request, run_id: str) -> list[float] | None:
    """Another one whenever a process of the run starts; None: there is no such run."""
    run = request.app.state.catalog.run(run_id)
    return None if run is None or not run["starts"] else [run["created"], run["starts"]]  # 0: not read yet
