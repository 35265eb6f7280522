"""RSPO (arXiv 2605.10218, eq. 3.3): advantage is read as how far a completion's likelihood should be from the base's,
and the update is proportional to what is left of that.

With s the mean over K masks of the mean log-prob of the masked tokens (``learner.objectives.copies``: the evidence
lower bound over the length), A the advantage, z-scored over the group, and S completions in the update,

    d = s_policy - s_base,   dhat = d - the mean of d over the update
    w = A - lam * dhat, without gradient
    loss = - (1 / S) * sum over completions of  w * s_policy

whose gradient is that of (lam / S) * sum of (dhat - A / lam)^2 / 2: a completion that is as far from the base as
A / lam says isn't pushed any further, and lam 0 leaves plain advantage-weighted likelihood. Where A is 0 everywhere,
dhat is drawn to 0. No ratio, no clip; the base is the policy without adapter, and stays as it is.

Policy and base are measured on the masks of the loss, before every update, on all ranks together: the mean is over all
of the update's completions. (The sum of all dhat being 0, a loss of -w * dhat has the same gradient: what the base adds
is constant, and so is the mean.)

The authors' code was not at hand. A port that cites the equation centres d over a micro-batch, so that its gradient
depends on how completions are dealt out. It draws a mask by a rate that is uniform on [0, 1], again where the mask is
empty; a count uniform on 1..C is the same law.

Shapes: G completions of a group, C completion positions, K masks, N scored tokens of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, ViewBatch
from learner.objectives.advantages import total_rewards, z_scores
from learner.objectives.base import FinalCredit, Needs, RowSums, UpdateContext, Wanted
from learner.objectives.copies import copies, independent_masks
from learner.objectives.ratio import weighted_likelihood
from learner.objectives.statistics import Statistics
from learner.settings.methods.bounds import RspoConfig
from rollout.trajectory import TrajectoryGroup


class Rspo:
    """The method as ``learner.objectives.base.Weighed`` wants it."""

    measures_each_update = True

    def __init__(self, config: RspoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """A, which is w as long as policy and base agree."""
        return tuple(z_scores(total_rewards(group.rewards)) for group in groups)

    def measured(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> Sequence[Unit]:
        """The views of the loss of every row, weighted so that a row's sum is s."""
        mask_GKC = self.draw(group, context)
        return [
            copies(index, row, mask_KC, credit=0.0, weight=1 / len(mask_KC)) for row, mask_KC in enumerate(mask_GKC)
        ]

    def weigh(self, groups: Sequence[TrajectoryGroup], credit: Sequence[np.ndarray], sums: RowSums) -> FinalCredit:
        """w of every completion."""
        advantage_S, d_S = np.concatenate(credit), np.concatenate(sums.policy) - np.concatenate(sums.reference)
        dhat_S = d_S - d_S.mean()
        pull_S = self.config.lam * dhat_S
        S = float(d_S.size)
        figures = Statistics(
            means={
                "log_ratio/reference": (float(d_S.sum()), S),
                "residual/overshot_share": (float((pull_S * np.sign(advantage_S) > abs(advantage_S)).sum()), S),
            },
            rms={
                "log_ratio/centred": (float(np.square(dhat_S).sum()), S),
                "residual": (float(np.square(advantage_S - pull_S).sum()), S),
            },
        )
        starts = np.cumsum([group.size for group in groups])[:-1]
        return FinalCredit(tuple(np.split(advantage_S - pull_S, starts)), figures)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The masks that were measured, of each row with a weight; the loss is a sum, so each is a unit of its own."""
        mask_GKC, live = self.draw(group, context), np.flatnonzero(credit_G)
        K = self.config.samples
        views = [view for row in live for view in copies(index, int(row), mask_GKC[row], float(credit_G[row]), 1 / K)]
        statistics = Statistics(totals={"live_completions": float(live.size)})
        return Wanted([(view,) for view in views], divisor=float(group.size), statistics=statistics)

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> np.ndarray:
        """[G, K, C] bool, every row's masks."""
        G, C = group.completion_ids.shape
        return independent_masks(context.stream(group, "masks"), G, self.config.samples, C)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """Minus the sum over tokens of w times weight times log-prob."""
        return weighted_likelihood(scores.policy.logp_N, batch)
