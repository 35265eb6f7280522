"""The pool of rollout actors: starts them, hands them leases and evaluation chunks, replaces those that die.

It lives in the controller and never blocks longer than it is told to. What it reports, deliveries and losses, the
controller passes on to the replay buffer; which lease comes next is the ledger's decision.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from rollout.actor import ActorSettings, RolloutActor
from rollout.messages import EvalReport, EvalResult, LeaseReport, Weights
from rollout.places import STATES, Evaluation, Place, Task
from rollout.trajectory import BranchSpec, Lease, SamplerSpec
from rollout.waits import bounded_get, bounded_wait, end_actor

# Repeating the task would end the same way.
FATAL = (ConfigError, DataError, TrajectoryError, WeightMismatch)

_REPORT_LIMIT_S = 60.0
_TICK_S = 1.0


@dataclass(frozen=True)
class Delivery:
    """A lease's report, and references to its trajectory groups in the lease's order."""

    report: LeaseReport
    refs: list[ray.ObjectRef[Any]]


@dataclass(frozen=True)
class ActorLost:
    """An actor died, failed or was given up; lease_id is what it was working on, if anything. It has been replaced."""

    actor_id: str
    lease_id: int | None
    error: str


@dataclass(eq=False)
class Resize:
    """A change of the pool's size while it works: under way until ``over``."""

    size: int
    before: int
    over: bool = False
    error: str | None = None
    """Why the size that was there ``before`` is kept."""


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

    actor_class: type = RolloutActor
    """What is started in each place, with its name and ``settings``."""

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
        self._places: list[Place] = []
        self._started = 0
        self._failures = 0
        self._events: list[Delivery | ActorLost] = []
        self._evaluation = Evaluation()
        self._resize: Resize | None = None
        self.set_size(size)

    def wait_ready(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Wait until all actors are ready, calling ``on_tick`` every second, which may raise.

        Raises:
            WaitTimeout: some are not ready after ``start_timeout_s``; the message names the missing resource.
            ConfigError: the model or task can't be had.
            WorkerLost: they die time and again while starting.
        """
        deadline = time.monotonic() + self._start_timeout_s
        while starting := [place for place in self._places if place.info is None]:
            if time.monotonic() >= deadline:
                raise WaitTimeout(self._not_ready(starting))
            on_tick()
            self._pump(_TICK_S)

    def idle(self) -> int:
        """Number of actors that could take a lease now."""
        return len(self._idle_places())

    def submit(self, lease: Lease, sampler: SamplerSpec, weights: Weights, branches: BranchSpec | None = None) -> None:
        """Give the lease to an idle actor."""
        place = self._idle_places()[0]
        method = place.handle.run_lease.options(num_returns=1 + len(lease.groups))
        place.take(Task(method.remote(lease, sampler, weights, branches), weights, lease_id=lease.lease_id))

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
        for place in self._places:
            if place.task is not None and place.task.lease_id == lease_id:
                self._replace(place, f"{place.name} did not deliver lease {lease_id} in time")
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
        keep: int = 0,
        on_chunk: Callable[[int, EvalReport], None] | None = None,
    ) -> list[EvalResult]:
        """``samples`` graded completions per problem, in the problems' order.

        The problems are cut into chunks of ``chunk_size``, whatever the number of actors, so the results don't depend
        on it. Running leases are finished first; what they deliver is kept for ``poll``.

        Args:
            timeout_s: seconds for one chunk; an actor that needs longer is replaced and the chunk repeated.
            expire: the ledger's ``expire``, called every tick; the leases it names are killed, so that a stuck actor
                can't block this. What it raises ends the evaluation.
            keep: problems, the first ones, whose trajectories are in their results.
            on_chunk: called with (chunk, its report) as soon as a chunk is finished, in any order.

        Raises: as ``poll`` does.
        """
        chunks = [problems[start : start + chunk_size] for start in range(0, len(problems), chunk_size)]
        self._evaluation = Evaluation(deque(range(len(chunks))), on_chunk=on_chunk)
        while len(self._evaluation.results) < len(chunks):
            for place in self._idle_places()[: len(self._evaluation.waiting)]:
                chunk = self._evaluation.waiting.popleft()
                kept = max(0, keep - chunk * chunk_size)
                ref = place.handle.evaluate.remote(chunks[chunk], sampler, weights, samples, kept)
                place.take(Task([ref], weights, chunk=chunk), deadline=time.monotonic() + timeout_s)
            self._pump(_TICK_S)
            for lease_id in expire():
                self.kill_lease(lease_id)
        return [result for chunk in range(len(chunks)) for result in self._evaluation.results[chunk]]

    def set_size(self, size: int) -> None:
        """Start or retire actors; one with a lease finishes it first, and idle ones go before busy ones."""
        staying = self._staying()
        dispensable = sorted(reversed(staying), key=lambda place: STATES.index(place.state))  # newest first
        for place in dispensable[: max(0, len(staying) - size)]:
            self._retire(place)
        for _ in range(len(staying), size):
            self._start(self._add())

    def resize(self, size: int, *, timeout_s: float) -> Resize:
        """Start or retire actors while work goes on. The answer changes as ``poll`` and ``evaluate`` go on.

        When one of the new actors is not ready in time, or fails while it starts, all new ones go and the others stay.
        """
        assert size >= 1 and self._resize is None, "one change of size at a time, and never to none"
        before = len(self._staying())
        self._resize = Resize(size, before)
        for _ in range(before, size):
            place = self._add()
            place.on_trial = True
            self._start(place, timeout_s)
        self.set_size(size)
        self._see_resize()
        return self._resize or Resize(size, before, over=True)

    @property
    def size(self) -> int:
        """Number of actors, those that are retiring aside."""
        return len(self._staying())

    def workers(self) -> list[dict[str, Any]]:
        """The actors for the run store: id, state, what they do and since when, when they were started and when they
        answered last, where they run, version held, restarts, last error. Times in Unix seconds."""
        return [
            {
                "actor_id": place.name,
                "state": place.state,
                "lease_id": place.task.lease_id if place.task else None,
                "doing": place.doing,
                "began": place.began,
                "heard": place.heard,
                "policy_version": place.version,
                "restarts": place.restarts,
                "last_error": place.last_error,
                **{key: (place.info or {}).get(key) for key in ("pid", "host", "node_id", "code", "engine", "usage")},
            }
            for place in self._places
        ]

    def close(self) -> None:
        """Kill all actors; their graders die with them."""
        for place in list(self._places):
            self._remove(place)

    def _pump(self, timeout_s: float) -> None:
        """Wait for an answer, then settle all that are there and replace the actors that are overdue."""
        awaited = [place.awaited for place in self._places if place.awaited is not None]
        assert awaited or timeout_s == 0, "waiting for actors that have nothing to do: it would never end"
        done, _ = bounded_wait(awaited, who="rollout actors", timeout_s=timeout_s)
        if done:
            done, _ = bounded_wait(awaited, who="rollout actors", timeout_s=0.0, num_returns=len(awaited))
        for place in list(self._places):
            if place not in self._places:  # it went with another one, just now
                continue
            if place.awaited is not None and place.awaited in done:
                self._settle(place, place.awaited)
            elif time.monotonic() >= place.deadline:
                late = self._not_ready([place]) if place.info is None else f"{place.name} did not evaluate in time"
                self._replace(place, late)
        self._see_resize()

    def _settle(self, place: Place, answered: ray.ObjectRef[Any]) -> None:
        try:
            answer = bounded_get(answered, who=place.name, timeout_s=_REPORT_LIMIT_S)
        except (UnmaskError, ray.exceptions.RayError) as error:
            if isinstance(error, FATAL) and not place.on_trial:
                raise
            self._replace(place, f"{place.name} was lost: {_sentence(error)}")
            return
        task = place.finish()
        if task is None:
            place.info, place.on_trial = answer, False
            return
        self._failures = 0
        place.version = task.weights.version
        if task.chunk is not None:
            self._evaluation.take(task.chunk, answer)
        else:
            _check_weights(answer, task.weights)
            place.info = {**(place.info or {}), "usage": answer.usage}
            self._events.append(Delivery(answer, task.refs[1:]))
        if place.retiring:
            self._remove(place)

    def _replace(self, place: Place, error: str) -> None:
        if place.on_trial:
            self._give_growth_up(error)
            return
        task = place.task
        if task is not None and task.chunk is not None:
            self._evaluation.waiting.appendleft(task.chunk)
        self._events.append(ActorLost(place.name, task.lease_id if task else None, error))
        self._failures += 1
        if self._failures > self._max_restarts * len(self._places):
            raise WorkerLost(f"{self._failures} rollout actors in a row were lost without any work done; last: {error}")
        if place.retiring:
            self._remove(place)
            return
        _kill(place)
        place.restarts += 1
        place.last_error = error
        self._start(place)

    def _give_growth_up(self, error: str) -> None:
        assert self._resize is not None, "an actor is on trial while the size changes"
        self._resize.error = error
        for place in self._places[self._resize.before :]:  # new ones come last
            place.on_trial = False
            self._retire(place)

    def _see_resize(self) -> None:
        """The change is over when the new actors are ready and the old ones gone."""
        if self._resize is not None and not any(place.retiring or place.on_trial for place in self._places):
            self._resize.over = True
            self._resize = None

    def _add(self) -> Place:
        place = Place(f"rollout-{self._started}")
        self._started += 1
        self._places.append(place)
        return place

    def _retire(self, place: Place) -> None:
        place.retiring = True
        if place.task is None:
            self._remove(place)

    def _start(self, place: Place, limit_s: float | None = None) -> None:
        custom = {name: amount for name, amount in self._resources.items() if name not in ("CPU", "GPU")}
        # Ray neither restarts the actor nor repeats its tasks: that is decided, and counted, here and in the ledger.
        actor_class = ray.remote(self.actor_class).options(
            num_cpus=self._resources.get("CPU", 0),
            num_gpus=self._resources.get("GPU", 0),
            resources=custom,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads)}},
        )
        place.begin(actor_class.remote(place.name, self._settings), limit_s or self._start_timeout_s)

    def _remove(self, place: Place) -> None:
        _kill(place)
        self._places.remove(place)

    def _idle_places(self) -> list[Place]:
        return [place for place in self._places if place.state == "idle"]

    def _staying(self) -> list[Place]:
        return [place for place in self._places if not place.retiring]

    def _not_ready(self, places: Sequence[Place]) -> str:
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
        names = ", ".join(place.name for place in places)
        return f"{names} did not start within {places[0].limit_s:g} s: {why}"


def _check_weights(report: LeaseReport, weights: Weights) -> None:
    if (report.policy_version, report.adapter_digest) != (weights.version, weights.digest):
        raise WeightMismatch(
            f"lease {report.lease_id} was drawn with version {report.policy_version} ({report.adapter_digest[:12]}), "
            f"given out was version {weights.version} ({weights.digest[:12]})"
        )


def _kill(place: Place) -> None:
    end_actor(place.handle)


def _sentence(error: Exception) -> str:
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"
