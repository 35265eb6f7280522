"""TraFL (arXiv 2605.13935, eq. 4 and algorithm 1): the policy is fitted to p_base(y) exp(r(y) / tau), up to the law's
normaliser, by the square of what is left between likelihood ratio and reward.

With s the mean over K masks of the mean log-prob of the masked tokens (``learner.objectives.copies``: an evidence lower
bound over the length C), on the same masks for the policy and for the base without adapter, r the reward, and S
completions in the update,

    delta = s_policy - s_base - b * (r - the group's mean of r) + z
    loss = (1 / S) * sum over completions of  delta^2

z stands for the logarithm of the law's normaliser, per token. ``normaliser`` is where it comes from: ``learned``, a
head on the prompt (``learner.ranks.heads``), which the same loss trains; ``profiled``, the value that makes the group's
loss smallest, minus the group's mean of the rest of delta. (The gradient through it is 0, the group's deltas adding up
to 0.) With exact scores, on completions of the policy, the expected gradient is (2 / C^2) times that of KL(policy |
base) - b C E[r], with (G-1)/G before the reward, which the group's mean is taken off, and with ``profiled`` before the
KL too. b C is thus 1 / tau, which is reported; whether b or b C is the paper's constant is not known.

``paired`` masks are K / 2 masks and their complements, as published: the state that masks everything is never scored,
so s is a bound without that state. ``independent`` ones have any count from 1 on. The square of a mean over K masks has
their variance over K on top; with independent masks ``unbiased`` takes the products of different masks' deltas alone,

    delta^2  ->  (1 / (K (K-1))) * sum over j != k of  delta_j delta_k

whose mean is the square of the mean delta. Nothing here asks which policy wrote the completions: no ratio, no clip, and
stale completions are as good as fresh ones. The paper isn't at hand; this follows a port that cites it.

Shapes: G completions of a group, C completion positions, K masks; S completions and N scored tokens of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import HeadSpec, Needs, UpdateContext, Wanted
from learner.objectives.copies import copies, independent_masks, paired_masks
from learner.objectives.statistics import Statistics
from learner.settings.methods.bounds import TraflConfig
from rollout.copies import indices_and_values
from rollout.trajectory import TrajectoryGroup


class Trafl:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: TraflConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        config = self.config
        head = HeadSpec(config.head_width, config.head_lr) if config.normaliser == "learned" else None
        return Needs(law=Law.RAW, reference=True, head=head)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """What s_policy - s_base is to be, up to a constant of the group."""
        return tuple(self.config.b * group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """All completions, whatever they are credited with; where each meets the mean of the group's, as one unit."""
        K = self.config.samples
        rows = zip(range(group.size), self.draw(group, context), credit_G, strict=True)
        units: list[Unit] = [copies(index, row, mask_KC, credit, 1 / K) for row, mask_KC, credit in rows]
        if self.config.normaliser == "profiled":
            units = [tuple(view for unit in units for view in unit)]
        return Wanted(units, divisor=float(group.size), statistics=Statistics())

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> np.ndarray:
        """[G, K, C] bool, every row's masks; none is empty."""
        G, C = group.completion_ids.shape
        law = paired_masks if self.config.masks == "paired" else independent_masks
        return law(context.stream(group, "masks"), G, self.config.samples, C)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over completions, and its figures."""
        assert scores.reference is not None, "distances are from the base"
        learned = self.config.normaliser == "learned"
        K = int((batch.unit_of_view == 0).sum()) if learned else self.config.samples
        logp_N, unit_S = scores.policy.logp_N, batch.unit_of_view[::K]
        credits = np.array([view.credit for view in batch.views[::K]])
        view_N, to_unit_S, weight_N, credit_S, size_S = indices_and_values(
            logp_N.device,
            [batch.view_of_score, unit_S],
            [batch.weight, credits, np.bincount(unit_S)[unit_S]],
            dtype=torch.float64,
        )
        sums_Z = torch.zeros(len(batch.views), dtype=torch.float64, device=logp_N.device)
        sums_Z = sums_Z.index_add(0, view_N, weight_N * (logp_N - scores.reference.logp_N).double())
        log_ratio_SK = (self.config.samples * sums_Z).reshape(-1, K)
        rest_SK = log_ratio_SK - credit_S[:, None]
        if learned:
            assert scores.policy.value_Z is not None, "the normaliser is the head's"
            z_SK = scores.policy.value_Z.double().reshape(-1, K)
        else:
            z_SK = -_unit_means(rest_SK.detach(), to_unit_S, size_S)
        delta_SK = rest_SK + z_SK
        loss = self._squares(delta_SK).sum()
        return loss, self._figures(log_ratio_SK, credit_S, z_SK, delta_SK, batch)

    def _squares(self, delta_SK: torch.Tensor) -> torch.Tensor:
        """[S], each completion's squared delta."""
        if not self.config.unbiased:
            return delta_SK.mean(1).square()
        K = self.config.samples
        return (delta_SK.sum(1).square() - delta_SK.square().sum(1)) / (K * (K - 1))

    def _figures(
        self,
        log_ratio_SK: torch.Tensor,
        credit_S: torch.Tensor,
        z_SK: torch.Tensor,
        delta_SK: torch.Tensor,
        batch: ViewBatch,
    ) -> Statistics:
        S = float(credit_S.numel())
        sums = torch.stack(
            [
                log_ratio_SK.mean(1).sum(),
                z_SK.mean(1).sum(),
                delta_SK.mean(1).square().sum(),
                credit_S.square().sum(),
                delta_SK.var(1, correction=0).sum(),
            ]
        )
        log_ratio, z, residual, target, masks = sums.detach().tolist()
        extensive = self.config.b * batch.views[0].hidden_C.size
        return Statistics(
            means={
                "log_ratio/reference": (log_ratio, S),
                "normaliser": (z, S),
                "reward_weight/completion": (extensive * S, S),
            },
            rms={"residual": (residual, S), "residual/target": (target, S), "residual/between_masks": (masks, S)},
            totals={"scored_completions": S, "scored_tokens": float(batch.targets.size)},
        )


def _unit_means(value_SK: torch.Tensor, unit_S: torch.Tensor, size_S: torch.Tensor) -> torch.Tensor:
    """[S, K], for each completion the mean over its unit's, which are ``size_S``."""
    sums_UK = torch.zeros_like(value_SK).index_add(0, unit_S, value_SK)  # units are no more than completions
    return sums_UK[unit_S] / size_S[:, None]
