"""The plan of one update: which views are scored, with which weights, by which rank, in which forward.

The plan is a function of the groups and the settings alone, so every rank can compute it for itself and all agree.
What is divided by the normaliser and summed over all ranks and forwards is the loss, however the views are dealt out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.likelihood.timesteps import last_token_step
from learner.likelihood.views import View
from learner.objectives.base import Objective
from learner.objectives.statistics import Statistics
from rollout.trajectory import TrajectoryGroup

Forward = tuple[View, ...]


@dataclass(frozen=True)
class UpdatePlan:
    """One optimizer step's work."""

    forwards: tuple[tuple[Forward, ...], ...]
    """[rank][forward], views scored together; every rank has the same number of forwards, at least one, none empty."""
    normaliser: float
    """The objective's divisors of all groups, those without signal included."""
    statistics: dict[str, float]
    """Figures of the whole update (the same on every rank, so not to be added up over ranks)."""
    credit: tuple[np.ndarray, ...]
    """[group], what the objective credits each completion with, [G] float64."""


def plan_update(
    groups: Sequence[TrajectoryGroup],
    *,
    objective: Objective,
    run_seed: int,
    update_index: int,
    eos_ids: tuple[int, ...],
    ranks: int,
    views_per_forward: int,
) -> UpdatePlan:
    """Plan one update.

    Args:
        groups: the iteration's groups by ascending group id, with rewards.
        update_index: which of the several updates on this batch (or of the run) this is; it names the timestep draws.
        eos_ids: tokens that only fill a completion's end.
        views_per_forward: views scored in one forward at most. Changes nothing but memory and speed.

    Raises:
        DataError: when a reward isn't finite.
    """
    ids = [group.group_id for group in groups]
    assert ids and all(a < b for a, b in zip(ids, ids[1:], strict=False)), f"group ids are not ascending: {ids}"
    credit = tuple(objective.credit(group) for group in groups)
    views: list[View] = []
    divisor, parts = 0.0, []
    for index, (group, credit_G) in enumerate(zip(groups, credit, strict=True)):
        wanted = objective.wanted(index, group, credit_G, run_seed=run_seed, update_index=update_index, eos_ids=eos_ids)
        views += wanted.views
        divisor += wanted.divisor
        parts += [wanted.statistics, _group_statistics(group, credit_G, eos_ids)]
    statistics = Statistics.merged([*parts, Statistics(totals={"views": float(len(views))})])
    return UpdatePlan(
        forwards=_deal(views, ranks, views_per_forward, pad=_pad_view(groups[0])),
        normaliser=divisor,
        statistics=statistics.values(),
        credit=credit,
    )


def _deal(views: list[View], ranks: int, views_per_forward: int, *, pad: View) -> tuple[tuple[Forward, ...], ...]:
    """Contiguous, even shares for the ranks, each cut evenly into the same number of forwards."""
    shares = _split(views, ranks)
    count = max(1, math.ceil(max(map(len, shares)) / views_per_forward))
    return tuple(tuple(tuple(forward) or (pad,) for forward in _split(share, count)) for share in shares)


def _split(views: list[View], parts: int) -> list[list[View]]:
    bounds = [len(views) * part // parts for part in range(parts + 1)]
    return [views[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def _pad_view(group: TrajectoryGroup) -> View:
    """A view of weight 0: its forward and backward keep ranks in step and add zeros to the gradient."""
    return View(0, 0, int(group.unmask_step[0][group.drawn[0]].min()), advantage=0.0, weight=0.0)


def _group_statistics(group: TrajectoryGroup, credit_G: np.ndarray, eos_ids: tuple[int, ...]) -> Statistics:
    G = float(group.size)
    is_eos_GC = np.isin(group.completion_ids, eos_ids)
    means = {
        "reward/mean": (float(group.rewards.sum(dtype=np.float64)), G),
        "solve_rate": (float(group.correct.sum()), G),
        "groups/no_signal_share": (float(not credit_G.any()), 1.0),
        "eos_rate": (float(is_eos_GC.any(axis=1).sum()), G),
        "completion_length": (float((~is_eos_GC).sum()), G),
        "entropy": (float(group.entropy[group.drawn].sum(dtype=np.float64)), float(group.drawn.sum())),
    }
    if group.position_logp is not None and group.position_entropy is not None:
        choices = float((group.position_logp < 0).sum())
        means["position_entropy"] = (float(group.position_entropy.sum(dtype=np.float64)), choices)
    for name, values_G in zip(group.reward_names, group.rewards.T, strict=True):
        means[f"reward/{name}"] = (float(values_G.sum(dtype=np.float64)), G)
    all_eos = int((last_token_step(group, eos_ids) < 0).sum())
    return Statistics(means=means, totals={"all_eos_completions": float(all_eos), "completions": G})
