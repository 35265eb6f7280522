"""ESPO (arXiv 2512.03759): the sequence is the action, and its log-likelihood is estimated by its evidence lower bound.

All C positions of a completion count, fillers and what follows the first EOS among them. For each of M samples, row i
of a group's G gets a count x of positions to mask, uniform on 0..C and spread evenly over the rows,

    x_i = (k + round(i (C + 1) / G)) mod (C + 1),  k uniform on 0..C

and a random set of that many positions. One sample's estimate of the bound is

    plain:    (C + 1) / x * sum over the masked j of log p(y_j | mask)
    coupled:  1/2 of that, and 1/2 of the same for the mask's complement, of which C - x are masked

where a term of no positions is 0, and L is the mean over the samples: unbiased, coupled ones with far less variance.
With rho = exp((L - L_old) / C), the leave-one-out advantage A and S completions, the loss is

    (1 / S) * sum over completions of  -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta * k2 / C

(``learner.objectives.elbo``). With clip widths of 0, one of the published settings, the gradient at a ratio of exactly
1 (the first update on a batch) is the unclipped one; later updates have one where they undo what earlier ones did.

The authors' code spreads the counts over the rows of a micro-batch of b, and rounds k + i (C + 1) / b, half to even.
Where that is a half (b = 2 or 6 and C = 256, say) one row never gets half of the counts, and the other half twice as
often; rounding before k is added is the same everywhere else, and uniform there too. Its setting ``reduce_var`` isn't
read: the coupled estimator is always on.

Shapes: G completions of a group, C completion positions, M samples.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.masks import random_subset
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, View, ViewBatch
from learner.objectives.advantages import leave_one_out_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.elbo import BoundTerms, bound_terms, completion_length
from learner.objectives.statistics import Statistics
from learner.settings.methods.bounds import EspoConfig
from rollout.trajectory import TrajectoryGroup


class Espo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: EspoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW, old=True, reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(leave_one_out_advantages(group.rewards, scale=self.config.scale_advantages) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """One unit for each row that has a gradient: those with an advantage, all of them when there is a KL term. (A
        row whose plain samples all mask nothing has none.)"""
        mask_GMC = self.draw(group, context)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        units = [self.unit(index, row, mask_GMC[row], float(credit_G[row])) for row in live]
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted([unit for unit in units if unit], divisor=float(group.size), statistics=statistics)

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> np.ndarray:
        """[G, M, C] bool, every row's masks."""
        stream = context.stream(group, "masks")
        G, C = group.completion_ids.shape
        mask_GMC = np.zeros((G, self.config.samples, C), dtype=bool)
        for sample in range(self.config.samples):
            counts_G = stratified_counts(int(stream.integers(C + 1)), G, C)
            for row, count in enumerate(counts_G):
                mask_GMC[row, sample] = random_subset(stream, C, int(count))
        return mask_GMC

    def unit(self, index: int, row: int, mask_MC: np.ndarray, credit: float) -> Unit:
        """The views of one completion, weighted so that the sum over their scores is L."""
        M, C = mask_MC.shape
        coupled = self.config.estimator == "coupled"
        hidden = [side_C for mask_C in mask_MC for side_C in ((mask_C, ~mask_C) if coupled else (mask_C,))]
        return tuple(
            View(index, row, side_C, np.flatnonzero(side_C), credit, weight=(C + 1) / side_C.sum() / len(hidden))
            for side_C in hidden
            if side_C.any()
        )

    def terms(self, scores: PolicyScores, batch: ViewBatch) -> BoundTerms:
        """Bound, ratio, clipped term and k2 of each completion."""
        clip = (self.config.clip_low, self.config.clip_high)
        return bound_terms(scores, batch, clip=clip, exponent=1 / completion_length(batch))

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over completions, and its figures."""
        return self.terms(scores, batch).loss(beta=self.config.beta, factor=1.0)


def stratified_counts(offset: int, rows: int, length: int) -> np.ndarray:
    """[rows] int64 in 0..length, as evenly spread as whole numbers are; each uniform when ``offset`` is."""
    return (offset + np.rint(np.arange(rows) * (length + 1) / rows).astype(np.int64)) % (length + 1)
