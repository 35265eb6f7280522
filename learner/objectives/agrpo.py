"""AGRPO: policy gradients from the exact stepwise likelihood of sampled denoising steps (arXiv 2510.04019).

Completion b has advantage A_b. Its i-th drawn step t has weight w and reveals tokens j. The loss, over S completions
with k draws each, is

    (1 / (S k)) * sum over b, i, j of  w * l_j
    l_j   = -min(rho_j A_b, clip(rho_j, 1 - clip_low, 1 + clip_high) A_b) + beta * rho_j * k3_j
    rho_j = exp(logp_j - logp_rollout_j)
    k3_j  = exp(d_j) - d_j - 1,  d_j = logp_reference_j - logp_j

It is a sum over the tokens of a step, not a mean: a step's likelihood is the product of its tokens'. Where the rollout
drew the positions too (decoupled confidence), their choice is one more action j of the step, with a log-prob and a clip
width of its own. rho_j is taken against the log-prob that the rollout recorded, never a recomputed one, and its factor
in the KL term is neither detached nor clipped: actions drawn from the rollout policy then give the current policy's KL,
value and gradient (DeepSeek-V3.2).

Two options of ours change the noise of the gradient and not its expectation (docs/variance.md has both measured):

- ``draws: once``. Each step is taken at most once, with a probability p in proportion to its law and to the size of its
  advantage, and w = k / (m p). A step that is drawn twice is one forward, and one without an advantage says nothing.
- ``baseline: fills``. The advantage of a step is R - (1 - s_t) Rbar - s_t R_t: Rbar the mean reward of the other
  completions of the prompt, R_t that of the likeliest fill of the state before the step, which needs no forward of its
  own (``GreedyBranches``; of the last branched state up to there, where not all are), and s_t how far R_t foretells R:
  the slope of R - Rbar by R_t - Rbar over the update's *other* groups, held back to 0 as by one more group. What is
  taken off is a function of the state before the step, of other completions and of other groups, none of which depends
  on what the step draws, so it changes no expectation; and no factor (G-1)/G is left. The part of
  ``reward.diversity_weight`` lies between completions: R and Rbar in the first two terms have it, R_t and what R_t is
  compared with don't.

On the policy that drew the batch, with a position rule that doesn't look at the policy or whose choice is scored, and
the ``all`` step range, its expectation is the gradient of expected reward times -(G-1)/(G m). After an update, or on
stale rollouts, rho_j corrects an action's probability but not that of the state it was taken in: a surrogate.

Shapes: G completions of a group, Q groups of an update, m steps, S branched states, N scored tokens and Z views of a
batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.timesteps import (
    RowSteps,
    StepTable,
    draw_timesteps,
    draw_uniforms,
    once_probabilities,
    step_table,
    take_steps,
)
from learner.likelihood.views import ViewBatch, step_view
from learner.objectives.advantages import fill_rewards, group_advantages, leave_one_out_advantages, total_rewards
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.ratio import clipped_terms, k3, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import AgrpoConfig
from rollout.copies import in_one_copy
from rollout.trajectory import DIVERSITY, TrajectoryGroup


class Agrpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: AgrpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """[G], or [G, m] with fills."""
        if self.config.baseline == "fills":
            return step_advantages(groups)
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """Drawn steps that have a gradient: those with an advantage, all of them when there is a KL term."""
        table = step_table(group, self.config.step_range, context.eos_ids)
        credit_Gm = np.where(table.eligible_Gm, credit_G.reshape(group.size, -1), 0.0)
        live_Gm = table.eligible_Gm & ((credit_Gm != 0) | self.needs.reference)
        drawn = [
            (row, int(step), int(count), float(weight))
            for row, of_row in enumerate(self._drawn(group, table, credit_Gm, live_Gm, context))
            for step, count, weight in zip(*of_row, strict=True)
            if live_Gm[row, step]
        ]
        units = [
            (step_view(group, index, row, step, float(credit_Gm[row, step]), weight, count),)
            for row, step, count, weight in drawn
        ]
        merged = sum(count - 1 for _, _, count, _ in drawn)
        # Of steps that are taken by the size of their advantage, a small one makes for a large weight of no effect.
        effect_Gm = relative_size(credit_Gm) if self.config.draws == "once" else live_Gm * 1.0
        largest = max((weight / count * effect_Gm[row, step] for row, step, count, weight in drawn), default=None)
        statistics = Statistics(
            maxima={} if largest is None else {"importance_weight/max": largest},
            totals={"draws_merged": float(merged), "live_completions": float(live_Gm.any(axis=1).sum())},
        )
        return Wanted(units, divisor=float(group.size * self.config.k), statistics=statistics)

    def _drawn(
        self,
        group: TrajectoryGroup,
        table: StepTable,
        credit_Gm: np.ndarray,
        live_Gm: np.ndarray,
        context: UpdateContext,
    ) -> list[RowSteps]:
        config, stream = self.config, context.stream(group, "timesteps")
        if config.draws == "repeated":
            # Made for every row, so that they don't depend on which have a gradient.
            u_Gk = draw_uniforms(stream, group.size, config.k, strata=config.strata_of_draws)
            return draw_timesteps(table, u_Gk, config.timestep_sampling, config.weight_floor)
        size_Gm = np.abs(credit_Gm)
        if self.needs.reference:  # the KL term's gradient is there without an advantage too
            size_Gm = np.where(live_Gm, size_Gm + (size_Gm[live_Gm].mean() or 1.0), 0.0)
        p_Gm = once_probabilities(table, size_Gm, config.k, config.timestep_sampling, config.weight_floor)
        return take_steps(table, p_Gm, config.k, stream, together=config.low_discrepancy)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over scores, of tokens and of choices of positions, of w * l_j; and their figures."""
        config, reference = self.config, scores.reference
        assert batch.logp is not None, "every view is a recorded state"
        loss, figures = self._terms(
            scores.policy.logp_N,
            None if reference is None else reference.logp_N,
            Actions(batch.logp, batch.credit, batch.weight),
            clip=(config.clip_low, config.clip_high),
            names=("", "scored_tokens"),
        )
        choices = batch.choices
        if choices is None:
            return loss, figures
        choice_logp_Z = scores.policy.choice_logp_Z
        assert choice_logp_Z is not None, "the choices of positions are part of the policy, and weren't scored"
        free = torch.from_numpy(choices.free).to(choice_logp_Z.device)
        reference_Z = None if reference is None else reference.choice_logp_Z
        position_loss, position_figures = self._terms(
            choice_logp_Z[free],
            None if reference_Z is None else reference_Z[free],
            Actions(choices.logp[choices.free], choices.credit[choices.free], choices.weight[choices.free]),
            clip=(
                config.clip_low if config.position_clip_low is None else config.position_clip_low,
                config.clip_high if config.position_clip_high is None else config.position_clip_high,
            ),
            names=("position_", "scored_choices"),
        )
        return loss + position_loss, Statistics.merged([figures, position_figures])

    def _terms(
        self,
        logp_N: torch.Tensor,
        reference_logp_N: torch.Tensor | None,
        actions: "Actions",
        *,
        clip: tuple[float, float],
        names: tuple[str, str],
    ) -> tuple[torch.Tensor, Statistics]:
        """The sum of w * l_j over actions of one kind, and its figures; ``names``: their prefix, and the count's."""
        rollout_logp_N, advantage_N, weight_N = in_one_copy(logp_N.device, *actions, dtype=logp_N.dtype)
        terms = clipped_terms(logp_N - rollout_logp_N, advantage_N, clip=clip)
        if self.needs.reference:
            assert reference_logp_N is not None, "beta > 0 needs the reference's log-probs"
            terms = terms.with_kl(terms.ratio_N * k3(logp_N, reference_logp_N), self.config.beta)
        prefix, count = names
        return (weight_N * terms.loss_N).sum(), ratio_statistics(
            terms.log_ratio_N, terms.averages, prefix=prefix, count=count
        )


