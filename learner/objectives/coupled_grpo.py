"""coupled-GRPO, the method of DiffuCoder (arXiv 2506.20639; the masks and the log-prob are eqs. 12 and 13 of appendix
A.3): a token's log-prob is put together from three views, of which two score it.

Once per group and update a rate t ~ U(mask_low, mask_high) is drawn, and for each completion a mask m that holds every
position with probability t. Views: the completion all masked, with m masked, with m's complement masked. With A the
leave-one-out advantage and j the positions up to and including the first EOS,

    logp_j = (1/2) * (log p(j | all masked) + (log p(j | m masked) / t          for j in m
                                               log p(j | complement masked) / (1 - t)   otherwise))
    rho_j  = exp(logp_j - logp_old_j), old: of the weights that the batch's first update began with, on the same views
    l_j    = -min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A) + beta * k3(logp_j, logp_reference_j)

and the loss is the mean over completions of their mean l_j (``average: sequence``, GRPO's), or the mean over all tokens
(``average: token``). The KL term isn't weighted by rho. The drawn t divides, not the share of positions in m: over
masks, the pair's part then has the expectation log p at rate t plus log p at rate 1 - t. Together that is 3/2 of a
log-prob, not one, so ratios are larger than a token's own: the wide clip answers to that.

The authors' code takes the token mean, over one micro-batch, and one t for all of a batch's rows; with accumulation
over as many micro-batches as there are updates per batch, it scores the same mask in all of them. Its logged KL and
clip fractions mix rows; ours don't. It was written for a model whose logits are shifted by one position, which is the
model family's matter here.

Shapes: G completions of a group, C completion positions, N scores of a batch, U units and T tokens of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, Unit, View, ViewBatch
from learner.objectives.advantages import leave_one_out_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.ratio import clipped_terms, k3, ratio_statistics
from learner.objectives.statistics import Statistics
from learner.settings.methods.one_step import CoupledGrpoConfig
from rollout.copies import indices_and_values
from rollout.trajectory import TrajectoryGroup


class CoupledGrpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: CoupledGrpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW, old=True, reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(leave_one_out_advantages(group.rewards, scale=self.config.scale_advantages) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """One unit for each row that has a gradient: those with an advantage, all of them when there is a KL term."""
        rate, mask_GC = self.draw(group, context)
        lengths_G = text_lengths(group, context.eos_ids)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        units = [
            coupled_unit(index, row, mask_GC[row], rate, int(lengths_G[row]), float(credit_G[row])) for row in live
        ]
        statistics = Statistics(means={"mask_rate": (rate, 1.0)}, totals={"live_completions": float(len(live))})
        divisor = group.size if self.config.average == "sequence" else lengths_G.sum()
        return Wanted(units, divisor=float(divisor), statistics=statistics)

    def draw(self, group: TrajectoryGroup, context: UpdateContext) -> tuple[float, np.ndarray]:
        """The rate, and every row's mask, [G, C] bool."""
        stream = context.stream(group, "coupled masks")
        rate = float(stream.uniform(self.config.mask_low, self.config.mask_high))
        return rate, stream.random(group.completion_ids.shape) < rate

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over units of their mean l_j, or over tokens of l_j; and their figures."""
        config, tokens, old = self.config, batch_tokens(batch, scores.policy.logp_N), scores.old
        assert old is not None, "a ratio needs the old log-probs"
        logp_T = tokens.logp(scores.policy)
        log_ratio_T = logp_T - tokens.logp(old)
        terms = clipped_terms(log_ratio_T, tokens.credit_T, clip=(config.clip_low, config.clip_high))
        if self.needs.reference:
            assert scores.reference is not None, "beta > 0 needs the reference's log-probs"
            terms = terms.with_kl(k3(logp_T, tokens.logp(scores.reference)), config.beta)
        loss_T = terms.loss_N
        if config.average == "sequence":
            loss_T = loss_T / tokens.length_T
        return loss_T.sum(), ratio_statistics(terms.log_ratio_N, terms.averages, count="scored_tokens")


def coupled_unit(index: int, row: int, mask_C: np.ndarray, rate: float, length: int, credit: float) -> Unit:
    """The views of one completion, weighted so that a token's log-prob is the sum over them.

    Args:
        mask_C: [C] bool, m; what lies behind the text is masked and not scored.
        rate: t, between 0 and 1.
        length: tokens of the text, at least 1.
    """
    hidden = ((np.ones_like(mask_C), 0.5), (mask_C, 0.5 / rate), (~mask_C, 0.5 / (1.0 - rate)))
    views = (View(index, row, h_C, np.flatnonzero(h_C[:length]), credit, weight) for h_C, weight in hidden)
    return tuple(view for view in views if view.scored_n.size)


class Tokens(NamedTuple):
    """The tokens of a batch, by unit, then by position; each has a score in several of its unit's views. All on the
    scores' device, and in their dtype where they are no indices."""

    of_score_N: torch.Tensor
    """[N] int64, the token of each score."""
    weight_N: torch.Tensor
    """[N], of each score"""
    credit_T: torch.Tensor
    """[T]"""
    length_T: torch.Tensor
    """[T], how many tokens the unit has."""

    def logp(self, scores: Scores) -> torch.Tensor:
        """[T], the weighted sum of each token's scores."""
        return torch.zeros_like(self.credit_T).index_add(0, self.of_score_N, self.weight_N * scores.logp_N)


def batch_tokens(batch: ViewBatch, logp_N: torch.Tensor) -> Tokens:
    """Which scores of a batch are of the same token, for scores like ``logp_N``."""
    unit_T, first_T, of_score_N = batch.tokens()
    values = [batch.weight, batch.credit[first_T], np.bincount(unit_T)[unit_T]]
    return Tokens(*indices_and_values(logp_N.device, [of_score_N], values, dtype=logp_N.dtype))
