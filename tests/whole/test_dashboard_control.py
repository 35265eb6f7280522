"""Control through the service: who may ask, what a run makes of it, what the trail keeps, and what is submitted."""

import contextlib
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.dashboard import jobs
from services.store.actions import Action, Inbox
from tests.support.dashboards import Dashboard, Place, dashboard, write_run, writer
from tests.support.databases import Server
from tests.support.real_runs import Runs, command_line, send, wait_until
from tests.whole.test_ray_job import Head, checkout, free_ports, head  # noqa: F401  (fixtures)

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """With a live run and one that is over."""
    runs = tmp_path_factory.mktemp("control") / "runs"
    write_run(runs, "over")
    with writer(runs, "live"), dashboard(runs) as started:
        wait_until(lambda: started.get("/api/v1/runs/live").status_code == 200, "the run", LIMIT_S)
        yield started


@contextlib.contextmanager
def controller(service: Dashboard, name: str) -> Iterator[tuple[Inbox, "queue.SimpleQueue[Action]"]]:
    """The inbox of a run's process, and what it takes; the test decides."""
    taken: queue.SimpleQueue[Action] = queue.SimpleQueue()
    inbox = Inbox(f"sqlite:///{service.runs / name / 'store.sqlite'}", name, since=time.time(), on_action=taken.put)
    yield inbox, taken
    inbox.close(LIMIT_S)


