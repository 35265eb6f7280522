"""Whole runs: a process of ``learner.main`` (or ``learner.sft``) each, with a Ray of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from learner.reporting.metrics_file import read_rows
from learner.runs.directory import RunDirectory
from rollout.adapters import digest, read_peft_folder
from services.store import schema
from tests.support import store_rows
from tests.support.forked import Forked
from tests.support.metrics_rows import deterministic

TEST_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Number of this process among those of the test session."""

RUN_LIMIT_S = 300.0
"""For one run on two busy cores; a quiet machine needs half a minute, nearly all of it imports and Ray."""

SETTINGS = ("recipe=smoke", "run.iterations=6", "evaluation.every=2", "rollout.actors=1")
"""One actor where a test doesn't say otherwise: each costs five seconds of imports, and none changes a bit."""

LEDGER_STATES = ("pending", "leased", "ready", "consumed", "dropped")


class Runs:
    """Runs side by side in one folder, with one cache of bases."""

    def __init__(
        self, folder: Path, cache: Path, *, settings: Sequence[str] = SETTINGS, module: str = "learner.main"
    ) -> None:
        self.folder, self.cache, self._settings, self._module = folder, cache, settings, module

    def __getitem__(self, name: str) -> RunDirectory:
        return RunDirectory(self.folder / name)

    def train(
        self, name: str, *arguments: str, status: int = 0, limit_s: float = RUN_LIMIT_S, forked: bool = True
    ) -> str:
        """A run from its start to its end, which must have this exit status; what it printed."""
        with self.started(name, *arguments, forked=forked) as run:
            assert run.wait(limit_s) == status, run.output()
        return run.output()

    @contextlib.contextmanager
    def started(self, name: str, *arguments: str, forked: bool = True, **environment: str) -> Iterator["StartedRun"]:
        """A run under way; with the block, whatever is left of it ends.

        ``forked=False``: as a user starts it, which takes five seconds of CPU more. It is the same otherwise, but for
        variables that Ray reads when it is imported: ``undisturbed`` is started so, and has the bits of forked runs.
        """
        settings = [*self._settings, f"run.dir={self.folder}", f"run.name={name}", *arguments]
        output = self.folder / f"{name}-{time.monotonic_ns()}.out"
        environment = clean_environment() | {"UNMASK_CACHE": str(self.cache)} | environment
        popen: Forked | subprocess.Popen[bytes]
        if forked:
            popen = Forked(self._module, settings, cwd=self.folder, environment=environment, output=output)
        else:
            with output.open("wb") as file:
                popen = subprocess.Popen(
                    [sys.executable, "-m", self._module, *settings],
                    cwd=self.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        try:
            yield StartedRun(popen, self[name], output)
        finally:
            kill_session(popen.pid)
            popen.wait(timeout=60)


class StartedRun:
    """The controller's process, which leads a session, and all that it starts."""

    def __init__(self, popen: Forked | subprocess.Popen[bytes], run_dir: RunDirectory, output: Path) -> None:
        self.popen, self.dir, self._output = popen, run_dir, output

    def output(self) -> str:
        """Everything printed so far, standard error included."""
        return self._output.read_text(errors="replace")

    def wait(self, timeout_s: float = RUN_LIMIT_S) -> int:
        """The exit status."""
        try:
            return self.popen.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end within {timeout_s:g} s: {self.output()}") from None

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. The run must not end before."""

        def met_or_over() -> bool:
            return condition() or self.popen.poll() is not None

        wait_until(met_or_over, f"{what} of {self.dir.id}", RUN_LIMIT_S)
        assert condition(), f"the run ended before there was {what}: {self.output()}"

    def wait_for_row(self, iteration: int) -> None:
        """Wait until metrics.jsonl shows this iteration: the run is then in the middle of the next one."""
        self.wait_for(f"a row of iteration {iteration}", lambda: iteration in iterations(self.dir))

    def members(self) -> list[int]:
        """Process ids of the controller and all that it started, graders aside."""
        return session_members(self.popen.pid)

    def working(self) -> list[int]:
        """The members without two agents of Ray's that need a minute to see that they are alone."""
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        return [pid for pid in self.members() if not command_line(pid).startswith(agents)]

    def actors(self) -> list[int]:
        """Process ids of the rollout actors, the first of the pool first."""
        return self._processes("ray::RolloutActor")

    def ranks(self) -> list[int]:
        """Process ids of the learner ranks."""
        return self._processes("ray::LearnerRank")

    def both(self) -> list[int]:
        """Process ids of those that are rollout actor and learner rank."""
        return self._processes("ray::OneProcess")

    def _processes(self, title: str) -> list[int]:
        return [pid for pid in self.members() if command_line(pid).startswith(title)]


def rows(run_dir: RunDirectory) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without times and machine figures."""
    return [deterministic(row) for row in read_rows(run_dir.metrics_path)]


def training_rows(run_dir: RunDirectory) -> list[dict[str, Any]]:
    """Rows of finished iterations, whole; evaluations have rows of their own."""
    return [row for row in read_rows(run_dir.metrics_path) if "loss" in row]


def iterations(run_dir: RunDirectory) -> list[int]:
    return [row["iteration"] for row in training_rows(run_dir)]


def summary(run_dir: RunDirectory) -> dict[str, Any]:
    """summary.json without times."""
    found = json.loads(run_dir.summary_path.read_text())
    return {key: value for key, value in found.items() if not key.endswith("_seconds")}


def saved_iterations(run_dir: RunDirectory) -> list[int]:
    """Iterations of the checkpoints that are there."""
    return [int(path.name.rpartition("-")[2]) for path in sorted(run_dir.checkpoints_dir.glob("iteration-*"))]


def newest_state(run_dir: RunDirectory) -> dict[str, Any]:
    """state.json of the newest checkpoint."""
    newest = max(run_dir.checkpoints_dir.glob("iteration-*"))
    return json.loads((newest / "state.json").read_text())


def assert_ledger_balances(run_dir: RunDirectory) -> None:
    for row in training_rows(run_dir):
        assert row["ledger/issued"] == sum(row[f"ledger/{state}"] for state in LEDGER_STATES), row
        assert row["ledger/dropped"] == 0
        assert row["ledger/consumed"] == 4 * row["iteration"]  # 4 groups an iteration


def clean_environment() -> dict[str, str]:
    """Ours without what would lead to a Ray that is there already."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # Passive: threads that spin while they wait for each other make the base's training 20 times slower on busy cores.
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    looked = time.thread_time()
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout_s:g} s"
        # A tenth of a core at most: what is waited for wants the cores, and some conditions open a store.
        time.sleep(max(0.02, 9 * (time.thread_time() - looked)))
        looked = time.thread_time()


