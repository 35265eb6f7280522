"""How many actors to take, and how stale their groups must be allowed to become."""

from dataclasses import dataclass

from learner.simulation.replay import Figures, simulate
from learner.simulation.settings import SimulationConfig
from learner.simulation.times import Times

MORE_STALENESS = 4
"""Versions above the settings' own ``rollout.max_staleness`` that are tried."""
STEP = 1.1
"""From one number of actors that is tried to the next."""


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
    """The smallest number of actors that leaves neither side too idle; where there is none, the one whose idler side
    is the busiest. Actors beyond the leases that can be out at once would get nothing to do."""
    rollout = config.rollout
    groups = rollout.prompts_per_iteration * (rollout.max_staleness + 1)
    most = -(-groups // rollout.groups_per_lease)
    tried: list[Figures] = []
    number = 1
    while number <= most:
        tried.append(simulate(config, times, number))
        if tried[-1].idlest <= config.most_idle:
            return Choice(rollout.max_staleness, tried[-1], enough=True)
        if tried[-1].actors_idle > max(0.5, tried[-1].learner_idle):
            break  # more of them are idler still
        number = max(number + 1, int(number * STEP))
    return Choice(rollout.max_staleness, min(tried, key=lambda figures: figures.idlest), enough=False)


def _with_staleness(config: SimulationConfig, staleness: int) -> SimulationConfig:
    changes = {"max_staleness": staleness, "buffer_groups": None}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=changes)})
