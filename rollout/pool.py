"""The pool of rollout actors: starts them, hands them leases and evaluation chunks, replaces those that die.

It lives in the controller and never blocks longer than it is told to. What it reports, deliveries and losses, the
controller passes on to the replay buffer; which lease comes next is the ledger's decision.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rewards.errors import (
    ConfigError,
    DataError,
    TrajectoryError,
    UnmaskError,
    WaitTimeout,
    WeightMismatch,
    WorkerLost,
)
from rewards.task import Problem
from rollout.actor import ActorSettings, EvalReport, EvalResult, LeaseReport, RolloutActor, Weights
from rollout.trajectory import Lease, SamplerSpec
from rollout.waits import bounded_get, bounded_wait

# Repeating the task would end the same way.
FATAL = (ConfigError, DataError, TrajectoryError, WeightMismatch)

_REPORT_LIMIT_S = 60.0
_TICK_S = 1.0


@dataclass(frozen=True)
class Delivery:
    """A lease's report, and references to its trajectory groups in the lease's order."""

    report: LeaseReport
    refs: list[ray.ObjectRef]


@dataclass(frozen=True)
class ActorLost:
    """An actor died, failed or was given up; lease_id is what it was working on, if anything. It has been replaced."""

    actor_id: str
    lease_id: int | None
    error: str


class RolloutPool:
    """Starts the actors at once; ``wait_ready`` waits for them.

    Args:
        settings: what each actor is made of.
        size: number of actors.
        resources: what one actor asks of its node, by Ray's names ("CPU", "GPU", custom ones).
        threads: compute threads per actor (OMP_NUM_THREADS, which Ray would set to 1).
        start_timeout_s: seconds for an actor to be scheduled and to load its model.
        max_restarts: replacements in a row without any work delivered, per actor, before the pool gives up.
    """

    def __init__(
        self,
        settings: ActorSettings,
        *,
        size: int,
        resources: Mapping[str, float],
        threads: int,
        start_timeout_s: float,
        max_restarts: int,
    ) -> None:
        self._settings = settings
        self._resources = dict(resources)
        self._threads = threads
        self._start_timeout_s = start_timeout_s
        self._max_restarts = max_restarts
        self._workers: list[_Worker] = []
        self._started = 0
        self._failures = 0
        self._events: list[Delivery | ActorLost] = []
        self._evaluation = _Evaluation()
        self.set_size(size)

    def wait_ready(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Wait until all actors are ready, calling ``on_tick`` every second, which may raise.

        Raises:
            WaitTimeout: some are not ready after ``start_timeout_s``; the message names the missing resource.
            ConfigError: the model or task can't be had.
            WorkerLost: they die time and again while starting.
        """
        deadline = time.monotonic() + self._start_timeout_s
        while starting := [worker for worker in self._workers if worker.info is None]:
            if time.monotonic() >= deadline:
                raise WaitTimeout(self._not_ready(starting))
            on_tick()
            self._pump(_TICK_S)

    def idle(self) -> int:
        """Number of actors that could take a lease now."""
        return len(self._idle_workers())

    def submit(self, lease: Lease, sampler: SamplerSpec, weights: Weights) -> None:
        """Give the lease to an idle actor."""
        worker = self._idle_workers()[0]
        method = worker.handle.run_lease.options(num_returns=1 + len(lease.groups))
        worker.take(_Task(method.remote(lease, sampler, weights), weights, lease_id=lease.lease_id))

    def poll(self, timeout_s: float) -> list[Delivery | ActorLost]:
        """What has happened; waits up to ``timeout_s`` seconds for something to happen.

        Raises:
            ConfigError, DataError, TrajectoryError, WeightMismatch: from an actor; repeating the lease can't help.
            WorkerLost: too many actors had to be replaced in a row.
        """
        self._pump(0.0 if self._events else timeout_s)
        events, self._events = self._events, []
        return events

    def kill_lease(self, lease_id: int) -> None:
        """The lease timed out: take its actor for stuck, and replace it. Nothing happens if the lease isn't running."""
        for worker in self._workers:
            if worker.task is not None and worker.task.lease_id == lease_id:
                self._replace(worker, f"{worker.name} did not deliver lease {lease_id} in time")
                return

    def evaluate(
        self,
        problems: Sequence[Problem],
        sampler: SamplerSpec,
        weights: Weights,
        *,
        chunk_size: int,
        timeout_s: float,
        expire: Callable[[], Iterable[int]],
        samples: int = 1,
        on_chunk: Callable[[int, EvalReport], None] | None = None,
    ) -> list[EvalResult]:
        """``samples`` graded completions per problem, in the problems' order.

        The problems are cut into chunks of ``chunk_size``, whatever the number of actors, so the results don't depend
        on it. Running leases are finished first; what they deliver is kept for ``poll``.

        Args:
            timeout_s: seconds for one chunk; an actor that needs longer is replaced and the chunk repeated.
            expire: the ledger's ``expire``, called every tick; the leases it names are killed, so that a stuck actor
                can't block this. What it raises ends the evaluation.
            on_chunk: called with (chunk, its report) as soon as a chunk is finished, in any order.

        Raises: as ``poll`` does.
        """
        chunks = [problems[start : start + chunk_size] for start in range(0, len(problems), chunk_size)]
        self._evaluation = _Evaluation(deque(range(len(chunks))), on_chunk=on_chunk)
        while len(self._evaluation.results) < len(chunks):
            for worker in self._idle_workers()[: len(self._evaluation.waiting)]:
                chunk = self._evaluation.waiting.popleft()
                ref = worker.handle.evaluate.remote(chunks[chunk], sampler, weights, samples)
                worker.take(_Task([ref], weights, chunk=chunk), deadline=time.monotonic() + timeout_s)
            self._pump(_TICK_S)
            for lease_id in expire():
                self.kill_lease(lease_id)
        return [result for chunk in range(len(chunks)) for result in self._evaluation.results[chunk]]

    def set_size(self, size: int) -> None:
        """Start or retire actors; one with a lease finishes it first."""
        staying = [worker for worker in self._workers if not worker.retiring]
        for worker in staying[size:]:
            worker.retiring = True
            if worker.task is None:
                self._remove(worker)
        for _ in range(len(staying), size):
            worker = _Worker(f"rollout-{self._started}")
            self._started += 1
            self._workers.append(worker)
            self._start(worker)

    def workers(self) -> list[dict[str, Any]]:
        """The actors for the run store: id, state, lease, where they run, version held, restarts, last error."""
        return [
            {
                "actor_id": worker.name,
                "state": worker.state,
                "lease_id": worker.task.lease_id if worker.task else None,
                "busy_since": worker.task.since if worker.task else None,
                "policy_version": worker.version,
                "restarts": worker.restarts,
                "last_error": worker.last_error,
                **{key: (worker.info or {}).get(key) for key in ("pid", "host", "node_id", "code", "engine")},
            }
            for worker in self._workers
        ]

    def close(self) -> None:
        """Kill all actors; their graders die with them."""
        for worker in list(self._workers):
            self._remove(worker)

    def _pump(self, timeout_s: float) -> None:
        """Wait for an answer, then settle all that are there and replace the actors that are overdue."""
        awaited = [worker.awaited for worker in self._workers if worker.awaited is not None]
        assert awaited or timeout_s == 0, "waiting for actors that have nothing to do: it would never end"
        done, _ = bounded_wait(awaited, who="rollout actors", timeout_s=timeout_s)
        if done:
            done, _ = bounded_wait(awaited, who="rollout actors", timeout_s=0.0, num_returns=len(awaited))
        for worker in list(self._workers):
            if worker.awaited is not None and worker.awaited in done:
                self._settle(worker, worker.awaited)
            elif time.monotonic() >= worker.deadline:
                late = self._not_ready([worker]) if worker.info is None else f"{worker.name} did not evaluate in time"
                self._replace(worker, late)

    def _settle(self, worker: "_Worker", answered: ray.ObjectRef) -> None:
        try:
            answer = bounded_get(answered, who=worker.name, timeout_s=_REPORT_LIMIT_S)
        except FATAL:
            raise
        except (UnmaskError, ray.exceptions.RayError) as error:
            self._replace(worker, f"{worker.name} was lost: {_sentence(error)}")
            return
        task = worker.finish()
        if task is None:
            worker.info = answer
            return
        self._failures = 0
        worker.version = task.weights.version
        if task.chunk is not None:
            self._evaluation.take(task.chunk, answer)
        else:
            _check_weights(answer, task.weights)
            self._events.append(Delivery(answer, task.refs[1:]))
        if worker.retiring:
            self._remove(worker)

    def _replace(self, worker: "_Worker", error: str) -> None:
        task = worker.task
        if task is not None and task.chunk is not None:
            self._evaluation.waiting.appendleft(task.chunk)
        self._events.append(ActorLost(worker.name, task.lease_id if task else None, error))
        self._failures += 1
        if self._failures > self._max_restarts * len(self._workers):
            raise WorkerLost(f"{self._failures} rollout actors in a row were lost without any work done; last: {error}")
        if worker.retiring:
            self._remove(worker)
            return
        _kill(worker)
        worker.restarts += 1
        worker.last_error = error
        self._start(worker)

    def _start(self, worker: "_Worker") -> None:
        custom = {name: amount for name, amount in self._resources.items() if name not in ("CPU", "GPU")}
        # Ray neither restarts the actor nor repeats its tasks: that is decided, and counted, here and in the ledger.
        actor_class = ray.remote(RolloutActor).options(
            num_cpus=self._resources.get("CPU", 0),
            num_gpus=self._resources.get("GPU", 0),
            resources=custom,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        )
        worker.begin(actor_class.remote(worker.name, self._settings), time.monotonic() + self._start_timeout_s)

    def _remove(self, worker: "_Worker") -> None:
        _kill(worker)
        self._workers.remove(worker)

    def _idle_workers(self) -> list["_Worker"]:
        return [worker for worker in self._workers if worker.state == "idle"]

    def _not_ready(self, workers: Sequence["_Worker"]) -> str:
        free, total = ray.available_resources(), ray.cluster_resources()
        short = [
            f"{name} ({amount:g} asked for by each, {free.get(name, 0):g} of {total.get(name, 0):g} free)"
            for name, amount in self._resources.items()
            if free.get(name, 0) < amount
        ]
        if short:
            why = f"the cluster is short of {', '.join(short)}; start fewer actors or learner ranks, or add nodes"
        else:
            why = "loading takes longer, or no single node has all that an actor asks for; raise the time limit"
        names = ", ".join(worker.name for worker in workers)
        return f"{names} did not start within {self._start_timeout_s:g} s: {why}"


