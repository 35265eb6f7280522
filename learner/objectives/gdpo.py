"""GDPO (arXiv 2510.08554): a clipped ratio of evidence lower bounds, which are integrated over few fixed mask rates.

The bound is the integral over t in [0, 1] of (1 / t) * E[sum of log p(y_j | mask) over the masked j] with a share t
masked. Most of the noise of the usual estimate comes from drawing t, so t isn't drawn: with the nodes t_n and weights
w_n of Gauss-Legendre on [0, 1], exact for polynomials in t up to degree 2N - 1,

    x_n = max(1, round(t_n C));  L = sum over n of  w_n * (C / x_n) * sum over the masked j of log p(y_j | mask_n)

with mask_n a random set of x_n of the C positions; what follows the first EOS counts as any other. With
A = reward - mean of the group and rho = exp(L - L_old), the loss over S completions is

    (1 / S) * sum over completions of  (1 / C) * -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta * k2 / C

(``learner.objectives.elbo``). The exponent isn't divided by C: the more positions, the sooner ratios are
clipped off the policy. ``normalise_ratio`` divides it too; the gradient at a ratio of 1 is then C times smaller.

x_n / C is the share that is masked in fact, so it and not t_n divides: with 1 / t_n, as published for masks whose
count is t_n C in the mean, a count that was rounded would scale its whole term (C = 24: the bound by 2.6 %). What is
known of the authors' code is second-hand; their estimator of the KL and clip widths were not published.

Shapes: G completions of a group, C completion positions, N nodes.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.masks import random_subset
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, View, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.elbo import bound_terms, completion_length
from learner.objectives.statistics import Statistics
from learner.settings.methods.bounds import GdpoConfig
from rollout.trajectory import TrajectoryGroup


class Gdpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: GdpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW, old=True, reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """One unit for each row that has a gradient: those with an advantage, all of them when there is a KL term."""
        mask_GNC = self.draw(group, context)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        units = [self.unit(index, row, mask_GNC[row], float(credit_G[row])) for row in live]
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted(units, divisor=float(group.size), statistics=statistics)

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> np.ndarray:
        """[G, N, C] bool, every row's masks, by ascending node."""
        stream = context.stream(group, "masks")
        G, C = group.completion_ids.shape
        counts_N = masked_counts(self.config.nodes, C)
        return np.array([[random_subset(stream, C, int(count)) for count in counts_N] for _ in range(G)])

    def unit(self, index: int, row: int, mask_NC: np.ndarray, credit: float) -> Unit:
        """The views of one completion, weighted so that the sum over their scores is L."""
        _, weight_N = quadrature(len(mask_NC))
        return tuple(
            View(index, row, mask_C, np.flatnonzero(mask_C), credit, weight=float(weight / mask_C.mean()))
            for mask_C, weight in zip(mask_NC, weight_N, strict=True)
        )

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over completions, and its figures."""
        config, per_token = self.config, 1 / completion_length(batch)
        exponent = per_token if config.normalise_ratio else 1.0
        terms = bound_terms(scores, batch, clip=(config.clip_low, config.clip_high), exponent=exponent)
        return terms.loss(beta=config.beta, factor=per_token)


def quadrature(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes, ascending, and weights of Gauss-Legendre on [0, 1], each [N] float64; the weights sum to 1."""
    at_N, weight_N = np.polynomial.legendre.leggauss(nodes)
    return (at_N + 1) / 2, weight_N / 2


def masked_counts(nodes: int, length: int) -> np.ndarray:
    """[N] int64 in 1..length, how many positions each node masks."""
    return np.maximum(1, np.rint(quadrature(nodes)[0] * length).astype(np.int64))
