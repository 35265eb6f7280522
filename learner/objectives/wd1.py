"""wd1 (arXiv 2507.08838): no ratio; a text's log-likelihood is raised with one softmax of the advantages, and lowered
with another.

The log-likelihood is the one-step one of ``learner.objectives.one_step``: completion masked whole, each prompt token
with ``prompt_mask``. With A the reward minus its group's mean, over the completions i of a group,

    w+ = softmax(psi A),  w- = softmax(-psi A)
    l  = - sum over i of (w+_i - negative_weight * w-_i) * sum over tokens j of logp_ij

and the loss is the mean of l over groups. A completion's credit is w+_i - negative_weight * w-_i: the credits of a
group sum to 0 with negative_weight 1, and are all 0 when its rewards are equal. There is no division by a length or by
the number of completions, no old and no reference policy, although several updates are made on a batch: nothing but
their number holds the policy near the one that sampled.

The authors' code takes both softmaxes over the micro-batch of a device, which is one group as they set it; where it
holds several, ``softmax_over: batch`` has that behaviour, over all groups of the update: psi is 1 in it. A variant of
theirs without the second half is ``negative_weight: 0``; their variant with a reference policy fails as released.

Shapes: G completions of a group, R of all groups, N scored tokens of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, ViewBatch
from learner.objectives.advantages import group_advantages, softmax
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.one_step import draw_prompt_masks, one_step_unit
from learner.objectives.ratio import weighted_likelihood
from learner.objectives.statistics import Statistics
from learner.settings.methods.one_step import Wd1Config
from rollout.trajectory import TrajectoryGroup


class Wd1:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: Wd1Config) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        advantages = [group_advantages(group.rewards) for group in groups]
        if self.config.softmax_over == "group":
            return tuple(map(self._weights, advantages))
        bounds = np.cumsum([advantages_G.size for advantages_G in advantages])[:-1]
        return tuple(np.split(self._weights(np.concatenate(advantages)), bounds))

    def _weights(self, advantages_R: np.ndarray) -> np.ndarray:
        """[R], w+ - negative_weight * w- of completions that share their softmaxes."""
        scaled_R = self.config.psi * advantages_R
        return softmax(scaled_R) - self.config.negative_weight * softmax(-scaled_R)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """One view of each row with a weight."""
        hidden_GP = draw_prompt_masks(group, self.config.prompt_mask, context)
        lengths_G = text_lengths(group, context.eos_ids)
        live = np.flatnonzero(credit_G)
        units = [
            one_step_unit(group, index, int(row), hidden_GP[row], int(lengths_G[row]), float(credit_G[row]), 1.0)
            for row in live
        ]
        # Softmaxes over the batch sum to 1 once, those over groups once for each group.
        divisor = 1.0 if self.config.softmax_over == "group" else 1.0 / context.groups
        return Wanted(units, divisor, Statistics(totals={"live_completions": float(live.size)}))

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over tokens of minus their credit times their log-prob; and the mean log-prob of either kind."""
        return weighted_likelihood(scores.policy.logp_N, batch)
