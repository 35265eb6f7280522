"""The places of a rollout pool, and what the actors in them are doing."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from rollout.messages import EvalReport, EvalResult, Weights

STATES = ("starting", "idle", "busy")
"""Of a place, in the order in which a pool gives them up."""


@dataclass(frozen=True, eq=False)
class Task:
    """What an actor was asked: a lease, a chunk of an evaluation, or (neither) to start."""

    refs: list[ray.ObjectRef[Any]]  # the first one is awaited
    weights: Weights
    lease_id: int | None = None
    chunk: int | None = None
    since: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return f"lease {self.lease_id}" if self.chunk is None else "evaluation"


@dataclass(eq=False)
class Place:
    """A place in the pool; the actor in it may change."""

    name: str
    handle: Any = None
    info: dict[str, Any] | None = None  # what the actor said when it was ready
    awaited: ray.ObjectRef[Any] | None = None
    deadline: float = math.inf  # of what is awaited; a lease's is kept by the ledger
    task: Task | None = None
    version: int | None = None
    began: float = 0.0  # Unix seconds, as are all times that people see
    heard: float | None = None  # its last answer; None while it starts
    restarts: int = 0
    last_error: str | None = None
    retiring: bool = False
    on_trial: bool = False  # new in a pool that grows, and not ready yet
    limit_s: float = math.inf  # for its start

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
            return "start", self.began
        return None if self.task is None else (self.task.name, self.task.since)

    def begin(self, handle: Any, limit_s: float) -> None:
        self.handle, self.began = handle, time.time()
        self.info = self.task = self.version = self.heard = None
        self.limit_s = limit_s
        self.awaited, self.deadline = handle.start.remote(), time.monotonic() + limit_s

    def take(self, task: Task, deadline: float = math.inf) -> None:
        self.task, self.awaited, self.deadline = task, task.refs[0], deadline

    def finish(self) -> Task | None:
        """It has answered; what it was asked."""
        self.heard = time.time()
        task, self.task, self.awaited, self.deadline = self.task, None, None, math.inf
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
