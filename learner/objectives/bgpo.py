"""BGPO (arXiv 2510.11683): a lower bound of the objective with one ratio per completion, which is a sum over masks, so
that any number of them can be scored without being held in memory together.

R copies of a completion mask n of its C positions, n uniform on 1..C (``learner.objectives.copies``). One copy's
estimate of the completion's evidence lower bound, over C, is the mean log-prob of its masked tokens. With A the reward
minus its group's mean, and d_k the mean over copy k's masked tokens of logp_j - logp_old_j (old: of the weights that
the batch's first update began with, on the same copies),

    g_k  = 1 + d_k where A > 0,  exp(d_k) where A < 0
    loss = mean over completions, copies k of  -min(g_k A, clip(g_k, 1 - clip_low, 1 + clip_high) A)

The ratio of the completion's bounds is exp(mean over k of d_k), in which all copies meet. It is at least the mean of
1 + d_k (the tangent of exp at 0) and at most the mean of exp(d_k) (Jensen), so without the clip the mean of g_k A is
below the ratio times A for either sign of A, and equal to it, with its gradient, before the batch's weights have moved.
Each copy is clipped by itself.

The formula is that of code which came from the authors' (in DARE); of the paper we have parts only. There the log-ratio
is put as log(1 + d), which is no number below d = -1, and ratios are cut off at 3 where A < 0, which a mean over tokens
doesn't reach. Advantages, clip widths and the number of copies are settings of its framework: ours are marked so.

Shapes: G completions of a group, C completion positions, R copies, U copies of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.copies import copies, independent_masks
from learner.objectives.elbo import Units
from learner.objectives.ratio import clipped_terms, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.bounds import BgpoConfig
from rollout.trajectory import TrajectoryGroup


class Bgpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    needs = Needs(law=Law.RAW, old=True)

    def __init__(self, config: BgpoConfig) -> None:
        self.config = config

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The copies of each row with an advantage, each a unit of its own."""
        R, (G, C) = self.config.samples, group.completion_ids.shape
        mask_GRC = independent_masks(context.stream(group, "masks"), G, R, C)
        live = np.flatnonzero(credit_G)
        views = [
            view for row in live for view in copies(index, int(row), mask_GRC[row], float(credit_G[row]), weight=1.0)
        ]
        statistics = Statistics(totals={"live_completions": float(live.size)})
        return Wanted([(view,) for view in views], divisor=float(G * R), statistics=statistics)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over copies, and their figures."""
        assert scores.old is not None, "a ratio needs the old log-probs"
        logp_N = scores.policy.logp_N
        units = Units.of(batch, logp_N.device)
        d_U, advantage_U = units.sums(logp_N - scores.old.logp_N), units.credit_U
        terms = clipped_terms(
            d_U,
            advantage_U,
            clip=(self.config.clip_low, self.config.clip_high),
            ratio_N=torch.where(advantage_U > 0, 1.0 + d_U, d_U.exp()),
        )
        return terms.loss_N.sum(), ratio_statistics(d_U, terms.averages, count="scored_copies")
