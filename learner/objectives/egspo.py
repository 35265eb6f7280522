"""EGSPO and EGSPO-SA: the denoising steps of the largest entropy, each as one action (arXiv 2603.12554).

Of each completion the ``k`` steps are taken whose drawn tokens had the largest mean entropy, rank 0 the largest. With
R the reward, and R_s that of the likeliest fill of the state before step s (``GreedyBranches``), the return is

    (R + lam (R - R_s)) / (1 + lam)                             without the division where ``normalise`` is false

and its advantage A that less the mean over the steps of the same rank of the group's other completions and itself, with
no division by a deviation. lam = 0 is EGSPO, whose A is one for all steps and which grades no fills. A step writes U
tokens; with the sums over them,

    rho  = exp(sum logp - sum logp_rollout)
    loss = (1/u) (-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta * KL),   u = C / m, tokens of a step
    KL   = exp(d) - d - 1,  d = sum logp_reference - sum logp;    or the sum of the whole laws' KL (``kl: exact``)

averaged over completions and their k steps. The old log-probs are those that the rollout recorded, at temperature 1.

On the policy that drew the batch, with all steps taken and positions chosen without the policy, EGSPO's gradient is
1/(u m) (G-1)/G times that of expected reward. R_s is a function of the state alone and changes no expectation; but the
mean at equal rank does. A step's rank depends on entropies of later steps, so on what the step itself drew, and means
differ from rank to rank: EGSPO-SA as published is biased (by 2 to 30 % on tables of two to four positions).
``centre: reward``, A = (R - mean R + lam (R - R_s)) / (1 + lam), is not: its gradient is 1/(u m) ((G-1)/G + lam) /
(1 + lam) times that of expected reward.

A completion that ended early has fewer than k steps; they stay in the divisor, and means are over those that have the
rank. The choice of a step's positions counts as no action.

The authors' code takes the steps of a rollout one rank after the other, k / accumulation updates in all, where this is
one update on all of them. It ranks by the entropy at temperature 1 over the whole vocabulary, this by that of the law
that drew the tokens. With k = 1 it compares the policy with itself (rho = 1), whatever the rollout recorded. Its
``mean`` also divides the exact KL by the size of the vocabulary, as ours does. It can halve lam on the way and take
evenly spaced steps; neither is offered.

Shapes: G completions of a group, S = k steps of each, C completion positions, N scored tokens and Z views of a batch, V
vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, ViewBatch, step_view
from learner.objectives.advantages import fill_rewards, group_advantages, total_rewards
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.ratio import ClippedTerms, clipped_terms, k3, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.branches import EgspoConfig
from rewards.errors import DataError
from rollout.copies import indices_and_values
from rollout.sampling.branches import highest_entropy_steps, last_branch_step
from rollout.trajectory import TrajectoryGroup


class Steps(NamedTuple):
    """What is known of a batch's views, each a step, on the scores' device and in their dtype."""

    of_score_N: torch.Tensor
    """[N] int64, the view of each score."""
    rollout_logp_N: torch.Tensor
    """[N], what the rollout recorded."""
    credit_Z: torch.Tensor
    """[Z]"""
    size_Z: torch.Tensor
    """[Z], how many scores the view has."""


class StepTerms(NamedTuple):
    """Of a batch's views, each [Z]."""

    steps: Steps
    logp_Z: torch.Tensor
    clipped: ClippedTerms
    """The ratio, and the loss with the KL, not yet divided by the tokens of a step."""


