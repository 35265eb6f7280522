"""Faults that are done to a run's processes, and what came of each."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.real_runs import (
    StartedRun,
    command_line,
    iterations,
    session_members,
    store_events,
    workers_of,
)

HOW = {
    "killed": signal.SIGKILL,
    "exits": signal.SIGTERM,
    "segfaults": signal.SIGSEGV,
    "hangs": signal.SIGSTOP,
}
LIMIT_S = 240.0
"""Until work has to go on after a fault."""
_LOOK_S = 0.1


def _members(run: StartedRun) -> list[int]:
    return [pid for leader in workers_of(run) for pid in session_members(leader)]


def _titled(title: str) -> Callable[[StartedRun], list[int]]:
    return lambda run: [pid for pid in _members(run) if command_line(pid).startswith(title)]


def _program(name: str) -> Callable[[StartedRun], list[int]]:
    return lambda run: [pid for pid in _members(run) if command_line(pid).split(" ")[0].endswith(name)]


def _graders(run: StartedRun) -> list[int]:
    """Each leads a session of its own, below an actor."""
    actors = set(TARGETS["actor"](run))
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent in actors and "-c" in command_line(int(name)):
            found.append(int(name))
    return found


TARGETS: dict[str, Callable[[StartedRun], list[int]]] = {
    "actor": _titled("ray::RolloutActor"),
    "rank": _titled("ray::LearnerRank"),
    "grader": _graders,
    "controller": workers_of,
    "gcs": _program("gcs_server"),
    "raylet": _program("raylet/raylet"),
}


@dataclass(frozen=True)
class Injected:
    """A fault, and what came of it. Times in seconds since it was done."""

    part: str
    how: str
    iteration: int
    """The newest finished one then."""
    noticed_s: float | None
    """Until an event told of it; None where none did."""
    went_on_s: float | None
    """Until another iteration than those before it was finished, or the run; None when that didn't come."""
    repeated: int
    """Iterations, finished before, that were done again."""


def inject(run: StartedRun, part: str, how: str, draw: random.Random) -> Injected | None:
    """Do it, and wait until work has gone on; None where there was no such process."""
    if not (found := TARGETS[part](run)):
        return None
    before, begin = _last(run), time.time()
    os.kill(draw.choice(found), HOW[how])
    # Two more iterations: the first may have been on its way.
    while not (done := _last(run) >= before + 2) and run.popen.poll() is None and time.time() - begin < LIMIT_S:
        time.sleep(_LOOK_S)
    went_on_s = time.time() - begin if done or run.popen.poll() == 0 else None
    told = [event["time"] for event in store_events(run.dir) if event["level"] != "info" and event["time"] >= begin]
    resumed = [event for event in store_events(run.dir) if event["kind"] == "resume" and event["time"] >= begin]
    again = before - _resumed_after(resumed) if resumed else 0
    return Injected(part, how, before, min(told) - begin if told else None, went_on_s, max(0, again))


def _last(run: StartedRun) -> int:
    return max(iterations(run.dir), default=0)


def _resumed_after(events: Sequence[dict[str, Any]]) -> int:
    return int(str(events[-1]["text"]).rpartition(" ")[2])
