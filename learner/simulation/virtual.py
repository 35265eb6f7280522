"""What stands in for actors, object store and clock: each takes its time, and none of it passes."""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from learner.simulation.settings import SimulationConfig
from learner.simulation.spread import Spread
from learner.simulation.times import Times
from rollout.events import ActorLost, Delivery
from rollout.ledger import Ledger
from rollout.messages import GroupReport, LeaseReport, Weights
from rollout.replay import ReplayBuffer
from rollout.seeds import numpy_generator
from rollout.trajectory import BranchSpec, Lease, SamplerSpec


class Clock:
    """The controller's time, in seconds: it stands still unless somebody spends some."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def wait_until(self, moment: float) -> None:
        self.now = max(self.now, moment)


@dataclass(eq=False)
class _Actor:
    number: int
    node: int
    pace: float
    """Times that of the others."""
    turn: int = 0
    """Counts what it began; an event of an earlier turn is void."""
    pace_s: float | None = None
    """Seconds for a group of its newest lease; what isn't known is thought the best (``RolloutPool._idle_places``)."""
    version: int | None = None
    lease: Lease | None = None
    policy_version: int = 0
    began: float = 0.0
    hung_since: float | None = None
    away_since: float | None = None
    away: float = 0.0
    worked: float = 0.0
    """Seconds, of leases that are over."""


