"""The Ray that we start lets nobody else in: its listeners are attacked, a second driver tries, its files are seen.
Plain Ray, attacked in the same way, is the control."""

import ast
import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from learner.bench import control
from learner.ranks.rendezvous import meeting_host, open_meeting_place
from learner.runs.session import check_cluster, joined_ray, joins
from rewards.errors import ConfigError
from tests.support.listening import Listener, listeners
from tests.support.real_runs import Runs, clean_environment, wait_until

ROOT = Path(__file__).resolve().parents[2]
AGENT_PORT = 52365
"""Where Ray's job agent listens, whoever is there first."""


def family() -> list[int]:
    """This process and all below it."""
    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


def posted_job(host: str, port: int, mark: Path) -> int | None:
    """HTTP status of a job that is posted there without a token and would make the file ``mark``; None without an
    answer in HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        body = json.dumps({"entrypoint": f"touch {mark}"})
        connection.request("POST", "/api/job_agent/jobs/", body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def connects(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, port)) == 0


DRIVER = """
import sys
import ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = sys.argv[2] != "loopback"
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except BaseException as error:
    print("refused", type(error).__name__)
else:
    print("in", ray.cluster_resources()["CPU"])
"""


def second_driver(address: str, home: Path, how: str = "loopback", **environment: str) -> str:
    """What happens to a driver of another user's: no variables of Ray's, an empty home."""
    stranger = clean_environment() | {"HOME": str(home)} | environment
    command = [sys.executable, "-c", DRIVER, address, how]
    done = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() or done.stderr


def variables(token: str | None) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}


def outside() -> str:
    """An address of this machine in a network; skips where it is in none."""
    interfaces = psutil.net_if_addrs().values()
    found = [each.address for interface in interfaces for each in interface if each.family == socket.AF_INET]
    for address in found:
        if not address.startswith("127."):
            return address
    pytest.skip("this machine has no network address")


def assert_closed(found: set[Listener], mark: Path) -> None:
    """Nobody gets in through these, from this machine or from the network."""
    assert {host for host, _ in found} <= {"127.0.0.1", "::1"}, f"listens beyond loopback: {sorted(found)}"
    network = outside()
    assert not [port for _, port in found if connects(network, port)]
    answers = {port: posted_job(host, port, mark) for host, port in found}
    assert not [port for port, status in answers.items() if status is not None and 200 <= status < 300], answers
    time.sleep(1.0)  # for a job to start that nobody saw being accepted
    assert not mark.exists()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A local Ray as a run has it, with a worker."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with joined_ray("local", 2, lambda cpus, gpus: None) as told:
            token = ray.get(ray.remote(_token).remote(), timeout=60)
            wait_until(
                lambda: len(listeners(family())) >= 8, "the listeners of Ray's head, node, agents and worker", 60
            )
            if not connects("127.0.0.1", AGENT_PORT):  # it may also be that of another test's Ray
                wait_until(lambda: connects("127.0.0.1", AGENT_PORT), "Ray's job agent", 60)
            session = Path(ray._private.worker._global_node.get_session_dir_path())
            address = ray.get_runtime_context().gcs_address
            yield {"told": told, "token": token, "session": session, "address": address, "before": before}
    assert not session.exists() and not session.parent.parent.exists(), "its files stay"


def _token() -> str:
    return os.environ["RAY_AUTH_TOKEN"]


@pytest.mark.slow
def test_nobody_gets_into_a_local_ray(closed: dict[str, Any], tmp_path: Path) -> None:
    found = listeners(family())
    assert_closed(found, tmp_path / "mark")
    assert second_driver(closed["address"], tmp_path).startswith("refused")
    assert second_driver(closed["address"], tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64).startswith(
        "refused"
    )
    assert (
        second_driver(closed["address"], tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=closed["token"]) == "in 2.0"
    ), "the control: the token opens it"


CHECK = """
from learner.runs.session import check_cluster
try:
    check_cluster(None, insecure=False)
except Exception as error:
    print(type(error).__name__, error)
else:
    print("joins")