class Egspo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: EgspoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        reference = self.config.beta > 0
        return Needs(law=Law.RAW, reference=reference, vocabulary=reference and self.config.kl == "exact")

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """[G] of EGSPO, [G, S] of EGSPO-SA, 0 where a completion has no step of the rank."""
        if self.config.lam == 0:
            return tuple(group_advantages(group.rewards) for group in groups)
        return tuple(self.step_advantages(group) for group in groups)

    def step_advantages(self, group: TrajectoryGroup) -> np.ndarray:
        """[G, S] float64, of a group with branches.

        Raises:
            DataError: when a reward isn't finite, or the reward has no component that ``step_reward`` names.
        """
        lam = self.config.lam
        assert group.branch_step is not None, "EGSPO-SA learns from completions whose states were branched"
        there_GS = group.branch_step >= 0
        reward_G1 = total_rewards(group.rewards)[:, None]
        gain_GS = reward_G1 - self.fill_rewards(group)
        if self.config.centre == "reward":
            advantage_GS = group_advantages(group.rewards)[:, None] + lam * gain_GS
        else:
            return_GS = reward_G1 + lam * gain_GS
            advantage_GS = np.zeros_like(return_GS)
            for there_G, return_G, advantage_G in zip(there_GS.T, return_GS.T, advantage_GS.T, strict=True):
                if there_G.any():
                    advantage_G[there_G] = group_advantages(return_G[there_G, None])
        return np.where(there_GS, advantage_GS / (1.0 + lam if self.config.normalise else 1.0), 0.0)

    def fill_rewards(self, group: TrajectoryGroup) -> np.ndarray:
        """[G, S] float64, the rewards of the likeliest fills."""
        assert group.branch_rewards is not None
        rewards_GSR, names, wanted = group.branch_rewards[:, :, 0], group.reward_names, self.config.step_reward
        if wanted is not None:
            if wanted not in names:
                raise DataError(
                    f"objective.step_reward={wanted} is no component of the reward; take {', '.join(names)}"
                )
            rewards_GSR = rewards_GSR[:, :, [names.index(wanted)]]
        return fill_rewards(rewards_GSR)

    def steps(self, group: TrajectoryGroup, eos_ids: tuple[int, ...]) -> np.ndarray:
        """[G, S] int16, the steps by rank, -1 for none: those that were branched, or would have been."""
        if self.config.lam > 0:
            assert group.branch_step is not None
            return group.branch_step
        until_last_token = self.config.step_range == "until_last_token"
        last_G = last_branch_step(group.completion_ids, group.unmask_step, eos_ids, until_last_token=until_last_token)
        return highest_entropy_steps(group.unmask_step, group.drawn, group.entropy, states=self.config.k, last_G=last_G)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """A view of each step that has a gradient: those with an advantage, all of them when there is a KL term."""
        step_GS = self.steps(group, context.eos_ids)
        credit_GS = np.broadcast_to(credit_G.reshape(group.size, -1), step_GS.shape)
        live_GS = (step_GS >= 0) & ((credit_GS != 0) | self.needs.reference)
        units = [
            (step_view(group, index, int(row), int(step_GS[row, rank]), float(credit_GS[row, rank]), 1.0),)
            for row, rank in zip(*np.nonzero(live_GS), strict=True)
        ]
        totals = {"live_completions": float(live_GS.any(axis=1).sum()), "missing_steps": float((step_GS < 0).sum())}
        return Wanted(units, divisor=float(step_GS.size) * self.per_step(group), statistics=Statistics(totals=totals))

    def per_step(self, group: TrajectoryGroup) -> float:
        """u, by which the loss of a step is divided."""
        return group.sampler.completion_length / group.sampler.steps if self.config.aggregate == "sum" else 1.0

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over steps of u times their loss; and their figures."""
        clipped = self.terms(scores, batch).clipped
        return clipped.loss_N.sum(), ratio_statistics(clipped.log_ratio_N, clipped.averages, count="scored_steps")

    def terms(self, scores: PolicyScores, batch: ViewBatch) -> StepTerms:
        """What the loss of each view is made of; ratios are those of the whole step."""
        config, policy, reference = self.config, scores.policy, scores.reference
        assert batch.logp is not None, "every view is a recorded state"
        logp_N, view_N = policy.logp_N, batch.view_of_score
        values = [batch.logp, np.array([view.credit for view in batch.views]), np.bincount(view_N)]
        steps = Steps(*indices_and_values(logp_N.device, [view_N], values, dtype=logp_N.dtype))
        logp_Z = self.of_steps(logp_N, steps)
        log_ratio_Z = self.of_steps(logp_N - steps.rollout_logp_N, steps)
        clipped = clipped_terms(log_ratio_Z, steps.credit_Z, clip=(config.clip_low, config.clip_high))
        if self.needs.reference:
            assert reference is not None, "beta > 0 needs the reference's log-probs"
            if config.kl == "exact":
                assert policy.law_NV is not None and reference.law_NV is not None
                kl_N = whole_kl(policy.law_NV, reference.law_NV)
                kl_Z = self.of_steps(kl_N if config.aggregate == "sum" else kl_N / policy.law_NV.shape[1], steps)
            else:
                kl_Z = k3(logp_Z, self.of_steps(reference.logp_N, steps))
            clipped = clipped.with_kl(kl_Z, config.beta)
        return StepTerms(steps, logp_Z, clipped)

    def of_steps(self, value_N: torch.Tensor, steps: Steps) -> torch.Tensor:
        """[Z], the sum, or mean, of each view's values."""
        sum_Z = value_N.new_zeros(steps.size_Z.numel()).index_add(0, steps.of_score_N, value_N)
        return sum_Z if self.config.aggregate == "sum" else sum_Z / steps.size_Z


def whole_kl(law_NV: torch.Tensor, reference_law_NV: torch.Tensor) -> torch.Tensor:
    """[N], the KL of the laws that these log-probs are of; tokens that neither can draw add nothing."""
    apart_NV = (law_NV - reference_law_NV.detach()).masked_fill(law_NV == -torch.inf, 0.0)
    return (law_NV.exp() * apart_NV).sum(1)
