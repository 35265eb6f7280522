"""Runs as jobs of a Ray cluster: shipped recipes, the check of a run's settings, submission, status and log.

A job runs ``python -m learner.main`` with whatever settings it is given, and settings can name a user's own task: who
may submit may run code on the cluster. The settings are checked by ``learner.main --print-config`` in a process of its
own, so that nothing of the learner is imported here.
"""

import concurrent.futures
import importlib.util
import itertools
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from rewards.errors import UnmaskError
from services.dashboard.settings import TOKEN_VARIABLE

CHECK_LIMIT_S = 60.0
RAY_LIMIT_S = 30.0
CALLS = 4
"""To Ray at a time."""
LOGS = 8
"""That are fetched for one question about several jobs."""
LOG_CHARACTERS = 20_000
"""Of the end of a job's log that are shown."""

FOR_SFT = "sft_"
"""How the names of recipes for ``learner.sft`` begin."""

_AGENT_UNREACHED = "aiohttp.client_exceptions"
"""In the traceback that Ray's head answers with when the agent that is to start the job can't be reached just now."""
_AGAIN_S = (1.0, 3.0, 6.0)

_RESERVED = ("recipe", "run.dir", "store.url", "resources.ray_address")
_Answer = TypeVar("_Answer")


class SettingsRefused(UnmaskError):
    """The settings of the run are wrong; the message is for whoever gave them."""


class RayUnavailable(UnmaskError):
    """No Ray was named, none answers, or it can't be spoken to."""


class RayRefused(UnmaskError):
    """Ray answered that it won't."""


class Recipe(NamedTuple):
    name: str
    summary: str
    text: str


class Checked(NamedTuple):
    """Settings that the learner accepts."""

    config: dict[str, Any]
    arguments: list[str]
    """Of ``learner.main``."""
    run_id: str


class JobState(NamedTuple):
    status: str
    """Ray's word in lower case: pending, running, stopped, succeeded, failed; unknown: Ray has forgotten the job, or
    could not be asked."""
    message: str
    log: str
    over: bool
    """Whether nothing more will come of it."""


_FORGOTTEN = JobState("unknown", "Ray no longer knows this job", "", over=True)


def recipes() -> list[Recipe]:
    """What ships for ``learner.main``, by name."""
    return [each for each in _shipped() if not each.name.startswith(FOR_SFT)]


_listed: dict[str, list[dict[str, Any]]] = {}
_listing = threading.Lock()


def settings_of(recipe: str) -> list[dict[str, Any]]:
    """Every setting that ``learner.main`` knows, or ``learner.sft`` of a recipe of its own, with the recipe's values.
    Asked of the learner once for each recipe.

    Raises:
        SettingsRefused: no such recipe ships.
        RayUnavailable: the learner could not be asked.
    """
    _require(recipe, _shipped())
    module = "learner.finetuning.listing" if recipe.startswith(FOR_SFT) else "learner.settings.listing"
    with _listing:
        if recipe not in _listed:
            _listed[recipe] = _asked(module, [f"recipe={recipe}"])
        return _listed[recipe]


def check(recipe: str, overrides: Sequence[str], runs_dir: Path, store_url: str | None) -> Checked:
    """The settings that the recipe and the overrides give. The run gets a name of its own unless they name it, and
    writes to the store ``store_url`` if there is one.

    Raises:
        SettingsRefused: the learner refuses them, or they would lead out of the folder of runs or the store.
        RayUnavailable: the learner could not be asked.
    """
    _require(recipe, recipes())
    for override in overrides:
        _require_setting(override)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe}-{secrets.token_hex(2)}"
    store = [] if store_url is None else [f"store.url={store_url}"]
    arguments = [f"recipe={recipe}", f"run.name={name}", *overrides, f"run.dir={runs_dir}", *store]
    config: dict[str, Any] = _asked("learner.main", [*arguments, "--print-config"])
    run = config["run"]
    if config["store"]["url"] != store_url or config["resources"]["ray_address"] is not None:  # such as store={url: x}
        raise SettingsRefused("store.url and resources.ray_address are the dashboard's to set; leave them out")
    if run["name"] is None:
        raise SettingsRefused("run.name=null gives the run no name to find it by; leave it out, or give a name")
    if run["resume"] not in ("never", "auto"):
        raise SettingsRefused(f"run.resume={run['resume']} is a path; from here it is never or auto, with run.name")
    return Checked(config, arguments, run["name"])