def ask(service: Dashboard, name: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {service.token}"} if headers is None else headers
    return service.client.post(f"/api/v1/runs/{name}/actions", json=body, headers=headers)


def confirmed(service: Dashboard, answer: httpx.Response) -> dict[str, Any]:
    """What became of an action that was asked for."""
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = {}

    def over() -> bool:
        found.update(service.client.get(answer.headers["Location"]).json())
        return found["status"] not in ("requested", "accepted")

    wait_until(over, f"an end of {answer.json()['action']}", 4 * LIMIT_S)
    return found


# ---- who may ask


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic {token}"}, 401),
        ({"Authorization": "Bearer {token}", "Origin": "http://elsewhere.example"}, 403),
        ({"Authorization": "Bearer {token}", "Origin": "null"}, 403),
        ({"Authorization": "Bearer {token}", "Origin": ""}, 403),
        ({"Authorization": "Bearer {token}", "Origin": "http://127.0.0.1"}, 403),
        ({"Authorization": "Bearer {token}", "Origin": "{origin}.evil.example"}, 403),
        ({"Authorization": "Bearer {token}", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Authorization": "Bearer {token}", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Authorization": "Bearer {token}x"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Cookie": "token={token}"}, 401),
        ({"Authorization": "Bearer {token}"}, 202),
        ({"Authorization": "Bearer {token}", "Origin": "{origin}", "Sec-Fetch-Site": "same-origin"}, 202),
    ],
)
def test_only_who_has_the_token_and_no_other_page_may_ask(
    service: Dashboard, headers: dict[str, str], status: int
) -> None:
    origin = f"http://127.0.0.1:{service.port}"
    given = {name: value.format(token=service.token, origin=origin) for name, value in headers.items()}
    before = len(service.api("runs/live/actions", limit=200)["items"])
    answer = ask(service, "live", given, action="checkpoint")
    assert answer.status_code == status, answer.text
    after = service.api("runs/live/actions", limit=200)["items"]
    assert len(after) == before + (status == 202), "asked for in spite of the answer"
    submitted = service.client.post("/api/v1/submissions", json={"recipe": "nothing"}, headers=given)
    assert submitted.status_code == (422 if status == 202 else status)
    for path, there in (("submissions", 200), ("submissions/999999", 404)):
        told = service.client.get(f"/api/v1/{path}", headers=given)
        assert told.status_code == (there if status == 202 else status), "what was submitted is the owner's to read"


def test_token_in_an_address_opens_nothing_and_is_not_logged(service: Dashboard) -> None:
    for name in ("token", "access_token", "authorization"):
        answer = service.client.post(
            "/api/v1/runs/live/actions", params={name: service.token}, json={"action": "checkpoint"}
        )
        assert answer.status_code == 401 and service.token not in answer.text
    assert service.token not in service.log()


def test_action_is_confirmed_by_the_run_alone(service: Dashboard) -> None:
    with controller(service, "live") as (inbox, taken):
        answer = ask(service, "live", action="set_actors", actors=3)
        assert answer.status_code == 202 and answer.json()["status"] == "requested"
        assert answer.json()["expires"] > time.time()
        action = taken.get(timeout=LIMIT_S)
        assert (action.action, action.arguments, action.requested_by) == (
            "set_actors",
            {"actors": 3},
            "dashboard at 127.0.0.1",
        )
        assert service.client.get(answer.headers["Location"]).json()["status"] == "accepted"
        inbox.settle(action.id, "refused", "the cluster is <b>full</b>")
        found = confirmed(service, answer)
    assert (found["status"], found["result"]) == ("refused", "the cluster is <b>full</b>")
    assert service.api("runs/live/actions", limit=1)["items"] == [found], "the newest of the trail"
    assert "set_actors {'run': 'live', 'actors': 3}" in service.log()
    assert service.token not in service.log()


def test_run_that_is_over_refuses_and_the_trail_has_it(service: Dashboard) -> None:
    answer = ask(service, "over", action="resume")
    assert answer.status_code == 409 and answer.json()["detail"] == "the run is over (finished)"
    assert answer.headers["Content-Type"] == "application/problem+json"
    (left,) = service.api("runs/over/actions")["items"]
    assert (left["status"], left["result"], left["requested_by"]) == (
        "refused",
        "the run is over (finished)",
        "dashboard at 127.0.0.1",
    )


@pytest.mark.parametrize(
    "body",
    [
        {"action": "dance"},
        {"action": "set_actors"},
        {"action": "set_actors", "actors": 0},
        {"action": "set_actors", "actors": "3"},
        {"action": "pause", "actors": 3},
        {"action": "pause", "also": 1},
        {},
    ],
    ids=json.dumps,
)
def test_wrong_requests_are_refused(service: Dashboard, body: dict[str, Any]) -> None:
    before = service.api("runs/live/actions")
    assert ask(service, "live", **body).status_code == 422
    assert service.api("runs/live/actions") == before


def test_unknown_runs_actions_and_submissions(service: Dashboard) -> None:
    assert ask(service, "nobody", action="pause").status_code == 404
    assert ask(service, "..%2fover", action="pause").status_code == 404
    for path in ("runs/live/actions/999999", "runs/over/actions/999999", "submissions/999999", "runs/nobody/actions"):
        headers = {"Authorization": f"Bearer {service.token}"}
        assert service.client.get(f"/api/v1/{path}", headers=headers).status_code == 404, path


def test_too_many_open_actions_and_too_fast(tmp_path: Path) -> None:
    with writer(tmp_path / "runs", "live"), dashboard(tmp_path / "runs") as service:
        wait_until(lambda: service.get("/api/v1/runs/live").status_code == 200, "the run", LIMIT_S)
        answers = [ask(service, "live", action="checkpoint") for _ in range(11)]
        assert [each.status_code for each in answers] == [202] * 10 + [429]
        assert "10 actions of this run are waiting" in answers[-1].json()["detail"]
        while "too many requests at once" not in answers[-1].json()["detail"]:  # faster than one a second
            assert len(answers) < 500
            answers.append(ask(service, "live", action="checkpoint"))
        assert int(answers[-1].headers["Retry-After"]) >= 1
        assert len(service.api("runs/live/actions")["items"]) == 10


# ---- submission


def test_recipes_and_the_check_of_settings(service: Dashboard) -> None:
    offered = service.api("recipes")
    assert {"sudoku", "smoke", "countdown"} <= {each["name"] for each in offered["items"]}
    assert not [each for each in offered["items"] if each["name"].startswith("sft_") or not each["summary"]]
    assert (offered["submission"], offered["ray_address"]) == (False, None)
    sound = submit(service, overrides=["learner.lr=0.5", "run.name=mine"], dry=True)
    assert sound.status_code == 200, sound.text
    assert sound.json()["config"]["learner"]["lr"] == 0.5
    assert sound.json()["config"]["run"]["dir"] == str(service.runs)
    assert (sound.json()["run_id"], sound.json()["status"]) == ("mine", "checked")
    unknown = submit(service, overrides=["learner.lrr=0.5"], dry=True)
    assert unknown.status_code == 422 and "did you mean 'learner.lr'" in unknown.json()["detail"]
    leaky = submit(service, overrides=["store.url=postgresql://u:geheim@h/d"], dry=True)
    assert leaky.status_code == 422 and "geheim" not in leaky.text + service.log()
    assert "postgresql://u:***@h/d" in service.log(), "the control: the line is there"
    off = submit(service)
    assert off.status_code == 503 and "--ray-address" in off.json()["detail"]
    assert service.owner_api("submissions")["items"][0]["status"] == "refused"
    assert (service.runs / ".dashboard.sqlite").stat().st_mode & 0o777 == 0o600, "settings are the owner's to read"
    assert not (service.runs / "mine").exists()


@pytest.mark.parametrize(
    "recipe, overrides, told",
    [
        ("../smoke", [], "there is no recipe '../smoke'"),
        ("/etc/passwd", [], "there is no recipe"),
        ("sft_d1_s1k", [], "there is no recipe"),
        ("smoke", ["--help"], "not of the form key.sub=value"),
        ("smoke", ["run.name=a\nb=1"], "not of the form key.sub=value"),
        ("smoke", ["run.dir=/tmp"], "run.dir is the dashboard's to set"),
        ("smoke", ["recipe=sudoku"], "recipe is the dashboard's to set"),
        ("smoke", [" store.url =postgresql://u:geheim@h/d"], "store.url is the dashboard's to set"),
        ("smoke", ["store={url: postgresql:///elsewhere}"], "store.url and resources.ray_address are the dashboard's"),
        ("smoke", ["resources={ray_address: auto}"], "store.url and resources.ray_address are the dashboard's"),
        ("smoke", ["run.name=null"], "gives the run no name"),
        ("smoke", ["resume=/elsewhere/checkpoints/iteration-000001"], "it is never or auto"),
        ("smoke", ["run.name=a; touch /tmp/x"], "is not usable"),
    ],
)
def test_settings_that_lead_elsewhere_are_refused(tmp_path: Path, recipe: str, overrides: list[str], told: str) -> None:
    with pytest.raises(jobs.SettingsRefused, match=re.escape(told)):
        jobs.check(recipe, overrides, tmp_path, None)


def test_run_is_told_the_store_and_the_folder_whatever_else_it_is_told(tmp_path: Path) -> None:
    given = ["store={url: postgresql:///elsewhere}", "run={dir: /elsewhere}", "run.resume=auto"]
    checked = jobs.check("smoke", given, tmp_path, "postgresql://somebody@db/unmask")
    assert checked.config["store"]["url"] == "postgresql://somebody@db/unmask"
    assert checked.config["run"]["dir"] == str(tmp_path)
    assert "store.url=postgresql://somebody@db/unmask" in checked.arguments
    assert checked.config["run"]["name"] == checked.run_id and "-smoke-" in checked.run_id


def submit(service: Dashboard, recipe: str = "smoke", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {service.token}"}
    return service.client.post(
        "/api/v1/submissions", json={"recipe": recipe, **body}, headers=headers, timeout=2 * LIMIT_S
    )


def test_ray_that_is_not_there_is_told() -> None:
    (port,) = free_ports(1)
    with pytest.raises(jobs.RayUnavailable, match=f"no Ray answers at http://127.0.0.1:{port}"):
        jobs.Jobs(f"http://127.0.0.1:{port}", None).state("a-job")


@pytest.mark.slow
def test_ray_that_never_answers_holds_up_neither_a_request_nor_the_end() -> None:
    code = """
import sys
import ray.job_submission
from services.dashboard import jobs
jobs.RAY_LIMIT_S = 1.0
ray = jobs.Jobs(sys.argv[1], None)
for _ in range(jobs.CALLS + 1):
    try:
        ray.state("a-job")
    except jobs.RayUnavailable as error:
        print(error)
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", code, address]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"Ray at {address} did not answer within 1 s"] * (jobs.CALLS + 1)


# ---- real runs


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_submitted_run_appears(
    head: Head,  # noqa: F811
    checkout: Path,  # noqa: F811
    runs: Runs,
    tmp_path: Path,
    postgresql: Server,
) -> None:
    """In a store by URL where Ray wants a token, in the folder where it wants none."""
    ray = {key: value for key, value in head.environment.items() if key.startswith("RAY_AUTH")}
    options = ("--ray-address", f"http://127.0.0.1:{head.dashboard}", "--ray-working-dir", str(checkout))
    with contextlib.ExitStack() as stack:
        secured = ray["RAY_AUTH_MODE"] == "token"
        url = stack.enter_context(postgresql.database()) if secured else None
        place = Place(tmp_path / "runs", url)
        service = stack.enter_context(dashboard(place, *options, **ray))
        assert service.api("recipes")["submission"] is True
        given = [f"model.cache_dir={runs.cache}", "run.name=from-the-page", "run.iterations=1", *head.settings]
        dies = submit(service, overrides=[*given, "model.cache_dir=relative"])  # wrong only inside a job
        dead = settled(service, dies)
        assert dead["status"] == "refused" and "model.cache_dir=relative is relative" in dead["result"], dead
        assert service.get("/api/v1/runs/from-the-page").status_code == 404

        with stopped(head.processes(), "runtime_env/agent/main.py"):  # no job can start
            answer = submit(service, overrides=given)
            assert answer.status_code == 202, answer.text
            assert answer.json()["job_id"].startswith("unmask-from-the-page-")
            for _ in range(3):
                waiting = submission(service, answer)
                assert (waiting["status"], waiting["job_status"]) == ("accepted", "pending"), waiting
        found = settled(service, answer)
        assert (found["status"], found["result"]) == ("done", "run from-the-page has started"), found
        wait_until(lambda: service.api("runs/from-the-page")["status"] == "finished", "the run's end", 4 * LIMIT_S)
        assert (tmp_path / "runs/from-the-page/store.sqlite").exists() == (url is None)
        again = submit(service, overrides=given)
        assert again.status_code == 409 and "there is a run from-the-page already" in again.json()["detail"]

        if secured:
            wrong = tmp_path / "wrong-token"
            wrong.write_text("0" * 64)
            wrong.chmod(0o600)
            for other in ({"RAY_AUTH_MODE": "disabled"}, ray | {"RAY_AUTH_TOKEN_PATH": str(wrong)}):
                with dashboard(place, *options, **other) as stranger:
                    refused = submit(stranger, overrides=["run.name=stranger"])
                    assert refused.status_code == 502, refused.text
            assert not (tmp_path / "runs" / "stranger").exists()


def submission(service: Dashboard, answer: httpx.Response) -> dict[str, Any]:
    """How a submission stands."""
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = service.owner_api(answer.headers["Location"].removeprefix("/api/v1/"))
    return found


def settled(service: Dashboard, answer: httpx.Response) -> dict[str, Any]:
    wait_until(lambda: submission(service, answer)["status"] not in ("requested", "accepted"), "its end", 4 * LIMIT_S)
    return submission(service, answer)


@contextlib.contextmanager
def stopped(processes: Sequence[int], script: str) -> Iterator[None]:
    """In the block those of the processes that run ``script`` hang."""
    hanging = [pid for pid in processes if script in command_line(pid)]
    assert hanging, f"none of them runs {script}"
    send(signal.SIGSTOP, hanging)
    try:
        yield
    finally:
        send(signal.SIGCONT, hanging)