def relative_size(credit_Gm: np.ndarray) -> np.ndarray:
    """[G, m] float64, the size of each advantage over the mean size of those that aren't 0; 1 everywhere where all are
    0."""
    size_Gm = np.abs(credit_Gm)
    return size_Gm / size_Gm[size_Gm > 0].mean() if size_Gm.any() else np.ones_like(size_Gm)


def step_advantages(groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
    """Of each group [G, m] float64, the advantage of each step of the sampler's, of completions whose states were
    branched. Exactly 0 where all completions and fills of a prompt have the same reward.

    Raises:
        DataError: when a reward isn't finite.
    """
    advantage_QG = [leave_one_out_advantages(group.rewards) for group in groups]
    above_QGm = [_fills_above_others(group) for group in groups]
    square_Qm = np.array([(above_Gm**2).sum(axis=0) for above_Gm in above_QGm])
    product_Qm = np.array(
        [advantage_G @ above_Gm for above_Gm, advantage_G in zip(above_QGm, advantage_QG, strict=True)]
    )
    credit = []
    for index, (advantage_G, above_Gm) in enumerate(zip(advantage_QG, above_QGm, strict=True)):
        others_Qm, products_Qm = (np.delete(each, index, axis=0) for each in (square_Qm, product_Qm))
        held_back = others_Qm.mean() if others_Qm.size else 0.0
        slope_m = products_Qm.sum(axis=0) / (others_Qm.sum(axis=0) + held_back) if held_back else 0.0
        credit.append(advantage_G[:, None] - slope_m * above_Gm)
    return tuple(credit)


def _fills_above_others(group: TrajectoryGroup) -> np.ndarray:
    """[G, m] float64, what the likeliest fill before each step has above the mean of the other completions, in what the
    task rewards: how far the others are apart depends on what this completion draws, and would bias its baseline."""
    rewards_GR = group.rewards[:, [name != DIVERSITY for name in group.reward_names]]
    # The fill's reward above the completion's, and the completion's above the others' mean.
    own_G, advantage_G = total_rewards(rewards_GR), leave_one_out_advantages(rewards_GR)
    return _fills_by_step(group) - own_G[:, None] + advantage_G[:, None]


def _fills_by_step(group: TrajectoryGroup) -> np.ndarray:
    """[G, m] float64, the reward of the likeliest fill of the last branched state up to each step."""
    assert group.branch_step is not None and group.branch_rewards is not None, "states were branched"
    reward_GS = fill_rewards(group.branch_rewards[:, :, 0])
    # Which branched state that is: as many as lie at or before the step. The first one is there in every completion.
    step_GSm = np.where(group.branch_step < 0, group.sampler.steps, group.branch_step)[:, :, None]
    number_Gm = (step_GSm <= np.arange(group.sampler.steps)).sum(axis=1) - 1
    return np.take_along_axis(reward_GS, number_Gm, axis=1)


class Actions(NamedTuple):
    """What is known of N actions of one kind, each [N] float."""

    rollout_logp: np.ndarray
    advantage: np.ndarray
    weight: np.ndarray
