"""Control: what a run is asked to do, and runs that are submitted. Writing wants the token, and so does reading what
was submitted: settings and logs of jobs may hold anything."""

import contextlib
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request, Response

from rewards.errors import StoreError
from services.dashboard import jobs
from services.dashboard.access import RunOfPath
from services.dashboard.action_models import Action, ActionRequest, Recipe, RecipeList, Submission, SubmissionRequest
from services.dashboard.audit import record, require, who
from services.dashboard.jobs import Checked, RayRefused, RayUnavailable, SettingsRefused
from services.dashboard.models import Page
from services.dashboard.problems import ProblemError, documented
from services.dashboard.rate import Rate
from services.dashboard.security import RequireToken
from services.store import actions, schema
from services.store.catalog import READ_LIMIT_S
from services.store.reader import Reader

router = APIRouter(tags=["control"], responses=documented(404, 422, 503))

MAX_OPEN = 10
"""Actions of a run that may wait at once."""
SUBMIT = "submit"

_rate = Rate(burst=30, every_s=1.0)
_checks = Rate(burst=10, every_s=3.0)  # each is a process for a second or two

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
    return _page([Action.of(each) for each in found], limit)


@router.get("/runs/{run_id}/actions/{action_id}", operation_id="getAction", summary="How an action stands")
def get_action(run: RunOfPath, action_id: Number) -> Action:
    """requested, accepted, done, refused or expired."""
    found = actions.find(run.reader.select, action_id, run_id=run.id)
    if found is None:
        raise ProblemError(404, f"run {run.id!r} has no action {action_id}")
    return Action.of(found)


@router.get("/recipes", operation_id="listRecipes", summary="Recipes that a run can be submitted from")
def list_recipes(request: Request) -> RecipeList:
    """What ships with this version, and whether runs can be submitted from here."""
    address = request.app.state.settings.ray_address
    items = [Recipe(name=each.name, summary=each.summary, text=each.text) for each in jobs.recipes()]
    return RecipeList(items=items, submission=address is not None, ray_address=address)


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
    engine = _records(request, create=False)
    if engine is None:
        return Page(items=[], next_cursor=None)
    try:
        read = Reader(engine).select
        found = actions.newest(read, run_id=None, limit=limit + 1, before_id=cursor)
        if _settle_open(request, engine, found[:limit]):
            found = actions.newest(read, run_id=None, limit=limit + 1, before_id=cursor)
    finally:
        engine.dispose()
    return _page([Submission.of(each) for each in found], limit)


@router.get(
    "/submissions/{submission_id}",
    operation_id="getSubmission",
    summary="How a submitted run stands",
    dependencies=[RequireToken],
    responses=documented(401, 403, 429),
)
def get_submission(request: Request, submission_id: Number) -> Submission:
    """``done`` when the run is in the list of runs, ``refused`` when its job ended before; with the end of its log."""
    engine = _records(request, create=False)
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
    engine = _records(request, create=True)
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


def _records(request: Request, *, create: bool) -> sa.Engine | None:
    """The store of what belongs to no run: the shared one, or a small one of the dashboard's in the folder of runs."""
    settings = request.app.state.settings
    if settings.store_url is not None:
        return schema.open_engine(settings.store_url, create=create)
    path = settings.runs_dir / ".dashboard.sqlite"
    if create:
        with contextlib.suppress(OSError):  # which opening it tells better
            path.touch(0o600)  # the settings of a run are its owner's; SQLite's other files take this one's mode
    elif not path.is_file():
        return None
    return schema.open_engine(schema.sqlite_url(path), create=create)


def _page(items: list[Any], limit: int) -> Page[Any]:
    more = len(items) > limit
    return Page(items=items[:limit], next_cursor=str(items[limit - 1].id) if more else None)
