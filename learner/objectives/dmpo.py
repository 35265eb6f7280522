"""DMPO (arXiv 2510.08233): the policy is fitted by cross-entropy to p_base(y) exp(r(y) / alpha), of which its own
completions are a self-normalised importance sample.

With ELBO the bound of a completion's log-likelihood from masked copies (below), of the base without adapter and of the
policy that the batch begins with, and r the reward,

    d_g = ELBO_base - ELBO_policy
    w+  = softmax over the group of  c (d + r / alpha),   w- = softmax over the group of  c (d - r / alpha)
    W   = w+ - centering_strength * (w- | the mean of w+ | u)
    u   = softmax over the group of  ELBO_present - ELBO_policy        (``centering: unbiased``)
    loss = - mean over groups of  sum over completions g, copies k of  W_g / (R m_k) * sum over j masked of logp_j

The bounds are measured once per batch, without gradient, policy and base on the same copies; the copies of the loss are
fresh in every update. alpha 0 stands for weights from the rewards alone, softmax of +-c r. c is 1, or with
``ess_target`` the largest value up to 1 at which the effective sample size of w+, 1 / sum of w+^2, is that share of the
group. No ratio, no clip, no KL: the base is in the target.

ELBO_present is the bound of the policy just before an update, on the copies of that update's loss, and u is without
gradient. The completions being ELBO_policy's, u weighs them as the present policy would draw them, and a likelihood's
expected gradient under its own law is 0: what is taken off is noise alone, where a mean pulls too once the policy has
moved. The two bounds have copies of their own, as in the code, so that u is noisy already in a batch's first update.

A copy masks each position with probability lambda = rate_low + (1 - rate_low) U, whatever it holds: what follows the
first EOS is masked and scored too. Antithetic copies come in pairs of a mask and its complement. m is the number of
masked positions, and ELBO = mean over copies of (C / m) * sum over j masked of logp_j: with rates from [0.1, 1] and C/m
for the exact (C + 1)/m this is not quite the bound, and it cancels in d for the most part.

The authors' code sums over the rows of a micro-batch where this is the mean over groups; it solves one c for all rows
of a process, and logs an effective sample size over them; here both are a group's. It takes the mean and u over a
micro-batch, here over a group, and ELBO_present from the loss' own scores, which here are measured before: a group's
rows may be on several ranks.

Shapes: G completions of a group, C completion positions, R copies, N scored tokens of a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, ViewBatch
from learner.objectives.advantages import softmax, total_rewards
from learner.objectives.base import FinalCredit, Needs, RowSums, UpdateContext, Wanted
from learner.objectives.copies import copies
from learner.objectives.ratio import weighted_likelihood
from learner.objectives.statistics import Statistics
from learner.settings.methods.bounds import DmpoConfig
from rollout.trajectory import TrajectoryGroup


class Weights(NamedTuple):
    """Of a group, each [G] float64."""

    plus_G: np.ndarray
    centre_G: np.ndarray
    """What is taken from it, before its strength."""
    final_G: np.ndarray
    """W"""

    @property
    def ess(self) -> float:
        """Effective sample size of w+, as a share of the group."""
        return effective_share(self.plus_G)


class Dmpo:
    """The method as ``learner.objectives.base.Remeasured`` wants it."""

    measures_each_update = False

    def __init__(self, config: DmpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """As if policy and base agreed."""
        return tuple(self.weights(np.zeros(group.size), total_rewards(group.rewards)).final_G for group in groups)

    def measured(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> Sequence[Unit]:
        """The copies of every row, weighted so that a row's sum is its bound."""
        return bound_units(index, self.draw(group, self.config.measured_samples, context, "measured masks"))

    def remeasured(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> Sequence[Unit]:
        """The copies of the update's loss, weighted likewise; none without unbiased centering."""
        if self.config.centering != "unbiased":
            return []
        return bound_units(index, self.draw(group, self.config.samples, context, "masks"))

    def weigh(self, groups: Sequence[TrajectoryGroup], credit: Sequence[np.ndarray], sums: RowSums) -> FinalCredit:
        found = [
            self.weights(
                sums.reference[i] - sums.policy[i],
                total_rewards(group.rewards),
                moved_G=sums.present[i] - sums.policy[i] if sums.present else None,
            )
            for i, group in enumerate(groups)
        ]
        means = {"ess": (sum(weights.ess for weights in found), float(len(found)))}
        return FinalCredit(tuple(weights.final_G for weights in found), Statistics(means=means))

    def weights(
        self,
        difference_G: np.ndarray,
        reward_G: np.ndarray,
        coefficient: float | None = None,
        moved_G: np.ndarray | None = None,
    ) -> Weights:
        """From d and r of a group.

        Args:
            coefficient: c; None for what the settings say.
            moved_G: [G] float64, ELBO_present - ELBO_policy; None where it wasn't measured, as if there were no move.
        """
        config = self.config
        if (reward_G == reward_G[0]).all():
            reward_G = np.zeros_like(reward_G)  # no signal: w+ and w- are the same to the last bit
        if config.alpha == 0:
            up_G, down_G = reward_G, -reward_G
        else:
            up_G, down_G = difference_G + reward_G / config.alpha, difference_G - reward_G / config.alpha
        c = self.coefficient(up_G) if coefficient is None else coefficient
        plus_G = softmax(c * up_G)
        if config.centering == "negative":
            centre_G = softmax(c * down_G)
        elif config.centering == "unbiased" and moved_G is not None:
            centre_G = softmax(moved_G)
        else:
            centre_G = np.full(plus_G.size, plus_G.mean())
        return Weights(plus_G, centre_G, plus_G - config.centering_strength * centre_G)

    def coefficient(self, up_G: np.ndarray) -> float:
        """c, by bisection: as it rises from 0, the effective sample size falls from G."""
        target = self.config.ess_target
        if target is None or effective_share(softmax(up_G)) >= target:
            return 1.0
        low, high = 0.0, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if effective_share(softmax(middle * up_G)) >= target else (low, middle)
        return low

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """Fresh copies of each row with a weight; the loss is a sum, so each is a unit of its own."""
        mask_GRC = self.draw(group, self.config.samples, context, "masks")
        R, live = mask_GRC.shape[1], np.flatnonzero(credit_G)
        views = [view for row in live for view in copies(index, int(row), mask_GRC[row], float(credit_G[row]), 1 / R)]
        statistics = Statistics(totals={"live_completions": float(live.size)})
        return Wanted([(view,) for view in views], divisor=1.0, statistics=statistics)

    def draw(self, group: TrajectoryGroup, samples: int, context: UpdateContext, purpose: str) -> np.ndarray:
        """[G, R, C] bool, every row's masks."""
        stream = context.stream(group, purpose)
        G, C = group.completion_ids.shape
        drawn = samples // 2 if self.config.antithetic else samples
        rate_GR = self.config.rate_low + (1.0 - self.config.rate_low) * stream.random((G, drawn))
        mask_GRC = stream.random((G, drawn, C)) < rate_GR[:, :, None]
        return np.concatenate([mask_GRC, ~mask_GRC], axis=1) if self.config.antithetic else mask_GRC

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """Minus the sum over tokens of W times weight times log-prob."""
        return weighted_likelihood(scores.policy.logp_N, batch)


def bound_units(index: int, mask_GRC: np.ndarray) -> list[Unit]:
    """Every row's copies, weighted so that a row's sum is its bound."""
    G, R, C = mask_GRC.shape
    return [copies(index, row, mask_GRC[row], credit=0.0, weight=C / R) for row in range(G)]


def effective_share(weight_G: np.ndarray) -> float:
    """Of weights that sum to 1, in [1/G, 1]."""
    return float(1.0 / (weight_G.size * np.square(weight_G).sum()))
