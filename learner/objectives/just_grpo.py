"""JustGRPO (arXiv 2601.15165): the rollout writes left to right, one token a step, and is learned from as an
autoregressive model's.

A completion of L positions has a view for each: all before it shown, it and all behind it masked, which is the state in
which it was drawn, so its log-prob is exact, and the one that the rollout recorded is the old one. With A the reward
minus its group's mean, over the deviation of the group's rewards (of a sample, plus 1e-4),

    rho_j = exp(logp_j - logp_rollout_j)
    l_j   = -min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A) + beta * k3_j
    k3_j  = exp(d_j) - d_j - 1,  d_j = logp_reference_j - logp_j

and the loss is the sum of l_j over all drawn positions of the completions whose A isn't 0, divided by L times their
number: a completion without an advantage is neither scored nor counted, with a KL term too. What was drawn behind the
first EOS counts, as in the authors' code. They call the divisor a share of valid samples, but it is their number per
device; one update for each batch, at temperature 1, makes their ratio 1 and their old log-probs unnecessary. beta is
ours, 0 by default.

``share`` below 1 is the fast variant: of each block of the sampler's ``block_length``, only that share of positions is
scored, those with the largest entropy when they were drawn, and L in the divisor is their number. It is biased: the
positions that are left out have gradients too. But which ones they are depends on the states alone, not on the tokens
that were drawn there, so what is scored keeps its own gradient unbiased. (A public implementation picks the tokens of
the smallest probability instead, which depends on the draw.)

Shapes: G completions of a group, C completion positions, N scored tokens of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import ViewBatch, step_view
from learner.objectives.advantages import total_rewards, z_scores
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.ratio import clipped_token_loss
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import JustGrpoConfig
from rollout.trajectory import TrajectoryGroup


class JustGrpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: JustGrpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(z_scores(total_rewards(group.rewards)) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """A view of each scored position of the rows with an advantage."""
        sampler, live = group.sampler, np.flatnonzero(credit_G)
        per_block = self.config.scored_per_block(sampler)
        units = [
            (step_view(group, index, int(row), int(group.unmask_step[row, j]), float(credit_G[row]), weight=1.0),)
            for row in live
            for j in least_confident(group.entropy[row], group.drawn[row], sampler.block_length, per_block)
        ]
        positions = per_block * (sampler.completion_length // sampler.block_length)
        statistics = Statistics(totals={"live_completions": float(live.size)})
        return Wanted(units, divisor=float(positions * live.size), statistics=statistics)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over tokens of l_j; and their figures."""
        config = self.config
        return clipped_token_loss(scores, None, batch, clip=(config.clip_low, config.clip_high), beta=config.beta)


def least_confident(entropy_C: np.ndarray, drawn_C: np.ndarray, block_length: int, per_block: int) -> np.ndarray:
    """The ``per_block`` drawn positions of each block with the largest entropy, ascending; among equals the first."""
    chosen = []
    for start in range(0, drawn_C.size, block_length):
        drawn = start + np.flatnonzero(drawn_C[start : start + block_length])
        order = np.argsort(-entropy_C[drawn], kind="stable")
        chosen.append(np.sort(drawn[order[:per_block]]))
    return np.concatenate(chosen)
