"""DiFFPO (arXiv 2510.02212): two states of the rollout in place of one. A denoising step tau is drawn for each
completion and update, uniform on 1..T-1 of the sampler's T steps; what was drawn before tau is scored from the masked
completion, the rest from the completion as it was before tau. Each token of the prompt is masked with ``prompt_mask``,
alike in both. With A the reward minus its group's mean,

    rho_j = exp(logp_j - logp_old_j), old: of the weights that the batch's first update began with, on the same views
    l_j   = -min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A) + beta * k3_j

over the positions j of the text, up to and including its first EOS, and the loss is the mean over completions of their
mean l_j. With tau = T it is the one-step method of d1, and rho and KL are as there; the likelihood's mean over tau is
what the method adds, for one more forward.

Known of the paper is the likelihood; what follows is ours: the prompt's masks, clip, KL and average, which are d1's.
Its weights that correct for the likelihood not being the sampler's law, and its sampler with a threshold for each
prompt, learned with the number of forward passes in the reward, were not published in a form that could be had, and
aren't offered.

Shapes: G completions of a group, P prompt tokens, C completion positions, T denoising steps.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, View, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.merged_steps import merged_step_views
from learner.objectives.one_step import draw_prompt_masks
from learner.objectives.ratio import clipped_token_loss
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import DiffpoConfig
from rollout.trajectory import TrajectoryGroup


class Diffpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: DiffpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW, old=True, reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The two views of each row that has a gradient: those with an advantage, all of them when there is a KL term.
        The loss is a sum over tokens, so each view is a unit of its own."""
        tau_G, hidden_GP = self.draw(group, context), draw_prompt_masks(group, self.config.prompt_mask, context)
        in_text_GC = np.arange(group.completion_ids.shape[1]) < text_lengths(group, context.eos_ids)[:, None]
        views: list[View] = []
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        for row in live:
            views += merged_step_views(
                group,
                index,
                row,
                (0, int(tau_G[row])),
                in_text_GC[row],
                credit=float(credit_G[row]),
                weight=1.0 / float(in_text_GC[row].sum()),
                hidden_P=hidden_GP[row],
            )
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted([(view,) for view in views], divisor=float(group.size), statistics=statistics)

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> np.ndarray:
        """[G] int64, every row's tau."""
        return context.stream(group, "boundaries").integers(1, group.sampler.steps, size=group.size)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over tokens of their weight times l_j; and their figures."""
        config, old = self.config, scores.old
        assert old is not None, "a ratio needs the old log-probs"
        return clipped_token_loss(scores, old.logp_N, batch, clip=(config.clip_low, config.clip_high), beta=config.beta)