class Jobs:
    """The Job API of one Ray cluster. Safe from several threads; every call is bounded.

    Args:
        address: ``http://host:port`` of Ray's dashboard; None: nothing can be submitted. Ray's own token, where its
            authentication is on, is Ray's business: RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH in the environment.
        working_dir: a checkout to send along; None when Unmask is installed on the cluster.
    """

    def __init__(self, address: str | None, working_dir: Path | None) -> None:
        self.address, self._working_dir = address, working_dir
        self._calls = threading.BoundedSemaphore(CALLS)

    def require(self) -> None:
        """Raises RayUnavailable when there is no address or nobody listens there."""
        if self.address is None:
            raise RayUnavailable(
                "submission is off: start the dashboard with --ray-address http://HOST:8265 of a Ray cluster"
            )
        place = urlsplit(self.address)
        try:
            socket.create_connection((place.hostname or "", place.port or 80), timeout=5).close()
        except OSError as error:
            raise RayUnavailable(f"no Ray answers at {self.address}: {error}") from None

    def submit(self, checked: Checked) -> str:
        """Have Ray start the run; the job's id. Raises RayUnavailable, RayRefused."""
        self.require()
        job_id = f"unmask-{checked.run_id}-{secrets.token_hex(3)}"
        runtime = {} if self._working_dir is None else {"working_dir": str(self._working_dir)}

        def submit(client: Any, later_s: Sequence[float] = _AGAIN_S) -> str:
            try:
                return str(
                    client.submit_job(
                        entrypoint=shlex.join(["python", "-m", "learner.main", *checked.arguments]),  # a shell runs it
                        submission_id=job_id,
                        runtime_env=runtime,
                        metadata={"unmask_run": checked.run_id},
                    )
                )
            except RuntimeError as error:
                if f"submission_id {job_id} already exists" in str(error):
                    return job_id  # nobody else has this id: an attempt that failed had come through
                if _AGENT_UNREACHED not in str(error) or not later_s:
                    raise
            time.sleep(later_s[0])
            return submit(client, later_s[1:])

        return self._ask(submit)

    def state(self, job_id: str) -> JobState:
        """How the job is and the end of its log. Raises RayUnavailable, RayRefused."""
        self.require()

        def look(client: Any) -> JobState:
            try:
                info = client.get_job_info(job_id)
            except RuntimeError as error:
                if "404" in str(error):
                    return _FORGOTTEN
                raise
            return _with_log(client, job_id, _told(info))

        return self._ask(look)

    def ended(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Those that are over, with their logs; no more than ``LOGS`` of them, the first ones. However many jobs there
        are, it is one question to Ray, and one for each log. Raises RayUnavailable, RayRefused."""
        self.require()

        def look(client: Any) -> dict[str, JobState]:
            known = {info.submission_id: _told(info) for info in client.list_jobs()}
            states = {job_id: known.get(job_id, _FORGOTTEN) for job_id in job_ids}
            over = {job_id: state for job_id, state in states.items() if state.over}
            return {
                job_id: state if state is _FORGOTTEN else _with_log(client, job_id, state)
                for job_id, state in itertools.islice(over.items(), LOGS)
            }

        return self._ask(look)

    def _ask(self, question: Callable[[Any], _Answer]) -> _Answer:
        """Ray's client knows no time limits, so the wait is bounded here. What still hangs then neither holds up the
        end of the process nor leaves room for more than ``CALLS`` of its kind."""
        answered: concurrent.futures.Future[_Answer] = concurrent.futures.Future()

        def answer() -> None:
            try:
                from ray.job_submission import JobSubmissionClient  # a second of imports

                answered.set_result(question(JobSubmissionClient(self.address)))
            except BaseException as error:
                answered.set_exception(error)
            finally:
                self._calls.release()

        late = RayUnavailable(f"Ray at {self.address} did not answer within {RAY_LIMIT_S:g} s")
        deadline = time.monotonic() + RAY_LIMIT_S
        if not self._calls.acquire(timeout=RAY_LIMIT_S):
            raise late
        threading.Thread(target=answer, name="ray-job", daemon=True).start()
        try:
            return answered.result(timeout=max(0.0, deadline - time.monotonic()))
        except concurrent.futures.TimeoutError:
            raise late from None
        except ConnectionError as error:
            raise RayUnavailable(f"no Ray answers at {self.address}: {error}") from None
        except ImportError as error:
            raise RayUnavailable(f"Ray's job client can't be imported here: {error}") from None
        except Exception as error:  # Ray's own kinds, requests' kinds, RuntimeError with a status inside
            text = str(error)
            if "Traceback" in text:  # of one of Ray's processes
                text = text.rstrip("\n .").rpartition("\n")[2]
            told = " ".join(text.split())[:500]
            raise RayRefused(f"Ray at {self.address} refused: {type(error).__name__}: {told}") from None


def _told(info: Any) -> JobState:
    """Of what Ray says of a job, without its log."""
    status, message = str(info.status).lower(), str(info.message or "")[:2000]
    return JobState(status, message, "", over=status in ("stopped", "succeeded", "failed"))


def _with_log(client: Any, job_id: str, state: JobState) -> JobState:
    return state._replace(log=str(client.get_job_logs(job_id) or "")[-LOG_CHARACTERS:])


def _shipped() -> list[Recipe]:
    found = []
    for path in sorted((_learner_folder() / "recipes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        found.append(Recipe(path.stem, text.partition("\n")[0].removeprefix("#").strip(), text))
    return found


def _require(recipe: str, among: Sequence[Recipe]) -> None:
    if recipe not in (known := [each.name for each in among]):
        raise SettingsRefused(f"there is no recipe {recipe!r}; shipped are {', '.join(known)}")


def _require_setting(override: str) -> None:
    key = override.partition("=")[0].strip()
    if override.startswith("-") or "=" not in override or re.search(r"[\x00-\x1f\x7f]", override):
        raise SettingsRefused(f"{override[:200]!r} is not of the form key.sub=value")
    if key in _RESERVED:
        raise SettingsRefused(f"{key} is the dashboard's to set; leave it out")


def _asked(module: str, arguments: Sequence[str]) -> Any:
    """What a command of the learner prints as JSON."""
    environment = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
    paths = [str(_learner_folder().parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryDirectory(prefix="unmask-check-") as folder:
        try:
            answer = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=CHECK_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise RayUnavailable(f"the settings could not be checked within {CHECK_LIMIT_S:g} s; try again") from None
    errors = answer.stderr.decode(errors="replace").strip()[-4000:]
    if answer.returncode == 2:
        raise SettingsRefused(errors.removeprefix("error: "))
    if answer.returncode != 0:
        raise RayUnavailable(f"the settings could not be checked: {errors}")
    return json.loads(answer.stdout)


def _learner_folder() -> Path:
    """Found, not imported."""
    found = importlib.util.find_spec("learner")
    assert found is not None and found.submodule_search_locations, "the learner is a package of this distribution"
    return Path(found.submodule_search_locations[0])
