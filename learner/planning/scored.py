"""How much the largest forward of a learner rank scores: views and positions, from what the method's settings say.

Where a view's number of scored positions is drawn, the largest of a run's many forwards is above the mean. Its expected
rank among F forwards is F / (F + 1), and a sum of n views' numbers is taken as normal: mean n m, deviation s sqrt(n).
Views of a completion that are balanced (a mask and its complement) only add to that where the forward cuts through it.
"""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist

from learner.settings.objective import Cost, uniform_deviation
from learner.settings.run import RunConfig
from rollout.trajectory import SamplerSpec


@dataclass(frozen=True)
class LargestForward:
    views: int
    """Z"""
    positions: int
    """N, scored"""
    candidates: int
    """Positions that a scored choice was made from; 0 where choices aren't scored."""


def largest_forward(config: RunConfig, views: int | None = None) -> LargestForward:
    """The largest forward that a rank makes with a backward. ``views``: instead of ``learner.views_per_forward``."""
    sampler, cost = config.rollout.sampler.spec(), config.objective.cost(config.rollout.sampler.spec())
    per_rank = math.ceil(completions_learned(config) * cost.views / config.learner.ranks)
    room = min(config.learner.views_per_forward, per_rank) if views is None else views
    Z = _whole_units(cost, config.rollout.group_size, room)
    updates = config.run.iterations * config.learner.updates_per_batch
    forwards = updates * config.learner.ranks * math.ceil(per_rank / Z)
    above = above_mean(forwards)
    positions = _positions(cost, Z, above, config.rollout.group_size)
    candidates = _candidates(sampler, Z, above) if cost.choices and sampler.scores_positions else 0.0
    return LargestForward(Z, math.ceil(positions - 1e-9), math.ceil(candidates - 1e-9))


def completions_learned(config: RunConfig) -> int:
    """Completions that an update learns from, at most."""
    rollout, phases = config.rollout, config.objective.phases()
    groups = rollout.prompts_per_iteration if phases is None else phases.prompts
    there = groups * rollout.group_size
    limit = config.objective.cost(rollout.sampler.spec()).completions
    return there if limit is None else min(limit, there)


def above_mean(times: int) -> float:
    """How many deviations the largest of so many normal numbers is above their mean, by its expected rank."""
    return NormalDist().inv_cdf(times / (times + 1))


def _candidates(sampler: SamplerSpec, views: int, above: float) -> float:
    """What is masked in the blocks of so many states, each before a drawn step of its block."""
    block = sampler.block_length
    steps = sampler.steps * block // sampler.completion_length
    mean, deviation = block * (steps + 1) / (2 * steps), block / steps * uniform_deviation(steps)
    return min(views * mean + above * deviation * math.sqrt(views), float(views * block))


def _whole_units(cost: Cost, group_size: int, views: int) -> int:
    """Views in a forward that may hold ``views``: whole units, or an even part of one that is larger."""
    unit = {"view": 1, "completion": cost.views, "group": cost.views * group_size}[cost.together]
    return views // unit * unit if views >= unit else math.ceil(unit / math.ceil(unit / views))


def _positions(cost: Cost, views: int, above: float, group_size: int) -> float:
    """Of so many views in a row, those of the part that scores most among them."""
    if cost.each:
        passes = math.ceil(cost.views / views)
        bounds = [cost.views * part // passes for part in range(passes + 1)]
        sums = [sum(cost.each[start:end]) for start, end in itertools.pairwise(bounds)]
        return max(sums) * max(1.0, views / cost.views)
    if not cost.parts:
        drawn = views * cost.scored + above * cost.deviation * math.sqrt(_loose(cost, views, group_size))
        return drawn if cost.most is None else min(drawn, views * cost.most)
    repeats, left = divmod(views, group_size * cost.views)
    found = 0.0
    for part in sorted(cost.parts, key=lambda part: -part.scored):
        own = min(left, group_size * part.views)
        left -= own
        found += _positions(part, repeats * group_size * part.views + own, above, group_size)
    return found


def _loose(cost: Cost, views: int, group_size: int) -> int:
    """How many of so many views in a row vary on their own: those of a completion, or group, that the forward cuts."""
    if cost.balanced is None:
        return views
    whole = cost.views * (group_size if cost.balanced == "group" else 1)
    if cost.together == "view":  # nothing keeps the forwards' begins at those of completions
        return min(views, whole)
    return views % whole
