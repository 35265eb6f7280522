"""Two Ctrl-C end a run at once and leave nothing that it started: ranks, actors, Ray's daemons, graders, the sandbox.

This process adopts what loses its parent, so whatever a run leaves behind is found, in sessions of its own too.
"""

import contextlib
import ctypes
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.real_runs import Runs, command_line, send, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

_CHILD_SUBREAPER = 36
END_LIMIT_S = 90.0
"""From the second signal on; a quiet machine needs three."""


class Family:
    """The live processes below this one that weren't there before."""

    def __init__(self) -> None:
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}

    def members(self) -> dict[int, str]:
        """Command lines by process id."""
        found = {}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in self._before and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = command_line(process.pid)
        return found

    def has(self, *parts: str) -> bool:
        lines = self.members().values()
        return all(any(part in line for line in lines) for part in parts)


@pytest.fixture
def family() -> Iterator[Family]:
    libc = ctypes.CDLL(None)
    assert libc.prctl(_CHILD_SUBREAPER, 1) == 0
    found = Family()
    try:
        yield found
    finally:
        send(signal.SIGKILL, [*found.members()])
        libc.prctl(_CHILD_SUBREAPER, 0)


WORKING = ("gcs_server", "raylet", "RuntimeEnvAgent", "ray::LearnerRank", "ray::RolloutActor", "--task mbpp", "sandbox")
STARTING = ("gcs_server", "raylet/raylet")


@pytest.mark.parametrize(
    "awaited", [WORKING, pytest.param(STARTING, marks=pytest.mark.heavy)], ids=["in an iteration", "while Ray starts"]
)
@pytest.mark.heavy
def test_two_ctrl_c_leave_no_process(
    awaited: tuple[str, ...], runs: Runs, family: Family, tiny_model: str, tmp_path: Path
) -> None:
    problems = tmp_path / "problems.jsonl"
    rows = [{"text": f"Add {n}.", "test_list": [f"assert add({n}, 2) == {n + 2}"]} for n in range(64)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        *("task.name=mbpp", f"task.train_path={problems}", f"task.test_path={problems}", f"model.path={tiny_model}"),
        *("rollout.grade_timeout_s=18", "run.iterations=10000", "checkpoint.every=10000", "evaluation.every=0"),
    )
    with runs.started(f"interrupted-{len(awaited)}", *settings, forked=False) as run:
        run.wait_for("all of its processes", lambda: family.has(*awaited))
        for _ in range(2):
            os.killpg(run.popen.pid, signal.SIGINT)  # as the terminal does
            time.sleep(1.0)  # a busy process takes two that come at once for one
        assert run.wait(END_LIMIT_S) == 128 + signal.SIGINT, run.output()
        wait_until(
            lambda: not any(pid != run.popen.pid for pid in family.members()), f"the end of {family.members()}", 10
        )
    told = run.output()
    assert "SIGINT" in told and "Traceback" not in told
