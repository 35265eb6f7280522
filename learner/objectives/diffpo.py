"""DiFFPO (arXiv 2510.02212): two states of the rollout in place of one. A denoising step tau is drawn for each
completion and update, uniform on 1..T-1 of the sampler's T steps; what was drawn before tau is scored from the masked
completion, the rest from the completion as it was before tau. Each token of the prompt is masked with ``prompt_mask``,
alike in both. With A the reward minus its group's mean,

    rho_j = exp(logp_j - logp_old_j), old: of the weights that the batch's first update began with, on the same views
    l_j   = -min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A) + beta * k3_j

over the positions j of the text, up to and including its first EOS, and the loss is the mean over completions of their
mean l_j. With tau = T it is the one-step method of d1, and rho and KL are as there; the likelihood's mean over tau is
what the method adds, for one more forward.

The completions were drawn by the sampler, one step after the other, and the likelihood is another law, given tau and
the order of the positions. ``importance`` weighs a token's, or all of a completion's surrogates by the one over the
other, without gradient:

    w_j = exp(logp_old_j - logp_drawn_j), or w = the product of w_j over the text;  at most importance_cap

logp_drawn is what the rollout recorded. With weights of completions, no cap and no clip, and a sum over the text in
place of its mean, the expected gradient is that of the mean advantage under the likelihood's own law, where rewards
depend on the text alone. They vary the more the longer the completion; weights of tokens are their cheap, biased form.

With ``threshold_lr`` the sampler learns too. Each completion draws its confidence threshold before it is written, from
the law pi_q over the sampler's thresholds that a head makes of the prompt (``learner.ranks.heads``): one more action,
credited as its completion is. To the loss comes the mean over completions of

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  r = pi_q(threshold) / the probability with which it was drawn

whose expected gradient, on the law that drew, is (G-1)/G times that of the expected reward. With the setting
``reward.speed_weight`` the reward has the number of forward passes in it. T is then the number of steps that a
completion took.

Known of the paper are the likelihood, that weights correct for it, and that a threshold for each prompt is learned with
the number of forward passes in the reward. What follows is ours: the weights' form, the thresholds' (a choice among
some, of confidence; the paper bounds entropy), and the prompt's masks, clip, KL and average, which are d1's.

Shapes: G completions of a group, P prompt tokens, C completion positions, T denoising steps, N scored tokens, Z views
and U units of a batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import HeadSpec, Needs, UpdateContext, Wanted
from learner.objectives.merged_steps import merged_step_views
from learner.objectives.one_step import draw_prompt_masks
from learner.objectives.ratio import clipped_terms, clipped_token_loss, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import DiffpoConfig
from rollout.copies import indices_and_values
from rollout.trajectory import TrajectoryGroup


class Diffpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: DiffpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        lr = self.config.threshold_lr
        head = None if lr is None else HeadSpec(self.config.threshold_width, lr, of="thresholds")
        return Needs(law=Law.RAW, old=True, reference=self.config.beta > 0, head=head)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The two views of each row that has a gradient: those with an advantage, all of them when there is a KL term.
        The loss is a sum over tokens, so each view is a unit of its own, unless the completion has one weight, or a
        threshold of its own."""
        whole = self.config.importance == "completion" or self.config.threshold_lr is not None
        tau_G, hidden_GP = self.draw(group, context), draw_prompt_masks(group, self.config.prompt_mask, context)
        in_text_GC = np.arange(group.completion_ids.shape[1]) < text_lengths(group, context.eos_ids)[:, None]
        units: list[Unit] = []
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        for row in live:
            views = merged_step_views(
                group,
                index,
                row,
                (0, int(tau_G[row])),
                in_text_GC[row],
                credit=float(credit_G[row]),
                weight=1.0 / float(in_text_GC[row].sum()),
                hidden_P=hidden_GP[row],
            )
            units += [tuple(views)] if whole else [(view,) for view in views]
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted(units, divisor=float(group.size), statistics=statistics)

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> np.ndarray:
        """[G] int64, every row's tau; 1 where a completion took one step."""
        stream = context.stream(group, "boundaries")
        if group.sampler.threshold is None:
            return stream.integers(1, group.sampler.steps, size=group.size)
        return stream.integers(1, np.maximum(group.nfe, 2))

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over tokens of their weight times l_j; and their figures."""
        config, old = self.config, scores.old
        assert old is not None, "a ratio needs the old log-probs"
        weighed, figures = self._weighed(batch, old.logp_N)
        clip = (config.clip_low, config.clip_high)
        loss, statistics = clipped_token_loss(scores, old.logp_N, weighed, clip=clip, beta=config.beta)
        parts = [statistics, figures]
        if config.threshold_lr is not None:
            of_thresholds, statistics = self._threshold_loss(scores, batch)
            loss, parts = loss + of_thresholds, [*parts, statistics]
        return loss, Statistics.merged(parts)

    def _threshold_loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over completions, each a unit; and its figures."""
        value_Z, config = scores.policy.value_Z, self.config
        assert value_Z is not None and batch.threshold_logp is not None, "thresholds are drawn where they are learned"
        first_U = np.unique(batch.unit_of_view, return_index=True)[1]
        values = [batch.threshold_logp[first_U], np.array([view.credit for view in batch.first_views])]
        at_U, drawn_U, credit_U = indices_and_values(value_Z.device, [first_U], values, dtype=value_Z.dtype)
        log_ratio_U = value_Z[at_U] - drawn_U
        terms = clipped_terms(log_ratio_U, credit_U, clip=(config.clip_low, config.clip_high))
        figures = ratio_statistics(log_ratio_U, terms.averages, prefix="threshold/", count="scored_thresholds")
        return terms.loss_N.sum(), figures

    def _weighed(self, batch: ViewBatch, old_logp_N: torch.Tensor) -> tuple[ViewBatch, Statistics]:
        """The batch with the importance weights in its credit."""
        if self.config.importance == "none":
            return batch, Statistics()
        log_N = old_logp_N.double().cpu().numpy() - batch.drawn_logp
        if self.config.importance == "completion":
            unit_N = batch.unit_of_score
            log_N = np.bincount(unit_N, weights=log_N)[unit_N]
        capped_N = log_N > np.log(self.config.importance_cap)
        weight_N = np.exp(np.minimum(log_N, np.log(self.config.importance_cap)))
        N = float(weight_N.size)
        figures = {"importance/mean": (float(weight_N.sum()), N), "importance/capped": (float(capped_N.sum()), N)}
        return dataclasses.replace(batch, credit=batch.credit * weight_N), Statistics(means=figures)
