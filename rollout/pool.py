"""The pool of rollout actors: starts them, hands them leases and evaluation chunks, replaces those that die.

It lives in the controller and never blocks longer than it is told to. What it reports, deliveries and losses, the
controller passes on to the replay buffer; which lease comes next is the ledger's decision.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup

from rewards.errors import TrajectoryError, UnmaskError, WaitTimeout
from rewards.task import Problem
from rollout.actor import ActorSettings, RolloutActor
from rollout.arrival import Arrival, Arrivals, report_problem
from rollout.events import FATAL, ActorLost, Cause, Delivery, Event, Refused, sentence_of
from rollout.messages import EvalReport, EvalResult, Weights
from rollout.places import STATES, Evaluation, Failures, Place, Resize, Task
from rollout.starting import Starter, draining_nodes
from rollout.trajectory import BranchSpec, Lease, SamplerSpec
from rollout.waits import bounded_get, bounded_wait, end_actor

MOST_REFUSED = 3
"""Deliveries of one actor that are refused; then it is not used any more, nor is its node if there is another."""

_REPORT_LIMIT_S = 60.0
_TICK_S = 1.0


class RolloutPool:
    """Starts the actors at once; ``wait_ready`` waits for those that a run needs. The others join when there is room
    for them: Ray is asked for it all the time, which is what makes an autoscaler add nodes.

    Args:
        settings: what each actor is made of.
        size: number of actors that are wanted.
        least: number without which a run doesn't begin, nor goes on for longer than ``start_timeout_s``; None: all.
        resources: what one actor asks of its node, by Ray's names ("CPU", "GPU", custom ones).
        environment: variables of an actor's process.
        start_timeout_s: seconds for an actor to load its model, and for ``least`` of them to be there.
        max_restarts: replacements in a row without any work delivered, per actor, before the pool gives up.
        heartbeat_s: seconds that an actor's process may stay without answering; then it is replaced.
        placement: bundles for them, one each, where they were reserved.
    """

    actor_class: type = RolloutActor
    """What is started in each place, with its name and ``settings``."""
    looks_into_groups = True
    """Whether what is delivered is read before it counts (``rollout.arrival``)."""

    def __init__(
        self,
        settings: ActorSettings,
        *,
        size: int,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
        start_timeout_s: float,
        max_restarts: int,
        least: int | None = None,
        heartbeat_s: float = 60.0,
        placement: PlacementGroup | None = None,
    ) -> None:
        self._starter = Starter(self.actor_class, settings, resources, environment, start_timeout_s, placement)
        self._start_timeout_s = start_timeout_s
        self._least = least
        self._heartbeat_s = heartbeat_s
        self._places: list[Place] = []
        self._started = 0
        self._failures = Failures(max_restarts)
        self._events: list[Event] = []
        self._evaluation = Evaluation()
        self._resize: Resize | None = None
        self._arrivals = Arrivals()
        self._looked_around = -_TICK_S
        self._short_since: float | None = time.monotonic()  # of ``least`` ready actors
        self.set_size(size)

    def wait_ready(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Wait until as many actors are ready as a run needs, calling ``on_tick`` every second, which may raise.

        Raises:
            WaitTimeout: some are not ready after ``start_timeout_s``; the message names the missing resource.
            ConfigError: the model or task can't be had.
            WorkerLost: they die time and again while starting.
        """
        self._short_since = time.monotonic()
        while self.ready < self.least:
            on_tick()
            self._pump(_TICK_S)

    @property
    def least(self) -> int:
        """Number of actors without which the run can't go on for long."""
        wanted = sum(not place.on_trial for place in self._staying())
        return wanted if self._least is None else min(self._least, wanted)

    @property
    def ready(self) -> int:
        """Number of actors that are there, idle or at work."""
        return sum(place.info is not None for place in self._staying())

    def idle(self) -> int:
        """Number of actors that could take a lease now."""
        return len(self._idle_places())

    def submit(
        self,
        lease: Lease,
        sampler: SamplerSpec,
        weights: Weights,
        branches: BranchSpec | None = None,
        *,
        limit_s: float = math.inf,
    ) -> None:
        """Give the lease to the fastest idle actor, which is replaced when it hasn't delivered after ``limit_s``
        seconds: also when another's delivery has closed the lease, so that the ledger doesn't name it any more."""
        place = self._idle_places()[0]
        method = place.handle.run_lease.options(num_returns=1 + len(lease.groups))
        task = Task(method.remote(lease, sampler, weights, branches), weights, sampler, lease)
        # A little later: those that count are ended by the ledger, which is asked every second.
        place.take(task, deadline=time.monotonic() + limit_s + 3 * _TICK_S)

    def poll(self, timeout_s: float) -> list[Event]:
        """What has happened; waits up to ``timeout_s`` seconds for something to happen.

        Raises:
            ConfigError, DataError, WeightMismatch: from an actor; repeating the lease can't help.
            WorkerLost: too many actors had to be replaced, or deliveries refused, in a row.
            WaitTimeout: too few actors are there, and have been for too long.
        """
        deadline = time.monotonic() + timeout_s
        self._pump(0.0 if self._events else timeout_s)
        while not self._events and self._arrivals.awaited and (left := deadline - time.monotonic()) > 0:
            self._pump(left)  # what was delivered is being looked at
        return self.untold()

    def untold(self) -> list[Event]:
        """What ``poll`` didn't return: where that raised, the last of it is why."""
        events, self._events = self._events, []
        return events

    def kill_lease(self, lease_id: int) -> None:
        """The lease timed out: take its actor for stuck, and replace it. Nothing happens if the lease isn't running."""
        for place in self._places:
            if place.task is not None and place.lease_id == lease_id:
                self._replace(place, f"{place.name} {place.task.late}", "late")
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
                place.take(Task([ref], weights, sampler, chunk=chunk), deadline=time.monotonic() + timeout_s)
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
            self._starter.start(self._add())

    def resize(self, size: int, *, timeout_s: float) -> Resize:
        """Start or retire actors while work goes on. The answer changes as ``poll`` and ``evaluate`` go on.

        When one of the new actors is not ready in time, or fails while it starts, all new ones go and the others stay.
        """
        assert size >= 1 and self._resize is None, "one change of size at a time, and never to none"
        self._resize = Resize(size, before := len(self._staying()))
        for _ in range(before, size):
            place = self._add()
            place.on_trial = True
            self._starter.start(place, timeout_s)
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
        return [place.told() for place in self._places]

    def close(self) -> None:
        """Kill all actors; their graders die with them."""
        for place in list(self._places):
            self._remove(place)

    def _pump(self, timeout_s: float) -> None:
        """Wait for an answer, then settle all that are there and replace the actors that are overdue."""
        if timeout_s > 0 and not self._awaited() and any(place.leaving is not None for place in self._places):
            self._look_around()  # those that are idle on a drained node are started elsewhere
            timeout_s = timeout_s if self._awaited() else 0.0
        awaited = self._awaited()
        assert awaited or timeout_s == 0, "waiting for actors that have nothing to do: it would never end"
        done, _ = bounded_wait(awaited, who="rollout actors", timeout_s=timeout_s)
        all_done, _ = bounded_wait(awaited if done else (), who="actors", timeout_s=0.0, num_returns=len(awaited))
        answered, now = set(all_done), time.monotonic()
        for place in [place for place in self._places if place.awaited in answered or now >= place.deadline]:
            if place not in self._places:  # it went with another one, just now
                continue
            if place.awaited is not None and place.awaited in answered:
                self._settle(place, place.awaited)
            elif time.monotonic() >= place.deadline:
                late = f"{place.name} {place.task.late}" if place.task else self._starter.not_ready([place])
                self._replace(place, late, "late")
        for arrival in self._arrivals.looked_at():
            self._accept(arrival)
        if time.monotonic() - self._looked_around >= _TICK_S:
            self._look_around()
        self._see_resize()

    def _awaited(self) -> list[ray.ObjectRef[Any]]:
        return [place.awaited for place in self._places if place.awaited is not None] + self._arrivals.awaited

    def _settle(self, place: Place, answered: ray.ObjectRef[Any]) -> None:
        try:
            answer = bounded_get(answered, who=place.name, timeout_s=_REPORT_LIMIT_S)
        except (UnmaskError, ray.exceptions.RayError) as error:
            if isinstance(error, FATAL) and not place.on_trial:
                raise
            if isinstance(error, TrajectoryError) and (task := place.finish()) is not None:
                self._repeat(task)
                self._refuse(place, task.lease, str(error))
            else:
                self._replace(place, f"{place.name} was lost: {sentence_of(error)}")
            return
        if not place.placed:
            place.has_room()
            return
        task = place.finish()
        if task is None:
            place.is_ready(answer, self._heartbeat_s)
            return
        place.version = task.weights.version
        if task.lease is None:
            self._settle_chunk(place, task, answer)
        elif problem := report_problem(answer, task.lease, place.name, task.weights):
            self._refuse(place, task.lease, problem)
        else:
            place.info = {**(place.info or {}), "usage": answer.usage}
            arrival = Arrival(answer, task.refs[1:], task.lease, task.sampler, place.handle)
            if self.looks_into_groups:
                self._arrivals.add(arrival, place.node_id)
            else:
                self._accept(arrival)
        if place.retiring and place in self._places:
            self._remove(place)

    def _settle_chunk(self, place: Place, task: Task, answer: Any) -> None:
        assert task.chunk is not None, "a lease or a chunk"
        if isinstance(answer, EvalReport):
            self._failures.over()
            self._evaluation.take(task.chunk, answer)
        else:
            self._repeat(task)
            self._refuse(place, None, f"a {type(answer).__name__} in place of an evaluation")

    def _accept(self, arrival: Arrival) -> None:
        """A delivery that was looked at."""
        if arrival.problem is None:
            self._failures.over()
            self._events.append(Delivery(arrival.report, arrival.groups))
            return
        place = next((place for place in self._places if place.handle is arrival.handle), None)
        if place is not None and not arrival.lost:
            self._refuse(place, arrival.lease, arrival.problem)
            return
        cause: Literal["lost", "invalid"] = "lost" if arrival.lost else "invalid"
        self._events.append(Refused(arrival.report.actor_id, arrival.lease.lease_id, arrival.problem, cause))
        self._failures.note(arrival.problem, len(self._places))

    def _refuse(self, place: Place, lease: Lease | None, problem: str) -> None:
        what = "an evaluation" if lease is None else f"lease {lease.lease_id}"
        problem = f"what {place.name} delivered for {what} is refused: {problem}"
        self._events.append(Refused(place.name, None if lease is None else lease.lease_id, problem))
        place.refused += 1
        if place.refused >= MOST_REFUSED:
            node = f"node {place.node_id[:12]} ({(place.info or {}).get('host')})"
            self._starter.avoided |= {place.node_id} - {""}
            text = f"{place.name} on {node} is given up after {place.refused} deliveries that were refused; {problem}"
            self._replace(place, text, "invalid")
        else:
            self._failures.note(problem, len(self._places))

    def _repeat(self, task: Task) -> None:
        if task.chunk is not None:
            self._evaluation.waiting.appendleft(task.chunk)

    def _replace(self, place: Place, error: str, cause: Cause = "died", silent_s: float = 0.0) -> None:
        if place.on_trial:
            self._give_growth_up(error)
            return
        if place.task is not None:
            self._repeat(place.task)
        self._events.append(ActorLost(place.name, place.lease_id, error, cause, silent_s))
        if cause != "preempted":
            self._failures.note(error, len(self._places))
        if place.retiring:
            self._remove(place)
            return
        end_actor(place.handle)
        place.restarts += 1
        place.last_error = error
        self._starter.start(place)

    def _look_around(self) -> None:
        """Once a second: whose process hangs or is dead, whose node is about to go, and whether enough are there."""
        self._looked_around = time.monotonic()
        for place in list(self._places):
            if (trouble := place.trouble()) is not None:
                self._replace(place, *trouble)
        draining = draining_nodes()
        for place in list(self._places):
            place.leaving = draining.get(place.node_id)
            if place.leaving is not None and (place.task is None or 0 < place.leaving <= time.time()):
                self._replace(place, f"{place.name} leaves node {place.node_id[:12]}, which is drained", "preempted")
        self._short_since = None if self.ready >= self.least else (self._short_since or time.monotonic())
        if self._short_since is not None and time.monotonic() - self._short_since >= self._start_timeout_s:
            raise WaitTimeout(self._starter.not_ready([place for place in self._staying() if place.info is None]))

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

    def _remove(self, place: Place) -> None:
        end_actor(place.handle)
        self._places.remove(place)

    def _idle_places(self) -> list[Place]:
        """Fastest first; of what isn't known the best is thought."""
        idle = (place for place in self._places if place.state == "idle" and place.leaving is None)
        return sorted(idle, key=lambda place: place.pace_s or 0.0)

    def _staying(self) -> list[Place]:
        return [place for place in self._places if not place.retiring]