"""


@pytest.mark.slow
def test_who_has_not_the_right_token_is_told_at_once(closed: dict[str, Any], tmp_path: Path) -> None:
    def told(**environment: str) -> str:
        stranger = clean_environment() | {"HOME": str(tmp_path), "RAY_ADDRESS": closed["address"]} | environment
        done = subprocess.run([sys.executable, "-c", CHECK], env=stranger, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    begin = f"ConfigError no Ray answers at {closed['address']} "
    for absent in ({}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nonexistent"}):
        assert told(**absent).startswith(begin + "without its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH")
    assert told(**variables("0" * 64)).startswith(begin + "to this shell's token; set RAY_AUTH_TOKEN_PATH")
    assert told(**variables(closed["token"])) == "joins\n", "the control"


@pytest.mark.slow
def test_its_token_and_files_are_nobody_elses(closed: dict[str, Any]) -> None:
    now = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    assert now == {name: value for name, value in closed["before"].items() if name.startswith("RAY_AUTH")}
    folders = [closed["session"], *closed["session"].parents]
    assert stat.S_IMODE(folders[0].stat().st_mode) & 0o022, "the control: Ray opens its own folders"
    assert any(stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0 for folder in folders)
    for pid in family():
        assert closed["token"] not in " ".join(psutil.Process(pid).cmdline())


@pytest.mark.slow
def test_each_ray_has_a_token_of_its_own_and_leaves_none(closed: dict[str, Any]) -> None:
    """In another process: this one has a Ray already."""
    code = """
    import os
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_TMPDIR="/nonexistent/" + 90 * "x")
    from ray._raylet import get_authentication_mode
    import ray
    from learner.runs.local_ray import local_ray
    tokens = set()
    for _ in range(2):
        with local_ray(num_cpus=1) as joining:
            assert ray.get(ray.remote(lambda: 7).remote(), timeout=60) == 7
            tokens.add(joining["RAY_AUTH_TOKEN"])
        assert (int(get_authentication_mode()), os.environ["RAY_AUTH_MODE"]) == (0, "disabled")
        assert "RAY_AUTH_TOKEN" not in os.environ
    assert len(tokens) == 2 and all(len(token) == 64 for token in tokens)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


FAILS = """
import pathlib
from learner.runs.local_ray import local_ray
with local_ray(num_cpus=1):
    raise RuntimeError("of the block")
"""


@pytest.mark.slow
def test_rays_logs_stay_when_something_failed(closed: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS], env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert "of the block" in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Ray's logs are in ")]
    logs = Path(line.removeprefix("Ray's logs are in "))
    assert (logs / "gcs_server.out").exists() and [path.name for path in logs.parent.iterdir()] == ["logs"]
    assert stat.S_IMODE(logs.parent.stat().st_mode) == 0o700


