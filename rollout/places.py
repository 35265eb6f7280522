"""The places of a rollout pool, and what the actors in them are doing."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from rewards.errors import WorkerLost
from rollout.messages import EvalReport, EvalResult, Weights
from rollout.pulse import Pulse, Trouble
from rollout.trajectory import Lease, SamplerSpec

STATES = ("starting", "idle", "busy")
"""Of a place, in the order in which a pool gives them up."""


@dataclass(frozen=True, eq=False)
class Task:
    """What an actor was asked: a lease, or a chunk of an evaluation."""

    refs: list[ray.ObjectRef[Any]]  # the first one is awaited
    weights: Weights
    sampler: SamplerSpec
    lease: Lease | None = None
    chunk: int | None = None
    since: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return "evaluation" if self.lease is None else f"lease {self.lease.lease_id}"

    @property
    def late(self) -> str:
        """What is said of an actor whose time for it is over."""
        return "did not evaluate in time" if self.lease is None else f"did not deliver {self.name} in time"


@dataclass(eq=False)
class Place:
    """A place in the pool; the actor in it may change."""

    name: str
    handle: Any = None
    info: dict[str, Any] | None = None  # what the actor said when it was ready
    awaited: ray.ObjectRef[Any] | None = None
    deadline: float = math.inf  # of what is awaited
    task: Task | None = None
    version: int | None = None
    began: float = 0.0  # Unix seconds, as are all times that people see
    heard: float | None = None  # its last answer; None while it starts
    restarts: int = 0
    last_error: str | None = None
    retiring: bool = False
    on_trial: bool = False  # new in a pool that grows, and not ready yet
    placed: bool = False  # Ray has found room for it
    limit_s: float = math.inf  # for its start, once it has room
    pulse: Pulse | None = None
    pace_s: float | None = None  # seconds for a group of its newest lease
    refused: int = 0  # deliveries of this actor
    leaving: float | None = None  # when its node goes, Unix seconds; 0: nobody said

    @property
    def state(self) -> str:
        if self.info is None:
            return "starting"
        if self.task is not None:
            return "busy"
        return "idle"

    @property
    def doing(self) -> tuple[str, float] | None:
        """What it was asked, and when."""
        if self.info is None:
            return "start", self.began  # or waits for room
        return None if self.task is None else (self.task.name, self.task.since)

    @property
    def lease_id(self) -> int | None:
        return None if self.task is None or self.task.lease is None else self.task.lease.lease_id

    @property
    def node_id(self) -> str:
        """Empty as long as it isn't known."""
        return str((self.info or {}).get("node_id") or "")

    def told(self) -> dict[str, Any]:
        """For the run store, see ``RolloutPool.workers``."""
        return {
            "actor_id": self.name,
            "state": self.state,
            "lease_id": self.lease_id,
            "doing": self.doing,
            "began": self.began,
            "heard": self.heard,
            "policy_version": self.version,
            "restarts": self.restarts,
            "last_error": self.last_error,
            **{key: (self.info or {}).get(key) for key in ("pid", "host", "node_id", "code", "engine", "usage")},
        }

    def begin(self, handle: Any, limit_s: float) -> None:
        """An actor that waits for room; on trial it may do so no longer than its start may take in all."""
        self.handle, self.began, self.limit_s = handle, time.time(), limit_s
        self.info = self.task = self.version = self.heard = self.pulse = self.pace_s = self.leaving = None
        self.refused, self.placed = 0, False
        self.awaited = handle.ping.remote()
        self.deadline = time.monotonic() + limit_s if self.on_trial else math.inf

    def has_room(self) -> None:
        """Its process is there, and loads its model."""
        self.placed, self.awaited = True, self.handle.start.remote()
        self.deadline = min(self.deadline, time.monotonic() + self.limit_s)

    def is_ready(self, info: dict[str, Any], heartbeat_s: float) -> None:
        self.info, self.on_trial = info, False
        # Not while it starts: to load a model may hold Python's lock for long.
        self.pulse = Pulse(self.handle, heartbeat_s)

    def trouble(self) -> Trouble | None:
        """What is wrong with its process, at work or idle; None: it answers, or starts."""
        return None if self.pulse is None else self.pulse.trouble(self.name)

    def take(self, task: Task, deadline: float) -> None:
        self.task, self.awaited, self.deadline = task, task.refs[0], deadline

    def finish(self) -> Task | None:
        """It has answered; what it was asked, None for its start."""
        self.heard = time.time()
        task, self.task, self.awaited, self.deadline = self.task, None, None, math.inf
        if task is not None and task.lease is not None:
            self.pace_s = (time.monotonic() - task.began) / len(task.lease.groups)
        return task


@dataclass(eq=False)
class Evaluation:
    """An evaluation under way, cut into chunks."""

    waiting: deque[int] = field(default_factory=deque)  # chunks without an actor
    results: dict[int, list[EvalResult]] = field(default_factory=dict)
    on_chunk: Callable[[int, EvalReport], None] | None = None

    def take(self, chunk: int, report: EvalReport) -> None:
        self.results[chunk] = report.results
        if self.on_chunk is not None:
            self.on_chunk(chunk, report)


@dataclass(eq=False)
class Resize:
    """A change of the pool's size while it works: under way until ``over``."""

    size: int
    before: int
    over: bool = False
    error: str | None = None
    """Why the size that was there ``before`` is kept."""


class Failures:
    """Actors that were lost, or deliveries refused, in a row: without any work done in between.

    Args:
        of_each: how many of them an actor may have.
    """

    def __init__(self, of_each: int) -> None:
        self._of_each, self._count = of_each, 0

    def over(self) -> None:
        """Work was done."""
        self._count = 0

    def note(self, error: str, actors: int) -> None:
        """One more. Raises WorkerLost when that is too many for so many actors."""
        self._count += 1
        if self._count > self._of_each * max(1, actors):
            raise WorkerLost(f"{self._count} rollout actors in a row were lost without any work done; last: {error}")