@dataclass(frozen=True, eq=False)
class _Task:
    refs: list[ray.ObjectRef]  # the first one is awaited
    weights: Weights
    lease_id: int | None = None
    chunk: int | None = None
    since: float = field(default_factory=time.time)


@dataclass(eq=False)
class _Worker:
    """A place in the pool; the actor in it may change."""

    name: str
    handle: Any = None
    info: dict[str, Any] | None = None  # what the actor said when it was ready
    awaited: ray.ObjectRef | None = None
    deadline: float = math.inf  # of what is awaited; a lease's is kept by the ledger
    task: _Task | None = None
    version: int | None = None
    restarts: int = 0
    last_error: str | None = None
    retiring: bool = False

    @property
    def state(self) -> str:
        if self.info is None:
            return "starting"
        if self.task is not None:
            return "busy"
        return "idle"

    def begin(self, handle: Any, deadline: float) -> None:
        self.handle = handle
        self.info = self.task = self.version = None
        self.awaited, self.deadline = handle.start.remote(), deadline

    def take(self, task: _Task, deadline: float = math.inf) -> None:
        self.task, self.awaited, self.deadline = task, task.refs[0], deadline

    def finish(self) -> _Task | None:
        task, self.task, self.awaited, self.deadline = self.task, None, None, math.inf
        return task


@dataclass(eq=False)
class _Evaluation:
    waiting: deque[int] = field(default_factory=deque)  # chunks without an actor
    results: dict[int, list[EvalResult]] = field(default_factory=dict)
    on_chunk: Callable[[int, EvalReport], None] | None = None

    def take(self, chunk: int, report: EvalReport) -> None:
        self.results[chunk] = report.results
        if self.on_chunk is not None:
            self.on_chunk(chunk, report)


def _check_weights(report: LeaseReport, weights: Weights) -> None:
    if (report.policy_version, report.adapter_digest) != (weights.version, weights.digest):
        raise WeightMismatch(
            f"lease {report.lease_id} was drawn with version {report.policy_version} ({report.adapter_digest[:12]}), "
            f"given out was version {weights.version} ({weights.digest[:12]})"
        )


def _kill(worker: _Worker) -> None:
    ray.kill(worker.handle, no_restart=True)


def _sentence(error: Exception) -> str:
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"
