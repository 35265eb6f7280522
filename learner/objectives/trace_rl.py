"""TraceRL for models that attend to the whole sequence (arXiv 2509.06949): every step of the rollout's own path is
learned from, ``shrink`` steps at a time.

A view is the completion as it was before the first of ``shrink`` consecutive steps; it scores the n positions that were
drawn at them. With A the reward minus its group's mean, over the deviation of the group's rewards,

    rho_j = exp(logp_j - logp_old_j), old: of the weights that the batch's first update began with, on the same views
    view  = -(1/n) * sum over j of min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A) + beta * sum over j of kl_j
    kl_j  = exp(d_j) - d_j - 1 (k3) or -d_j (k1), d_j = logp_old_j - logp_j

and the loss is the mean over the views of all completions: a short step counts as much as a long one, but for its KL.
That is against the old policy, not against a reference, so it is 0 until the batch's weights have moved.

With shrink 1 each token is scored in the state in which it was drawn; with more, from a state in which its neighbours
were masked too, which biases the likelihood for 1 / shrink of the work. Log-probs are at temperature 1 over the whole
vocabulary, and the old ones are scored like the new ones, for every shrink: a token of a merged step has no recorded
log-prob in the merged state, and one of a step of its own has it at the sampler's temperature and support, so that
methods with another shrink would otherwise be other methods.

The authors' code drops groups with an accuracy above 0.8 or below 0.2 before training, so they aren't in its mean; here
completions without an advantage stay in the divisor. It takes means over micro-batches. It leaves out every EOS but the
first ``post_num`` of a completion, 0 as published: ``eos_scored``. Its value model isn't offered.

Shapes: G completions of a group, C completion positions, N scored tokens of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, View, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.merged_steps import merged_step_views
from learner.objectives.ratio import clipped_terms, k3, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import TraceRlConfig
from rollout.trajectory import TrajectoryGroup


class TraceRl:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    needs = Needs(law=Law.RAW, old=True)

    def __init__(self, config: TraceRlConfig) -> None:
        self.config = config

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """Over the deviation of all of a group's rewards (not of a sample), with nothing added to it."""
        advantages = [group_advantages(group.rewards) for group in groups]
        return tuple(advantages_G / (advantages_G.std() or 1.0) for advantages_G in advantages)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The merged steps of each row that has a gradient: those with an advantage, all of them when there is a KL
        term. The divisor counts those of all rows."""
        views = self.views(index, group, credit_G, context.eos_ids)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.config.beta > 0]
        units = [(view,) for row in live for view in views[row]]
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted(units, divisor=float(sum(map(len, views))), statistics=statistics)

    def views(
        self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, eos_ids: tuple[int, ...]
    ) -> list[list[View]]:
        """[G], every completion's."""
        counted_GC = counted(np.isin(group.completion_ids, eos_ids), self.config.eos_scored)
        starts = range(0, group.sampler.steps, self.config.shrink)
        return [
            merged_step_views(group, index, row, starts, counted_GC[row], credit=float(credit_G[row]))
            for row in range(group.size)
        ]

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over views; and the figures of their tokens."""
        config, logp_N, old = self.config, scores.policy.logp_N, scores.old
        assert old is not None, "a ratio needs the old log-probs"
        n_N = np.bincount(batch.view_of_score)[batch.view_of_score]
        advantage_N, share_N = (
            torch.as_tensor(array, dtype=logp_N.dtype, device=logp_N.device) for array in (batch.credit, 1.0 / n_N)
        )
        log_ratio_N = logp_N - old.logp_N
        terms = clipped_terms(log_ratio_N, advantage_N, clip=(config.clip_low, config.clip_high))
        loss, averages = (share_N * terms.loss_N).sum(), terms.averages
        if config.beta > 0:
            kl_N = k3(logp_N, old.logp_N) if config.kl == "k3" else log_ratio_N
            loss, averages = loss + config.beta * kl_N.sum(), {**averages, "kl": kl_N}
        return loss, ratio_statistics(log_ratio_N, averages, count="scored_tokens")


def counted(is_eos_GC: np.ndarray, eos_scored: int | None) -> np.ndarray:
    """[G, C] bool, what is scored where it was drawn: all tokens but the EOS that follow the first ``eos_scored`` of a
    completion, and those too with None."""
    if eos_scored is None:
        return np.ones_like(is_eos_GC)
    return ~is_eos_GC | (is_eos_GC.cumsum(axis=1) <= eos_scored)
