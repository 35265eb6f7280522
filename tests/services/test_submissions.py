"""What became of submitted runs, as the list and the single answer tell it, with a stand-in for the server of Ray's Job
API; ``test_dashboard_control`` has a real one.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.dashboard import jobs
from services.dashboard.jobs import LOGS
from services.store import actions, schema
from tests.support.dashboards import Dashboard, dashboard, eventually, write_run


class StandIn:
    """Knows ``jobs`` by their state, and notes what it was ``asked``; ``on_log`` is called before a log."""

    def __init__(self) -> None:
        self.address = ""
        self.jobs: dict[str, str] = {}
        self.asked: list[str] = []
        self.refusals: list[str] = []  # what submissions get before one is taken
        self.on_log: Callable[[], object] = lambda: None

    def answer(self, path: str) -> Any:
        """The document behind a path; None where there is none."""
        place = path.strip("/").split("/")[1:]
        if place == ["version"]:
            return {"version": "4", "ray_version": "2", "ray_commit": "x", "session_name": "s"}
        if place == ["jobs"]:
            self.asked.append("list")
            return [self._job(name) for name in self.jobs]
        if place[-1] == "logs":
            self.asked.append("log")
            self.on_log()
            return {"logs": "something\nthe last line\n"}
        self.asked.append("job")
        return self._job(place[1]) if place[1] in self.jobs else None

    def _job(self, name: str) -> dict[str, Any]:
        return {"type": "SUBMISSION", "submission_id": name, "status": self.jobs[name], "entrypoint": "", "message": ""}


@pytest.fixture
def ray() -> Iterator[StandIn]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = stand_in.answer(self.path)
            body = json.dumps(found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stand_in.asked.append("submit")
            refused = stand_in.refusals.pop(0) if stand_in.refusals else None
            name = asked["submission_id"]
            body = (json.dumps({"job_id": name, "submission_id": name}) if refused is None else refused).encode()
            self.send_response(200 if refused is None else 500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    stand_in.address = f"http://127.0.0.1:{server.server_port}"
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def service_with(ray: StandIn, runs: Path, *jobs: str) -> Iterator[Dashboard]:
    """A dashboard from which these were submitted; each is the name of its run, and its job is job-NAME."""
    runs.mkdir()
    engine = schema.open_engine(schema.sqlite_url(runs / ".dashboard.sqlite"), create=True)
    for name in jobs:
        arguments = {"run_id": name, "life_before": None}
        asked = actions.request(engine, None, "submit", arguments, "a test")
        actions.accept(engine, asked.id, arguments | {"job_id": f"job-{name}"}, "Ray has taken the job")
    engine.dispose()
    with dashboard(runs, "--ray-address", ray.address) as service:
        yield service


def listed(service: Dashboard) -> dict[str, tuple[str, str]]:
    return {each["run_id"]: (each["status"], each["result"]) for each in service.owner_api("submissions")["items"]}


def singly(service: Dashboard, count: int) -> dict[str, tuple[str, str]]:
    found = [service.owner_api(f"submissions/{number}") for number in range(1, count + 1)]
    return {each["run_id"]: (each["status"], each["result"]) for each in found}


def test_list_settles_what_has_come_to_an_end_and_asks_ray_once(ray: StandIn, tmp_path: Path) -> None:
    ray.jobs = {"job-waits": "PENDING", "job-works": "RUNNING", "job-fails": "FAILED", "job-there": "RUNNING"}
    with service_with(ray, tmp_path / "runs", "waits", "works", "fails", "there", "forgotten") as service:
        write_run(tmp_path / "runs", "there")
        eventually(lambda: service.get("/api/v1/runs/there").status_code == 200)
        found = listed(service)
        assert found["waits"] == found["works"] == ("accepted", "Ray has taken the job")
        assert found["there"] == ("done", "run there has started")
        assert found["fails"] == ("refused", "the job failed before there was a run: the last line")
        assert found["forgotten"] == ("refused", "there is no run: Ray no longer knows this job")
        assert ray.asked == ["list", "log"]
        assert listed(service) == found and ray.asked == ["list", "log", "list"], "the settled ones cost nothing more"
        assert singly(service, 5) == listed(service) == found


@pytest.mark.slow
def test_cost_of_a_list_is_bounded(ray: StandIn, tmp_path: Path) -> None:
    names = [f"run-{number:02d}" for number in range(LOGS + 2)]
    ray.jobs = {f"job-{name}": "FAILED" for name in names}
    with service_with(ray, tmp_path / "runs", *names) as service:
        first = listed(service)
        assert ray.asked == ["list"] + ["log"] * LOGS
        assert [name for name in names if first[name][0] == "accepted"] == names[LOGS:], "the oldest first"
        assert {status for status, _ in listed(service).values()} == {"refused"}
        asked = list(ray.asked)
        listed(service)
        assert ray.asked == asked, "Ray isn't asked when nothing is open"


def test_ray_that_is_gone_leaves_a_list(ray: StandIn, tmp_path: Path) -> None:
    with service_with(ray, tmp_path / "runs", "one") as service:
        ray.answer = lambda path: None  # type: ignore[method-assign]
        assert listed(service) == {"one": ("accepted", "Ray has taken the job")}


@pytest.mark.parametrize("ask", [listed, partial(singly, count=2)], ids=["list", "single"])
@pytest.mark.slow
def test_run_that_dies_at_once_has_been_there(
    ray: StandIn, tmp_path: Path, ask: Callable[[Dashboard], dict[str, tuple[str, str]]]
) -> None:
    """Its folder is there when Ray says that the job is over, and not yet in the list of runs."""
    ray.jobs = {"job-brief": "FAILED", "job-never": "FAILED"}
    with service_with(ray, tmp_path / "runs", "brief", "never") as service:
        ray.on_log = lambda: (tmp_path / "runs/brief").exists() or write_run(tmp_path / "runs", "brief")
        found = ask(service)
        assert found["brief"] == ("done", "run brief has started")
        assert found["never"] == ("refused", "the job failed before there was a run: the last line")  # the control


UNREACHED = """Traceback (most recent call last):
  File "/ray/dashboard/modules/job/job_head.py", line 135, in submit_job_internal
aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 127.0.0.1:52365
"""


def test_agent_that_ray_cannot_reach_is_tried_again(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_AGAIN_S", (0.01, 0.01))
    checked = jobs.Checked({}, ["recipe=smoke"], "one")
    ray.refusals = [UNREACHED, UNREACHED]
    assert jobs.Jobs(ray.address, None).submit(checked).startswith("unmask-one-")
    assert ray.asked == ["submit"] * 3
    ray.refusals = [UNREACHED] * 3
    with pytest.raises(
        jobs.RayRefused, match="refused: RuntimeError: aiohttp.*: Cannot connect to host 127.0.0.1:52365$"
    ):
        jobs.Jobs(ray.address, None).submit(checked)
    assert ray.refusals == [] and len(ray.asked) == 6
    ray.refusals = ["Traceback (most recent call last):\nValueError: no such package\n"]
    with pytest.raises(jobs.RayRefused, match="ValueError: no such package$"):
        jobs.Jobs(ray.address, None).submit(checked)
    assert len(ray.asked) == 7, "what Ray itself refuses is not tried again"


def test_attempt_that_came_through_unheard_is_no_failure(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_AGAIN_S", (0.01,))
    monkeypatch.setattr("secrets.token_hex", lambda _: "abc")
    ray.refusals = [UNREACHED, "ValueError: Job with submission_id unmask-one-abc already exists. Use another."]
    assert jobs.Jobs(ray.address, None).submit(jobs.Checked({}, [], "one")) == "unmask-one-abc"
    ray.refusals = ["ValueError: Job with submission_id unmask-two already exists."]
    with pytest.raises(jobs.RayRefused):
        jobs.Jobs(ray.address, None).submit(jobs.Checked({}, [], "one"))