def session_members(leader: int) -> list[int]:
    """Live processes of the session, by age."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            state, session, start = after_name[0], int(after_name[3]), int(after_name[19])
            if session == leader and state not in "ZX":
                found.append((start, int(folder.name)))
    return [pid for _, pid in sorted(found)]


def kill_session(leader: int, timeout_s: float = 30.0) -> None:
    """SIGKILL every process of the session, again and again until there is none: some may be starting others."""

    def gone() -> bool:
        members = session_members(leader)
        send(signal.SIGKILL, members)
        return not members

    wait_until(gone, f"the end of session {leader}", timeout_s)


def workers_of(run: StartedRun) -> list[int]:
    """Process ids of the process that works for a run with ``run.restarts``, which leads a session of its own; none
    between two starts."""
    named = f"run.name={run.dir.id}"
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    lead = [pid for pid in pids if named in command_line(pid) and pid != run.popen.pid]
    return [pid for pid in lead if "run.restarts=0" in command_line(pid) and os.getsid(pid) == pid]


def adapter_digest(run_dir: RunDirectory) -> str:
    return digest(read_peft_folder(run_dir.adapter_dir)[0])


def store_status(run_dir: RunDirectory) -> tuple[str, int]:
    """The run's status, and how often it was started."""
    engine = schema.open_engine(run_dir.store_url, create=False)
    (run,) = store_rows.list_runs(engine)
    engine.dispose()
    return run["status"], run["starts"]


def store_events(run_dir: RunDirectory) -> list[dict[str, Any]]:
    engine = schema.open_engine(run_dir.store_url, create=False)
    events = store_rows.list_events(engine, run_dir.id)
    engine.dispose()
    return events


def send(signum: int, pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