PLAIN = """
import sys, time
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Ray as Ray starts one: its driver, and its address."""
    environment = clean_environment() | {"RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        [sys.executable, "-c", PLAIN], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        yield driver, driver.stdout.readline().strip()
        driver.communicate(timeout=60)


@pytest.mark.slow
def test_the_same_attacks_open_a_plain_ray(
    plain: tuple[subprocess.Popen[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of all of the above, and what is joined only when the settings say so."""
    network, (driver, address) = outside(), plain
    assert not address.startswith("127.")
    process = psutil.Process(driver.pid)

    def found() -> set[Listener]:
        return listeners([driver.pid, *(child.pid for child in process.children(recursive=True))])

    def agents() -> list[Listener]:
        return [listener for listener in found() if posted_job(*listener, tmp_path / "mark") == 200]

    with pytest.raises(AssertionError, match="listens beyond loopback"):
        assert_closed(found(), tmp_path / "mark")
    assert second_driver(address, tmp_path, "network") == "in 2.0"
    if not connects(network, AGENT_PORT):  # else another Ray of this machine has the agent's port
        wait_until(lambda: bool(agents()), "the job agent's answer", 60)
        wait_until((tmp_path / "mark").exists, "the end of a stranger's job", 60)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-m", "learner.main", "recipe=smoke", f"run.dir={tmp_path}", "--dry-run"]
    for name in (address, f"127.0.0.1:{address.rpartition(':')[2]}"):
        done = subprocess.run(
            [*command, f"resources.ray_address={name}"],
            env=clean_environment() | {"UNMASK_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr
        assert f"the Ray cluster at {address} has no authentication" in done.stderr
        assert "resources.ray_insecure=true" in done.stderr and "Traceback" not in done.stderr
    joining = f"""
    from learner.runs.session import joined_ray
    with joined_ray("{address}", 1, lambda cpus, gpus: None, insecure=True) as told:
        print(told)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(joining)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "; it lets everybody in (resources.ray_insecure=true)" in done.stdout, done.stderr


def test_addresses_that_nobody_answers_at_are_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nothing:
        address = f"127.0.0.1:{nothing.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"no Ray answers at {address}.*ray_address=local"):
        check_cluster(address, insecure=False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ConfigError, match="the Ray address ray://127.0.0.1:10001 must be auto, local or host:port"):
        check_cluster(None, insecure=False)
    monkeypatch.delenv("RAY_ADDRESS")
    check_cluster(None, insecure=False)
    assert joins(address) and not joins("local") and not joins(None)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.heavy
def test_nobody_gets_into_a_run(runs: Runs, tmp_path: Path) -> None:
    """Two ranks, an actor, Ray: everything that a whole run opens, while it works."""
    arguments = ("learner.ranks=2", "run.iterations=5000")
    with runs.started("closed", *arguments) as run:
        run.wait_for_row(1)
        found = listeners(run.members())
        ranks = listeners(run.ranks())
        assert len(run.ranks()) == 2 and len(ranks) >= 4, "each rank listens for Ray and for its group"
        assert_closed(found, tmp_path / "mark")


@pytest.mark.slow
@pytest.mark.heavy
def test_the_benchmark_of_the_control_path_has_a_closed_ray() -> None:
    code = f"""
    import threading
    import time
    from tests.support.listening import listeners
    from tests.whole.test_closed_ray import family
    seen, over = set(), threading.Event()
    def look():
        while not over.wait(0.2):
            seen.update(listeners(family()))
    thread = threading.Thread(target=look)
    thread.start()
    from {control.__name__} import run
    run(small=True)
    over.set()
    thread.join(timeout=60)
    assert len(seen) >= 8, seen
    assert {{host for host, _ in seen}} <= {{"127.0.0.1", "::1"}}, seen
    """
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_ranks_meet_on_one_address_alone() -> None:
    assert meeting_host(["10.0.0.5", "10.0.0.5"]) == "127.0.0.1"
    assert meeting_host(["10.0.0.5", "10.0.0.6"]) == "10.0.0.5", "several nodes: that of rank 0"
    network = outside()
    for host, elsewhere in (("127.0.0.1", network), (network, "127.0.0.1")):
        with open_meeting_place(host, 2) as place:
            port = place.getsockname()[1]
            store = torch.distributed.TCPStore(
                host, port, 1, True, wait_for_workers=False, master_listen_fd=place.detach()
            )
            store.set("key", "value")
            assert connects(host, port) and not connects(elsewhere, port)
    usual = torch.distributed.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    assert connects(network, usual.port), "the control: torch's own store listens everywhere"


def test_a_port_that_is_taken_gives_way_to_the_next() -> None:
    host = outside()
    with open_meeting_place(host, 2) as taken:
        port = taken.getsockname()[1]
        with open_meeting_place(host, 2, port) as place:
            assert place.getsockname()[1] == port + 1
            with pytest.raises(
                ConfigError, match=rf"learner.meeting_port={port}: .* {port + 1}: Address already in use"
            ):
                open_meeting_place(host, 2, port)
    with open_meeting_place(host, 2, port) as place:
        assert place.getsockname()[1] == port, "control: it is free again"
    with open_meeting_place("127.0.0.1", 2, port) as place:
        assert place.getsockname()[1] != port, "one node's runs may be several"


def ray_inits(source: str) -> int:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sum(ast.unparse(call.func) == "ray.init" for call in calls)


def test_ray_is_started_and_joined_in_two_places_only() -> None:
    folders = ("learner", "rollout", "rewards", "services", "tests", "deploy")
    found = {
        str(path.relative_to(ROOT)): ray_inits(path.read_text(encoding="utf-8"))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name, count in found.items() if count} == {"learner/runs/local_ray.py", "learner/runs/session.py"}
    assert ray_inits("import ray\nray.init(address='local')") == 1, "the control"


def open_starts(text: str) -> list[str]:
    """Lines that start Ray as a command, without the token's mode in front."""
    commands = re.findall(r"^\s*((?:[A-Z_]+=\S+ +)*ray start\b.*)$", text, re.MULTILINE)
    return [command for command in commands if "RAY_AUTH_MODE=token" not in command]


def test_instructions_start_ray_with_a_token() -> None:
    """README and docs; tests/deploy looks at deploy/."""
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert [(path.name, line) for path in texts for line in open_starts(path.read_text(encoding="utf-8"))] == []
    assert open_starts("first\n  RAY_X=1 ray start --head") == ["RAY_X=1 ray start --head"], "the control"