class SimulatedPool:
    """``rollout.pool.RolloutPool`` as the feed uses it, over actors that take virtual time.

    The controller's work for a delivery is spent here, on its clock; what happens meanwhile waits.
    """

    def __init__(self, config: SimulationConfig, times: Times, size: int, clock: Clock) -> None:
        seed = config.run.seed
        self._config, self._times, self._clock = config, times, clock
        self._draws = Spread(1.0, times.lease_spread, seed, "simulated leases", size)
        self._faults = numpy_generator(seed, "simulated faults", size)
        slow = numpy_generator(seed, "slow actors", size).random(size) < config.slow
        self.actors = [
            _Actor(i, i // config.actors_per_node, config.slow_by if is_slow else 1.0) for i, is_slow in enumerate(slow)
        ]
        self._idle: dict[int, _Actor] = {}
        self._fastest: list[tuple[float, int]] = []  # of the idle ones, and some that are so no more
        self._queue: list[tuple[float, int, str, int, int]] = []  # when, order, what, actor, its turn
        self._order = itertools.count()
        self._killed: list[ActorLost] = []
        self._holding: dict[int, int] = {}  # node -> version of its copy of the adapter
        self._holders: Counter[int] = Counter()  # version -> nodes that have got it
        self.passing_s = 0.0
        """Seconds that the controller worked on deliveries."""
        self.failures = 0
        for actor in self.actors:
            self._rest(actor)
            self._live(actor)

    def idle(self) -> int:
        return len(self._idle)

    def submit(
        self,
        lease: Lease,
        sampler: SamplerSpec,
        weights: Weights,
        branches: BranchSpec | None = None,
        *,
        limit_s: float = math.inf,
    ) -> None:
        """The fastest idle actor takes the lease."""
        actor = self._take()
        actor.lease, actor.began, actor.policy_version = lease, self._clock.now, weights.version
        share = len(lease.groups) / self._config.rollout.groups_per_lease
        work = self._times.lease_s * share * self._draws.draw() * actor.pace
        if actor.version != weights.version:
            actor.version = weights.version
            work += self._times.load_s + self._transfer(actor.node, weights.version)
        self._push(self._clock.now + work, "done", actor)
        if work > (limit := self._config.timeouts.lease):
            self._push(self._clock.now + limit, "look", actor)
        if (after := self._config.rollout.second_lease_after_s) is not None:
            self._push(self._clock.now + after, "look", actor)

    def poll(self, timeout_s: float) -> list[Delivery | ActorLost]:
        """What has happened. With a timeout the clock goes on to the next event, however far: waits of a second in
        which nothing happens would change nothing."""
        if timeout_s > 0 and not self._killed:
            assert self._queue, "waiting for actors that have nothing to do: it would never end"
            self._clock.wait_until(self.next_event())
        events: list[Delivery | ActorLost] = [*self._killed]
        self._killed = []
        while self._queue and self._queue[0][0] <= self._clock.now:
            when, _, what, number, turn = heapq.heappop(self._queue)
            actor = self.actors[number]
            if what == "back":
                assert actor.away_since is not None
                actor.away, actor.away_since = actor.away + when - actor.away_since, None
                self._rest(actor)
                self._live(actor)
            elif what == "done" and turn == actor.turn and actor.hung_since is None:
                events.append(self._deliver(actor, when))
            elif what == "fails" and turn == actor.turn:
                events += self._fail(actor, when)
            elif what == "silent" and turn == actor.turn:
                events += self._lose(actor, when, "gave no sign of life")
        return events

    def kill_lease(self, lease_id: int) -> None:
        for actor in self.actors:
            if actor.lease is not None and actor.lease.lease_id == lease_id:
                self._killed += self._lose(actor, self._clock.now, "did not deliver in time")
                return

    def next_event(self) -> float:
        """When something happens next that the controller may notice; a ``look`` is when a lease has lasted so long
        that the ledger does something about it."""
        return self._queue[0][0] if self._queue else math.inf

    def worked(self) -> float:
        """Seconds that all actors have worked until now, lost work included."""
        now = self._clock.now
        return sum(a.worked + (now - a.began if a.lease is not None else 0.0) for a in self.actors) - sum(
            now - a.hung_since for a in self.actors if a.hung_since is not None
        )

    def away(self) -> float:
        """Seconds that all actors have been dead or starting until now."""
        now = self._clock.now
        since = ((a.away, a.away_since if a.hung_since is None else a.hung_since) for a in self.actors)
        return sum(away + (0.0 if gone is None else now - gone) for away, gone in since)

    def copies(self) -> int:
        """Of adapters that have gone over a link."""
        return self._holders.total()

    def _transfer(self, node: int, version: int) -> float:
        """Once a node and version. Nodes that have a copy pass it on, so that after r rounds 2^r - 1 have it."""
        if self._holding.get(node) == version:
            return 0.0
        self._holding[node] = version
        self._holders[version] += 1
        rounds = math.ceil(math.log2(self._holders[version] + 1))
        return rounds * self._times.adapter_mb / self._config.link_mb_s

    def _deliver(self, actor: _Actor, when: float) -> Delivery:
        assert actor.lease is not None
        lease, actor.lease = actor.lease, None
        actor.worked += when - actor.began
        actor.pace_s = (when - actor.began) / len(lease.groups)
        self._rest(actor)
        self._spend(len(lease.groups) / self._config.controller_groups_per_s)
        groups = tuple(GroupReport(s.group_id, s.problem.id, 0, 0, 0, 0, None) for s in lease.groups)
        report = LeaseReport(
            lease_id=lease.lease_id,
            actor_id=f"rollout-{actor.number}",
            policy_version=actor.policy_version,
            adapter_digest="",
            groups=groups,
            load_s=0.0,
            generate_s=when - actor.began,
            grade_wait_s=0.0,
        )
        refs: list[Any] = [spec.group_id for spec in lease.groups]
        return Delivery(report, refs)

    def _fail(self, actor: _Actor, when: float) -> list[ActorLost]:
        self.failures += 1
        if actor.lease is not None and self._faults.random() < self._config.hangs:
            actor.hung_since = when
            self._push(when + self._config.timeouts.heartbeat, "silent", actor)
            self._push(actor.began + self._config.timeouts.lease, "look", actor)
            return []
        return self._lose(actor, when, "died")

    def _lose(self, actor: _Actor, when: float, how: str) -> list[ActorLost]:
        lost = ActorLost(f"rollout-{actor.number}", None if actor.lease is None else actor.lease.lease_id, how)
        gone = when if actor.hung_since is None else actor.hung_since
        if actor.lease is None:
            del self._idle[actor.number]
        else:
            actor.worked += gone - actor.began
        actor.lease, actor.version, actor.pace_s, actor.hung_since, actor.away_since = None, None, None, None, gone
        actor.turn += 1
        self._push(when + self._config.replace_s, "back", actor)
        return [lost]

    def _rest(self, actor: _Actor) -> None:
        self._idle[actor.number] = actor
        heapq.heappush(self._fastest, (actor.pace_s or 0.0, actor.number))

    def _take(self) -> _Actor:
        while True:
            pace_s, number = heapq.heappop(self._fastest)
            actor = self._idle.get(number)
            if actor is not None and (actor.pace_s or 0.0) == pace_s:
                del self._idle[number]
                return actor

    def _live(self, actor: _Actor) -> None:
        mean = self._config.mean_time_between_failures_s
        if mean is not None:
            self._push(self._clock.now + float(self._faults.exponential(mean)), "fails", actor)

    def _push(self, when: float, what: str, actor: _Actor) -> None:
        heapq.heappush(self._queue, (when, next(self._order), what, actor.number, actor.turn))

    def _spend(self, seconds: float) -> None:
        self._clock.spend(seconds)
        self.passing_s += seconds


class SimulatedReplay(ReplayBuffer):
    """The replay buffer, whose groups go to the ranks' node over a link when they are complete; none is ever lost."""

    def __init__(self, ledger: Ledger, clock: Clock, *, group_mb: float, link_mb_s: float) -> None:
        super().__init__(ledger)
        self._clock, self._group_s = clock, group_mb / link_mb_s
        self.fetched = 0
        self.fetching_s = 0.0

    def find_lost(self, refs: Mapping[int, Any], *, timeout_s: float) -> list[int]:
        self.fetched += len(refs)
        self.fetching_s += len(refs) * self._group_s
        self._clock.spend(len(refs) * self._group_s)
        return []
