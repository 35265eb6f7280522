"""One number of actors in virtual time, and what came of it."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from learner.simulation.cycle import make_cycle
from learner.simulation.settings import SimulationConfig
from learner.simulation.spread import Spread
from learner.simulation.times import Times
from learner.simulation.virtual import Clock, SimulatedPool, SimulatedReplay
from learner.supply.pumping import PUMP_S
from rollout.messages import Weights
from rollout.replay import ReplayItem

FULL = 0.9
"""Share of time from which on something counts as the limit."""


@dataclass(frozen=True)
class Figures:
    """Of the iterations after the warm-up. Shares are of time."""

    actors: int
    iterations_per_hour: float
    groups_per_s: float
    actors_idle: float
    """Share of the actors' time that they wait for a lease."""
    actors_away: float
    """Share that they are dead, hung or starting."""
    learner_idle: float
    """Share of time in which no update runs: waits, publishing, reports."""
    learner_waits: float
    """Share in which the learner waits for rollouts."""
    controller_busy: float
    link_busy: float
    """Of the ranks' node, whose link brings all groups."""
    network_mb_s: float
    """Over all links: groups to the ranks' node, adapters to each node."""
    staleness_mean: float
    staleness: dict[int, float]
    """Share of the consumed groups by the versions that they are behind."""
    failures: int
    leases_again: int
    """Leases that were given out once more."""
    limit: str
    """What binds: learner, actors, controller, network, or staleness (the two sides wait for each other)."""

    @property
    def idlest(self) -> float:
        return max(self.actors_idle, self.learner_idle)


def simulate(config: SimulationConfig, times: Times, actors: int) -> Figures:
    """Replay ``config.counted`` iterations with so many actors, after ``config.warming``."""
    # The run is longer, or the actors would have nothing left to do before it ends.
    staleness, first = config.rollout.max_staleness, config.warming
    longer = first + config.counted + staleness + 1
    run = config.run.model_copy(update={"iterations": longer})
    config = config.model_copy(update={"run": run})
    clock = Clock()
    pool = SimulatedPool(config, times, actors, clock)
    replays: list[SimulatedReplay] = []

    def make_replay(ledger: Any) -> SimulatedReplay:
        replays.append(SimulatedReplay(ledger, clock, group_mb=times.group_mb, link_mb_s=config.link_mb_s))
        return replays[0]

    # The feed asks no more of a pool than the simulated one has.
    cycle = make_cycle(config, cast(Any, pool), make_replay, clock, lambda part, cause, text, **cost: None)
    ledger = cycle.feed.replay.ledger
    readings: list[dict[str, float]] = []

    def read() -> None:
        readings.append(
            {
                "time": clock.now,
                "worked": pool.worked(),
                "away": pool.away(),
                "passing": pool.passing_s,
                "fetching": replays[0].fetching_s,
                "groups": replays[0].fetched,
                "copies": pool.copies(),
                "failures": pool.failures,
                "again": float(ledger.counts()["relet"] + ledger.counts()["second"]),
            }
        )

    ranks = _Ranks(config, times, actors, pool, clock)
    cycle.run(ranks, Weights(0, "", []), clock, iterations=first + config.counted, on_iteration=read)
    spent = {name: readings[-1][name] - readings[first][name] for name in readings[0]}
    seconds, marks = spent["time"], cycle.marks
    updating = _sum_of_spans(marks.gathered[first:], marks.updated[first:])
    waiting = _sum_of_spans(marks.begun[first:], marks.gathered[first:])
    consumed = [staleness for iteration in cycle.staleness[first:] for staleness in iteration]
    shares = {version: count / len(consumed) for version, count in sorted(Counter(consumed).items())}
    of_actors = actors * seconds
    megabytes = spent["groups"] * times.group_mb + spent["copies"] * times.adapter_mb
    busy = {
        "learner": updating / seconds,
        "actors": spent["worked"] / max(of_actors - spent["away"], 1e-9),
        "controller": spent["passing"] / seconds,
        "network": spent["fetching"] / seconds,
    }
    fullest = max(busy, key=lambda name: busy[name])
    return Figures(
        actors=actors,
        iterations_per_hour=3600 * config.counted / seconds,
        groups_per_s=len(consumed) / seconds,
        actors_idle=1 - (spent["worked"] + spent["away"]) / of_actors,
        actors_away=spent["away"] / of_actors,
        learner_idle=1 - busy["learner"],
        learner_waits=waiting / seconds,
        controller_busy=busy["controller"],
        link_busy=busy["network"],
        network_mb_s=megabytes / seconds,
        staleness_mean=sum(consumed) / len(consumed),
        staleness=shares,
        failures=int(spent["failures"]),
        leases_again=int(spent["again"]),
        limit=fullest if busy[fullest] >= FULL else "staleness",
    )


class _Ranks:
    """Take their time, and pump meanwhile."""

    def __init__(self, config: SimulationConfig, times: Times, actors: int, pool: SimulatedPool, clock: Clock) -> None:
        self._config, self._times, self._pool, self._clock = config, times, pool, clock
        self._updates = Spread(times.update_s, times.update_spread, config.run.seed, "simulated updates", actors)

    def update(self, items: Sequence[ReplayItem], pump: Callable[[], None]) -> None:
        self._work(self._updates.draw(), pump)

    def publish(self, version: int, pump: Callable[[], None]) -> Weights:
        self._work(self._times.publish_s, pump)
        return Weights(version, "", [])

    def _work(self, seconds: float, pump: Callable[[], None]) -> None:
        end, ahead = self._clock.now + seconds, 0.0
        while self._clock.now < end:
            self._clock.spend(max(1, math.ceil(ahead / PUMP_S)) * PUMP_S)
            if self._clock.now >= end:
                self._clock.now = end
                return
            pump()
            # Pumps that would find nothing are left out.
            ahead = min(max(self._pool.next_event(), self._clock.now), end) - self._clock.now

    def report(self) -> None:
        self._clock.spend(self._config.report_s)


def _sum_of_spans(begins: Sequence[float], ends: Sequence[float]) -> float:
    return sum(end - begin for begin, end in zip(begins, ends, strict=True))
