"""``ray start --head``, then ``ray job submit --working-dir . -- python -m learner.main ...``, as the README says."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.runs.directory import RunDirectory
from services.store import schema
from tests.support import store_rows
from tests.support.real_runs import (
    RUN_LIMIT_S,
    SETTINGS,
    TEST_PROCESS,
    Runs,
    clean_environment,
    iterations,
    send,
    summary,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("learner", "rollout", "rewards", "services")
START_LIMIT_S = 120.0
MARK = "UNMASK_TEST_HEAD"


class Head:
    """A Ray head of ours, in a session of its own. Everything of it lies below ``folder``."""

    def __init__(self, folder: Path, *, token: bool) -> None:
        self.folder, self.log = folder, folder / "ray.out"
        self.settings = () if token else ("resources.ray_insecure=true",)
        """What a run needs to join it."""
        self.port, self.dashboard, *others = free_ports(9)
        # Jobs run whatever `python` is on the head's PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = clean_environment() | {
            "PATH": path,
            "RAY_AUTH_MODE": "token" if token else "disabled",
            MARK: str(folder),  # inherited by all that comes of this head
        }
        if token:
            self._make_token()
        names = ("ray-client-server-port", "node-manager-port", "object-manager-port", "runtime-env-agent-port")
        names += ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        ports = [f"--{name}={port}" for name, port in zip(names, others, strict=True)]
        command = ["ray", "start", "--head", "--block", f"--port={self.port}", f"--dashboard-port={self.dashboard}"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=true", "--num-cpus=4", "--disable-usage-stats"]
        command += [f"--temp-dir={folder}/ray", "--object-store-memory=200000000", *ports]
        with self.log.open("wb") as file:
            self.popen = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def address(self) -> dict[str, str]:
        """Environment of a shell that speaks to this head."""
        return {
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }

    def wait_ready(self) -> None:
        def answers() -> bool:
            assert self.popen.poll() is None, self.log.read_text()
            return self.ray("job", "list").returncode == 0

        wait_until(answers, "the head's answer", START_LIMIT_S)

    def ray(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """The ``ray`` command in a shell that speaks to this head."""
        return subprocess.run(
            ["ray", *arguments],
            cwd=cwd or self.folder,
            env=self.environment | self.address | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
        )

    def submit(self, checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``ray job submit`` of a run with these arguments, from a checkout; waits for its end."""
        job = ("python", "-m", "learner.main", *SETTINGS, *self.settings, *arguments)
        return self.ray("job", "submit", "--working-dir", ".", "--", *job, cwd=checkout)

    def close(self) -> None:
        """End what this head started and nothing else: never ``ray stop``, which takes every Ray of the machine."""
        send(signal.SIGTERM, [self.popen.pid])
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)

        def gone() -> bool:
            send(signal.SIGKILL, self.processes())
            return not self.processes()

        wait_until(gone, "the end of the head", 30)
        self.popen.wait(timeout=30)

    def processes(self) -> list[int]:
        """All that comes of this head, whatever session it is in."""
        mark, found = f"{MARK}={self.folder}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def _make_token(self) -> None:
        home = self.environment | {"HOME": str(self.folder)}
        subprocess.run(["ray", "get-auth-token", "--generate"], env=home, capture_output=True, check=True, timeout=60)
        token = self.folder / ".ray" / "auth_token"
        token.chmod(0o600)
        self.environment["RAY_AUTH_TOKEN_PATH"] = str(token)


_ports = itertools.count(31100 + 400 * (TEST_PROCESS % 4))


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives away (32768 and above), so that no connection takes one before it is used."""
    found: list[int] = []
    while len(found) < count:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


@pytest.fixture(scope="module", params=[pytest.param("disabled", marks=pytest.mark.heavy), "token"])
def head(request: pytest.FixtureRequest) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="unmask-", dir="/tmp"))  # short: sockets lie in it
    started = Head(folder, token=request.param == "token")
    try:
        started.wait_ready()
        assert len(started.processes()) > 3  # the search that close() relies on finds them
        yield started
    finally:
        started.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout holds of the code. Ray leaves out what .gitignore names; a copy leaves out the rest too."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_submitted_run_leaves_everything_where_the_user_asked(
    head: Head, checkout: Path, runs: Runs, undisturbed: RunDirectory, tmp_path: Path
) -> None:
    answer = head.submit(checkout, f"run.dir={tmp_path}/asked", "run.name=job", f"model.cache_dir={runs.cache}")
    told = answer.stdout + answer.stderr
    assert answer.returncode == 0, told
    assert re.search(rf"joined the Ray cluster at [\d.]+:{head.port}; ", told), told
    assert f"everything is in {tmp_path}/asked/job" in told

    run_dir = RunDirectory(tmp_path / "asked" / "job")
    assert iterations(run_dir) == [1, 2, 3, 4, 5, 6]
    assert summary(run_dir) == summary(undisturbed)
    for left in ("config.json", "plots/reward.png", "adapter/adapter_model.safetensors", "checkpoints"):
        assert (run_dir.path / left).exists(), left
    engine = schema.open_engine(run_dir.store_url, create=False)
    assert [run["status"] for run in store_rows.list_runs(engine)] == ["finished"]
    engine.dispose()
    assert not (checkout / "runs").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("head", ["disabled"], indirect=True)
def test_a_ray_that_lets_everybody_in_is_refused(head: Head, checkout: Path, runs: Runs, tmp_path: Path) -> None:
    told = []
    arguments = (f"run.dir={tmp_path}/asked", f"model.cache_dir={runs.cache}", "resources.ray_insecure=false")
    answer = head.submit(checkout, *arguments)
    assert answer.returncode != 0
    told.append(answer.stdout + answer.stderr)
    with runs.started("open", forked=False, **(head.environment | head.address)) as run:
        assert run.wait() == 2, run.output()
        told.append(run.output())
    for text in told:
        assert re.search(rf"the Ray cluster at [\d.]+:{head.port} has no authentication", text), text
        assert "set resources.ray_insecure=true" in text and "Traceback (most recent call last)" not in text, text


@pytest.mark.parametrize("head", ["token"], indirect=True)
def test_relative_run_directory_inside_a_job_is_refused(head: Head, checkout: Path, runs: Runs) -> None:
    answer = head.submit(checkout, "run.dir=runs", f"model.cache_dir={runs.cache}")
    told = answer.stdout + answer.stderr
    assert answer.returncode != 0
    assert "run.dir=runs is relative" in told and "give an absolute path" in told
    assert "Traceback (most recent call last)" not in told, told


@pytest.mark.parametrize("head", ["token"], indirect=True)
def test_run_that_asks_for_more_than_the_cluster_has_is_refused(head: Head, runs: Runs) -> None:
    environment = head.environment | head.address
    with runs.started("too-much", "learner.ranks=8", forked=False, **environment) as run:
        assert run.wait() == 2, run.output()
    assert "learner.ranks=8 and rollout.actors=1 ask for 9 CPUs and Ray has 4" in run.output()
    assert "Traceback" not in run.output()


def test_only_who_has_the_token_gets_in(head: Head, runs: Runs) -> None:
    if head.environment["RAY_AUTH_MODE"] != "token":
        assert head.ray("job", "list").returncode == 0
        return
    assert Path(head.environment["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600
    no_token = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}
    assert head.ray("job", "list", **no_token).returncode != 0
    with runs.started("no-token", forked=False, **(head.environment | head.address | no_token)) as run:
        assert run.wait() == 2, run.output()
    assert "no Ray answers at" in run.output() and "Traceback" not in run.output()
