"""How many actors to take, and how stale their groups must be allowed to become."""

from dataclasses import dataclass

from learner.simulation.replay import Figures, simulate
from learner.simulation.settings import SimulationConfig
from learner.simulation.times import Times

MORE_STALENESS = 4
"""Versions above the settings' own ``rollout.max_staleness`` that are tried."""
PRECISION = 0.03
"""Of the number of actors, as a share of it."""


@dataclass(frozen=True)
class Choice:
    """A number of actors, with the staleness that it needs, and what came of it."""

    max_staleness: int
    figures: Figures
    enough: bool
    """Neither side is idle for more than ``most_idle`` of the time."""


@dataclass(frozen=True)
class Advice:
    """``now``: with the settings' own staleness. ``with_more``: with the smallest larger one that is enough, if any."""

    now: Choice
    with_more: Choice | None


def advise(config: SimulationConfig, times: Times) -> Advice:
    """The best number of actors as the settings are and, where that leaves a side too idle, with more staleness."""
    own = config.rollout.max_staleness
    now = best(config, times)
    if now.enough:
        return Advice(now, None)
    for staleness in range(own + 1, own + MORE_STALENESS + 1):
        found = best(_with_staleness(config, staleness), times)
        if found.enough:
            return Advice(now, found)
    return Advice(now, None)


def best(config: SimulationConfig, times: Times) -> Choice:
    """The smallest number of actors that leaves the learner no more than ``most_idle`` of the time idle, to
    ``PRECISION``; where the actors are then idle for longer, or no number is enough for the learner, that one of those
    tried whose idler side is the busiest. Actors beyond the leases that can be out at once would get nothing to do."""
    most = config.leases_per_iteration * (config.rollout.max_staleness + 1)
    as_fast = config.leases_per_iteration * times.lease_s / times.update_s  # as the ranks, if nobody ever waited
    low, high = max(1, min(most, int(as_fast / 2))), max(1, min(most, int(4 * as_fast) + 1))
    tried = {number: simulate(config, times, number) for number in {low, high}}
    while high - low > max(1, PRECISION * low) and tried[high].learner_idle <= config.most_idle:
        middle = (low + high) // 2
        tried[middle] = simulate(config, times, middle)
        low, high = (low, middle) if tried[middle].learner_idle <= config.most_idle else (middle, high)
    enough = [number for number, figures in sorted(tried.items()) if figures.idlest <= config.most_idle]
    if enough:
        return Choice(config.rollout.max_staleness, tried[enough[0]], enough=True)
    return Choice(config.rollout.max_staleness, min(tried.values(), key=lambda f: f.idlest), enough=False)


def _with_staleness(config: SimulationConfig, staleness: int) -> SimulationConfig:
    changes = {"max_staleness": staleness, "buffer_groups": None}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=changes)})
