"""DiSPO: a method's loss, and beside it one of drawn fills of a recorded state (arXiv 2602.06462).

L = L_base + alpha * L_step. Of each completion one state s is taken, at a progress t that is drawn beforehand with a
density proportional to t**degree (``DrawnBranches``), and Z fills a_z of all its masked positions M at once, drawn from
the law of the rollout's step and graded like completions. With R_z their rewards,

    A_z      = R_z - mean over the Z fills, no division by a deviation
    logp(a)  = mean over N prompt masks q' of  sum over i in M of log p(a_i | q', s)
    rho_z    = exp(logp(a_z) - logp_old(a_z)), of the whole fill; old: of the weights that the batch's first update had
    L_step   = mean over completions of 1/Z sum over z of -min(rho_z A_z, clip(rho_z) A_z) + beta * KL_z
    KL_z     = mean over q' of the sum over i in M of k3 of the token's log-probs

A fill's law is a product over positions, so its KL is the sum of its tokens'. Before the weights have moved, with a
clean prompt and at temperature 1, the expected gradient of L_step is -(Z-1)/Z times that of the expected reward of a
fill of s. This is credit for one jump: the rollout itself would go on denoising.

Fills are drawn at the rollout's temperature and on its truncated support, and scored at temperature 1 on the whole
vocabulary. A completion that ended before its step has no state; it stays in the divisor. Clip, the weight of this KL
and its estimator are ours, the paper says "standard". No code was published.

Shapes: G completions of a group, Z fills, N prompt masks and M masked positions of a state, P prompt tokens, U units,
F fills of a batch's units, S scores of a batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Fills, Law, Unit, View, ViewBatch
from learner.objectives import make_objective
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.ratio import clipped_terms, k3, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.branches import DispoConfig
from rollout.copies import in_one_copy, indices_and_values
from rollout.trajectory import TrajectoryGroup

_STEP = 1
"""The part of the loss that is of fills; the base's is 0."""


class Dispo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: DispoConfig) -> None:
        self.config = config
        self.base = make_objective(config.base)
        assert self.base.needs.law is Law.RAW

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW, old=True, reference=self.base.needs.reference or self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """[G, 1 + Z]: the base's, and each fill's, 0 where there is none."""
        return tuple(
            np.column_stack([base_G, fill_advantages(group)])
            for base_G, group in zip(self.base.credit(groups), groups, strict=True)
        )

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The base's units, and beside them one of each state that has a gradient."""
        base = self.base.wanted(index, group, credit_G[:, 0], context)
        assert base.added is None
        hidden_GNP = self.draw(group, context)
        assert group.branch_step is not None
        there = np.flatnonzero(group.branch_step[:, 0] >= 0)
        live = [row for row in there.tolist() if credit_G[row, 1:].any() or self.config.beta > 0]
        units = [self.unit(group, index, row, hidden_GNP[row], credit_G[row, 1:]) for row in live]
        statistics = Statistics(
            means={"branches/no_signal_share": (float((~credit_G[there, 1:].any(axis=1)).sum()), float(there.size))}
        )
        return dataclasses.replace(base, added=Wanted(units, divisor=float(group.size), statistics=statistics))

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> np.ndarray:
        """[G, N, P] bool, the prompt masks of every row."""
        shape = (group.size, self.config.prompt_masks, group.prompt_ids.size)
        return context.stream(group, "prompt masks of fills").random(shape) < self.config.prompt_mask

    def unit(self, group: TrajectoryGroup, index: int, row: int, hidden_NP: np.ndarray, credit_Z: np.ndarray) -> Unit:
        """The state of a row under each prompt mask; every view scores all fills."""
        assert group.branch_step is not None and group.branch_ids is not None
        step = int(group.branch_step[row, 0])
        hidden_C = group.unmask_step[row] >= step
        fills = Fills(group.branch_ids[row, 0][:, hidden_C].astype(np.int64), credit_Z)
        weight = self.config.alpha / len(credit_Z)
        return tuple(
            View(
                *(index, row, hidden_C, np.flatnonzero(hidden_C)),
                credit=0.0,
                weight=weight,
                hidden_P=hidden_P,
                step=step,
                fills=fills,
                part=_STEP,
            )
            for hidden_P in hidden_NP
        )

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The base's loss of its units, and the loss of fills of the others; and the figures of both."""
        of_parts = ((self.base.loss, batch.of_part(0)), (self.fill_loss, batch.of_part(_STEP)))
        there = [(loss, *found) for loss, found in of_parts if found is not None]
        places = in_one_copy(scores.policy.logp_N.device, *(at_n for _, _, at_n in there))
        found = [loss(scores.at(at_n), own) for (loss, own, _), at_n in zip(there, places, strict=True)]
        losses, figures = zip(*found, strict=True)
        return sum(losses[1:], losses[0]), Statistics.merged(figures)

    def fill_loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The terms of L_step with their views' weights, summed over states and fills."""
        config, logp_S = self.config, scores.policy.logp_N
        assert scores.old is not None, "a ratio needs the old log-probs"
        first, Z = batch.first_views, config.samples
        number_F = np.concatenate([np.repeat(np.arange(Z), view.scored_n.size) for view in batch.views])
        credits = [view.fills.credit_F for view in first if view.fills is not None]
        values = [np.concatenate(credits), np.repeat([view.weight for view in first], Z)]
        fill_S, credit_F, weight_F = indices_and_values(
            logp_S.device, [batch.unit_of_score * Z + number_F], values, dtype=torch.float64
        )

        def of_fills(value_S: torch.Tensor) -> torch.Tensor:
            """[F], the mean over prompt masks of the sums over a fill's tokens."""
            return torch.zeros_like(credit_F).index_add(0, fill_S, value_S.double()) / config.prompt_masks

        terms = clipped_terms(of_fills(logp_S - scores.old.logp_N), credit_F, clip=(config.clip_low, config.clip_high))
        if config.beta > 0:
            assert scores.reference is not None, "beta > 0 needs the reference's log-probs"
            terms = terms.with_kl(of_fills(k3(logp_S, scores.reference.logp_N)), config.beta)
        loss = (weight_F * terms.loss_N).sum()
        return loss.to(logp_S.dtype), ratio_statistics(
            terms.log_ratio_N, terms.averages, prefix="fill_", count="scored_fills"
        )


def fill_advantages(group: TrajectoryGroup) -> np.ndarray:
    """[G, Z] float64, each fill's reward less the mean over those of the same state; exactly 0 where all are equal.

    Raises:
        DataError: when a reward isn't finite.
    """
    assert group.branch_rewards is not None, "DiSPO learns from completions of which a state was branched"
    return np.stack([group_advantages(rewards_ZR) for rewards_ZR in group.branch_rewards[:, 0]])
