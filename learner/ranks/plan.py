"""The plan of one update: which views are scored, with which weights, by which rank, in which forward.

The plan is a function of the groups and the settings alone, so every rank can compute it for itself and all agree.
What is divided by the normaliser and summed over all ranks and forwards is the loss, however the views are dealt out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from learner.likelihood.timesteps import last_token_step
from learner.likelihood.views import Unit, View, pad_view
from learner.objectives.base import FinalCredit, Objective, UpdateContext
from learner.objectives.statistics import Statistics
from rollout.trajectory import TrajectoryGroup


class Forward(NamedTuple):
    """Units whose loss is computed together."""

    number: int
    """among this rank's forwards of the update"""
    units: tuple[Unit, ...]
    """At least one; a lone pad where the rank has nothing to score."""
    passes: int
    """In how many passes of the model its views are scored; above 1 only for a unit of more views than one pass may
    hold. The same on every rank."""

    @property
    def views(self) -> list[View]:
        return [view for unit in self.units for view in unit]

    @property
    def is_pad(self) -> bool:
        return not any(view.scored_n.size for view in self.views)


@dataclass(frozen=True)
class UpdatePlan:
    """One optimizer step's work."""

    forwards: tuple[tuple[Forward, ...], ...]
    """[rank][forward]; every rank has the same number of forwards, at least one, none empty."""
    normaliser: float
    """The objective's divisors of all groups, those without signal included; 1 where they add up to 0, as of a method
    that counts what it scores in an update without signal."""
    statistics: dict[str, float]
    """Figures of the whole update (the same on every rank, so not to be added up over ranks)."""
    credit: tuple[np.ndarray, ...]
    """[group], what the objective credits each completion with, as ``Objective.credit`` gives it."""


def plan_update(
    groups: Sequence[TrajectoryGroup],
    *,
    objective: Objective,
    run_seed: int,
    update_index: int,
    eos_ids: tuple[int, ...],
    ranks: int,
    views_per_forward: int,
    final: FinalCredit | None = None,
    phase: int = 0,
) -> UpdatePlan:
    """Plan one update.

    Args:
        groups: the iteration's groups by ascending group id, with rewards.
        update_index: which of the several updates on this batch this is; it names the draws.
        eos_ids: tokens that only fill a completion's end.
        views_per_forward: views scored in one pass of the model at most. Changes nothing but memory and speed.
        final: of a method that has measured; None for ``objective.credit``.
        phase: of a method that learns in phases, number of the present one.

    Raises:
        DataError: when a reward isn't finite.
    """
    ids = [group.group_id for group in groups]
    assert ids and all(a < b for a, b in zip(ids, ids[1:], strict=False)), f"group ids are not ascending: {ids}"
    context = UpdateContext(run_seed, update_index, len(groups), eos_ids, phase)
    credit, measured = FinalCredit(objective.credit(groups), Statistics()) if final is None else final
    units: list[Unit] = []
    divisor, added_divisor, parts = 0.0, 0.0, [measured]
    for index, (group, credit_G) in enumerate(zip(groups, credit, strict=True)):
        wanted = objective.wanted(index, group, credit_G, context)
        units += wanted.units
        divisor += wanted.divisor
        parts += [wanted.statistics, _group_statistics(group, credit_G, eos_ids)]
        if wanted.added is not None:
            units += wanted.added.units
            added_divisor += wanted.added.divisor
            parts.append(wanted.added.statistics)
    normaliser = divisor or 1.0
    if added_divisor:
        units = [tuple(_weighted(view, normaliser / added_divisor) for view in unit) for unit in units]
    statistics = Statistics.merged([*parts, Statistics(totals={"views": float(sum(map(len, units)))})])
    return UpdatePlan(
        forwards=deal(units, ranks, views_per_forward, pad=(pad_view(groups[0]),)),
        normaliser=normaliser,
        statistics=statistics.values(),
        credit=credit,
    )


def deal(units: Sequence[Unit], ranks: int, views_per_forward: int, *, pad: Unit) -> tuple[tuple[Forward, ...], ...]:
    """Contiguous, even shares for the ranks, each cut evenly into the same number of forwards; units stay whole."""
    shares = _split(units, ranks)
    count = max(1, math.ceil(max(map(_views, shares)) / views_per_forward))
    while any(len(part) > 1 and _views(part) > views_per_forward for share in shares for part in _split(share, count)):
        count += 1  # even cuts by unit need not be even by view
    columns = zip(*(_split(share, count) for share in shares), strict=True)
    passes = [max(1, math.ceil(max(map(_views, column)) / views_per_forward)) for column in columns]
    return tuple(
        tuple(Forward(i, tuple(part) or (pad,), passes[i]) for i, part in enumerate(_split(share, count)))
        for share in shares
    )


def _weighted(view: View, factor: float) -> View:
    """The view of an added loss with the factor in its weight; others as they are."""
    return view._replace(weight=view.weight * factor) if view.part else view


def _views(units: Sequence[Unit]) -> int:
    return sum(map(len, units))


def _split(units: Sequence[Unit], parts: int) -> list[Sequence[Unit]]:
    bounds = [len(units) * part // parts for part in range(parts + 1)]
    return [units[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def _group_statistics(group: TrajectoryGroup, credit_G: np.ndarray, eos_ids: tuple[int, ...]) -> Statistics:
    G = float(group.size)
    is_eos_GC = np.isin(group.completion_ids, eos_ids) & group.there
    behind_GC = np.logical_or.accumulate(is_eos_GC, axis=1) & ~is_eos_GC & group.there
    means = {
        "reward/mean": (float(group.rewards.sum(dtype=np.float64)), G),
        "solve_rate": (float(group.correct.sum()), G),
        "groups/no_signal_share": (float(not credit_G.any()), 1.0),
        "eos_rate": (float(is_eos_GC.any(axis=1).sum()), G),
        "text_after_eos": (float(behind_GC.any(axis=1).sum()), G),
        "completion_length": (float(group.text_tokens(eos_ids).sum()), G),
        "distinct_share": (float(len(np.unique(group.completion_ids, axis=0))), G),
        "tokens_per_forward": (float(group.tokens_per_forward(eos_ids).sum()), G),
        "entropy": (float(group.entropy[group.drawn].sum(dtype=np.float64)), float(group.drawn.sum())),
    }
    if group.position_logp is not None and group.position_entropy is not None:
        choices = float((group.position_logp < 0).sum())
        means["position_entropy"] = (float(group.position_entropy.sum(dtype=np.float64)), choices)
    if group.threshold is not None:
        means["threshold"] = (float(group.threshold.sum(dtype=np.float64)), G)
    if group.branch_step is not None and group.branch_rewards is not None and group.branch_correct is not None:
        there_GS = group.branch_step >= 0
        fills = float(there_GS.sum() * group.branch_correct.shape[2])
        means |= {
            "branches/missing_share": (float((~there_GS).sum()), float(there_GS.size)),
            "branches/reward": (float(group.branch_rewards.sum(dtype=np.float64)), fills),
            "branches/solve_rate": (float(group.branch_correct.sum()), fills),
        }
    for name, values_G in zip(group.reward_names, group.rewards.T, strict=True):
        means[f"reward/{name}"] = (float(values_G.sum(dtype=np.float64)), G)
    all_eos = int((last_token_step(group, eos_ids) < 0).sum())
    return Statistics(means=means, totals={"all_eos_completions": float(all_eos), "completions": G})
