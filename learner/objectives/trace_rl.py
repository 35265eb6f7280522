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
first ``post_num`` of a completion, 0 as published: ``eos_scored``.

With ``value_lr`` a head (``learner.ranks.heads``) gives each scored token a value V, and each token has an advantage of
its own. With V_old of the weights that the batch's first update began with, V* the mean V_old of a view,
the completion's advantage A above as the reward of its last view s = S-1, and all other rewards 0,

    A*_s = r_s - V*_s + gamma V*_(s+1) + gamma lambda A*_(s+1)
    A_j  = r_s - V_old_j + gamma V*_(s+1) + gamma lambda A*_(s+1)        of a token j of view s
    R_s  = r_s + gamma R_(s+1)
    V~_j = V_old_j + clip(V_j - V_old_j, +-value_clip)
    value loss of a view = (1/n) * sum over j of max((V_j - R_s)^2, (V~_j - R_s)^2) / 2

and the value loss is a mean over views too. With gamma = lambda = 1, A_j is A - V_old_j. V is a function of the state
before the token, so that it takes nothing off the expected gradient, whatever it says; but all completions are scored
then, those of groups without signal too. In the authors' code V is what a second model says, a copy of the policy with
a layer on top, all of whose weights learn; here it is a small network on the policy's own hidden states (ours).

Shapes: G completions of a group, C completion positions, S views of a completion, M views of a group, N scored tokens
and Z views of a batch.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, View, ViewBatch
from learner.objectives.advantages import backed_up, group_advantages
from learner.objectives.base import HeadSpec, Needs, UpdateContext, Wanted
from learner.objectives.merged_steps import merged_step_views
from learner.objectives.ratio import clipped_terms, k3, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import TraceRlConfig
from rollout.copies import in_one_copy
from rollout.trajectory import TrajectoryGroup


class TraceRl:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: TraceRlConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        lr = self.config.value_lr
        head = None if lr is None else HeadSpec(self.config.value_width, lr, of="tokens")
        return Needs(law=Law.RAW, old=True, head=head)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """Over the deviation of all of a group's rewards (not of a sample), with nothing added to it."""
        advantages = [group_advantages(group.rewards) for group in groups]
        return tuple(advantages_G / (advantages_G.std() or 1.0) for advantages_G in advantages)

    def valued(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> list[View]:
        """All that are scored, unless every later value drops out of the advantage."""
        if self.config.value_lr is None or self.config.value_lambda == 1:
            return []
        return list(itertools.chain(*self.views(index, group, np.zeros(group.size), context.eos_ids)))

    def credit_by_values(
        self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, values_M: np.ndarray, context: UpdateContext
    ) -> np.ndarray:
        """[G, S], what each view's tokens are credited with before their own values are taken off; a row of fewer views
        ends in zeros."""
        views = self.views(index, group, credit_G, context.eos_ids)
        credit_GS = np.zeros((group.size, max(1, *map(len, views))))
        start = 0
        for row, of_row in enumerate(views):
            values_S = values_M[start : start + len(of_row)]
            config, start = self.config, start + len(of_row)
            credit_GS[row, : len(of_row)] = backed_up(
                float(credit_G[row]), values_S, discount=config.value_discount, lam=config.value_lambda
            )
        return credit_GS

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The merged steps of each row that has a gradient: those with an advantage, all of them when there is a KL
        term or a value. The divisor counts those of all rows."""
        views, config = self.views(index, group, credit_G, context.eos_ids), self.config
        all_live = config.beta > 0 or config.value_lr is not None
        live = [row for row in range(group.size) if all_live or credit_G[row] != 0]
        units = [(view,) for row in live for view in views[row]]
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted(units, divisor=float(sum(map(len, views))), statistics=statistics)

    def views(
        self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, eos_ids: tuple[int, ...]
    ) -> list[list[View]]:
        """[G], every completion's."""
        counted_GC = counted(np.isin(group.completion_ids, eos_ids), self.config.eos_scored)
        starts = range(0, group.sampler.steps, self.config.shrink)
        views = [
            merged_step_views(group, index, row, starts, counted_GC[row], credit=float(np.ravel(credit_G[row])[0]))
            for row in range(group.size)
        ]
        if self.config.value_lr is None:
            return views
        return [self._credited(of_row, credit) for of_row, credit in zip(views, credit_G, strict=True)]

    def _credited(self, views: list[View], credit: np.ndarray) -> list[View]:
        """The views of a completion with what each is credited with and what its value is to be.

        Args:
            credit: of the completion alone, or [S] of its views.
        """
        by_view, last = np.ndim(credit) > 0, len(views) - 1
        found = []
        for number, view in enumerate(views):
            value = float(credit[last] if by_view else credit) * self.config.value_discount ** (last - number)
            found.append(view._replace(credit=float(credit[number]) if by_view else value, value=value))
        return found

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over views; and the figures of their tokens."""
        config, logp_N, old = self.config, scores.policy.logp_N, scores.old
        assert old is not None, "a ratio needs the old log-probs"
        n_N, valued = np.bincount(batch.view_of_score)[batch.view_of_score], config.value_lr is not None
        due = np.array([view.value for view in batch.views])[batch.view_of_score] if valued else None
        known = (batch.credit, 1.0 / n_N, due)
        advantage_N, share_N, due_N = in_one_copy(logp_N.device, *known, dtype=logp_N.dtype)
        if valued:
            assert old.value_N is not None, "the old weights' values are the baseline"
            advantage_N = advantage_N - old.value_N
        log_ratio_N = logp_N - old.logp_N
        terms = clipped_terms(log_ratio_N, advantage_N, clip=(config.clip_low, config.clip_high))
        loss, averages = (share_N * terms.loss_N).sum(), terms.averages
        if config.beta > 0:
            kl_N = k3(logp_N, old.logp_N) if config.kl == "k3" else log_ratio_N
            loss, averages = loss + config.beta * kl_N.sum(), {**averages, "kl": kl_N}
        statistics = ratio_statistics(log_ratio_N, averages, count="scored_tokens")
        if not valued:
            return loss, statistics
        errors_N, figures = self._value_errors(scores, due_N)
        return loss + (share_N * errors_N).sum(), Statistics.merged([statistics, figures])

    def _value_errors(self, scores: PolicyScores, due_N: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        """[N], half the squared error of each token's value, which is to be ``due_N``, clipped; and its figures."""
        assert scores.policy.value_N is not None and scores.old is not None and scores.old.value_N is not None
        value_N, old_N, clip = scores.policy.value_N, scores.old.value_N, self.config.value_clip
        near_N = old_N + (value_N - old_N).clamp(-clip, clip)
        plain_N, clipped_N = (value_N - due_N).square(), (near_N - due_N).square()
        sums = torch.stack([value_N.sum(), plain_N.sum(), due_N.square().sum()]).tolist()
        value, error, due = ((total, float(value_N.numel())) for total in sums)
        statistics = Statistics(means={"value": value}, rms={"value/error": error, "value/target": due})
        return torch.maximum(plain_N, clipped_N) / 2, statistics


def counted(is_eos_GC: np.ndarray, eos_scored: int | None) -> np.ndarray:
    """[G, C] bool, what is scored where it was drawn: all tokens but the EOS that follow the first ``eos_scored`` of a
    completion, and those too with None."""
    if eos_scored is None:
        return np.ones_like(is_eos_GC)
    return ~is_eos_GC | (is_eos_GC.cumsum(axis=1) <= eos_scored)
