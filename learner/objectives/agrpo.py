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

On the policy that drew the batch, with a position rule that doesn't look at the policy or whose choice is scored, and
the ``all`` step range, its expectation is the gradient of expected reward times -(G-1)/(G m). After an update, or on
stale rollouts, rho_j corrects an action's probability but not that of the state it was taken in: a surrogate.

Shapes: G completions of a group, N scored tokens and Z views of a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.timesteps import draw_timesteps, draw_uniforms, step_table
from learner.likelihood.views import ViewBatch, step_view
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.ratio import clipped_terms, k3, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import AgrpoConfig
from rollout.trajectory import TrajectoryGroup


class Agrpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: AgrpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """Drawn steps of the rows that have a gradient: those with an advantage, all of them when there is a KL term.

        The draws are made for every row first, so they don't depend on which rows are left out.
        """
        config = self.config
        table = step_table(group, config.step_range, context.eos_ids)
        stream = context.stream(group, "timesteps")
        u_Gk = draw_uniforms(stream, group.size, config.k, strata=config.strata_of_draws)
        drawn = draw_timesteps(table, u_Gk, config.timestep_sampling, config.weight_floor)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        units = [
            (step_view(group, index, row, int(step), float(credit_G[row]), float(weight), int(count)),)
            for row in live
            for step, count, weight in zip(*drawn[row], strict=True)
        ]
        largest = [float((drawn[row].weights / drawn[row].counts).max()) for row in live]
        statistics = Statistics(
            maxima={"importance_weight/max": max(largest)} if live else {},
            totals={"draws_merged": float(len(live) * config.k - len(units)), "live_completions": float(len(live))},
        )
        return Wanted(units, divisor=float(group.size * config.k), statistics=statistics)

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
        rollout_logp_N, advantage_N, weight_N = (
            torch.as_tensor(array, dtype=logp_N.dtype, device=logp_N.device) for array in actions
        )
        terms = clipped_terms(logp_N - rollout_logp_N, advantage_N, clip=clip)
        if self.needs.reference:
            assert reference_logp_N is not None, "beta > 0 needs the reference's log-probs"
            terms = terms.with_kl(terms.ratio_N * k3(logp_N, reference_logp_N), self.config.beta)
        prefix, count = names
        return (weight_N * terms.loss_N).sum(), ratio_statistics(
            terms.log_ratio_N, terms.averages, prefix=prefix, count=count
        )


class Actions(NamedTuple):
    """What is known of N actions of one kind, each [N] float."""

    rollout_logp: np.ndarray
    advantage: np.ndarray
    weight: np.ndarray
