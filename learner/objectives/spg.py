"""SPG, the sandwiched policy gradient (arXiv 2510.09541): a completion that did well has a lower bound of its
log-likelihood raised, one that did badly an upper bound lowered, or a mixture of both bounds.

K views of a completion of ``len`` tokens (up to and including the first EOS) mask the sets M_k of them, n_k tokens, the
share t_k = n_k / len. With q_ik the probability of token i in view k and I the tokens masked in some view,

    ELBO  = mean_k (1 / n_k) sum over i in M_k of  log q_ik
    EUBO  = (1 / (beta |I|)) sum over i in I of  log a_i,   a_i = mean_k 1[i in M_k] q_ik^beta / t_k
    ell   = ELBO if A > 0 else  w EUBO + (1 - w) ELBO      (mixture; eubo: w = 1; elbo: w = 0; zero: nothing)
    loss  = - sum_b A_b ell_b len_b / sum_b len_b

with A the reward minus its group's mean. Both bounds are per token. log a_i is a logsumexp over views, so that a
token which is all but impossible keeps its gradient. No ratio, no clip, no KL: later updates on a batch are not
corrected. As K grows, EUBO is at least ELBO and grows with beta; from beta = len on it is an upper bound of the
log-likelihood per token of one-token steps in random order, below that not of every denoiser's. The log of a mean of
few views is too low on average: with K = 2 EUBO can lie below ELBO.

Masks of a view, by ``masking``; whatever follows the text is masked always:
    block_random  a block b of the text; of its tokens a count drawn uniformly from [max(floor(v min_masked), 1),
                  floor(v max_masked)], v being how many it has, at places drawn uniformly; all later blocks
    block_all     block b and all later ones
    random        as block_random, of the whole text at once
    all           the whole text
and each token of the prompt, in block modes of earlier blocks too, with probability ``context_mask``.

The block is drawn as the authors' code does it: the numbers of all blocks of the completion are permuted, taken modulo
the number of blocks of the text, and the first K kept. So the K views may share a block, and early blocks are more
likely where the one number doesn't divide the other. Their code also makes a mask that would end the loss at the drawn
block, and never applies it; later blocks are scored here too. It sums over a micro-batch where this is over the update;
it computes q^beta itself, in bfloat16, where an underflow drops the token from I; it stops where floor(v max_masked) is
0 (here one token is masked). Completions with A = 0 have no gradient and are not scored; they count in the divisor.

Shapes: G completions of a group, P prompt tokens, C completion positions, K views of a unit; N scores of a batch, Z
views, U units and T masked tokens of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.masks import random_subset, text_lengths
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, View, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.statistics import Statistics
from learner.settings.methods.bounds import SpgConfig
from rollout.copies import in_one_copy, indices_and_values
from rollout.trajectory import TrajectoryGroup


class Mask(NamedTuple):
    """What a view shows as masks."""

    hidden_P: np.ndarray
    """[P] bool"""
    hidden_C: np.ndarray
    """[C] bool"""


class Spg:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: SpgConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """One unit for each row that has a gradient."""
        lengths_G = text_lengths(group, context.eos_ids)
        masks = self.draw(group, lengths_G, context)
        live = [row for row in range(group.size) if self._moves(float(credit_G[row]))]
        units = [bound_unit(index, row, masks[row], int(lengths_G[row]), float(credit_G[row])) for row in live]
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted(units, divisor=float(lengths_G.sum()), statistics=statistics)

    def draw(self, group: TrajectoryGroup, lengths_G: np.ndarray, context: UpdateContext) -> list[list[Mask]]:
        """[G][K], masks of every row, whichever of them are scored."""
        stream = context.stream(group, "spg masks")
        return [self._row_masks(stream, group, int(length)) for length in lengths_G]

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over units of -A ell len, and its figures."""
        logp_N = scores.policy.logp_N
        elbo_U, eubo_U = bounds(logp_N, batch, beta=self.config.eubo_beta)
        credits = np.array([view.credit for view in batch.first_views])
        credit_U, length_U = in_one_copy(logp_N.device, credits, lengths(batch), dtype=logp_N.dtype)
        ell_U = self.likelihood(elbo_U, eubo_U, credit_U)
        elbo, eubo = torch.stack([elbo_U.detach().sum(), eubo_U.detach().sum()]).tolist()
        units = float(elbo_U.numel())
        statistics = Statistics(
            means={"bound/elbo": (elbo, units), "bound/eubo": (eubo, units)}, totals={"scored_completions": units}
        )
        return -(credit_U * ell_U * length_U).sum(), statistics

    def likelihood(self, elbo_U: torch.Tensor, eubo_U: torch.Tensor, credit_U: torch.Tensor) -> torch.Tensor:
        """[U], ell: what stands for each unit's log-likelihood per token."""
        share = {"mixture": self.config.mixture_weight, "eubo": 1.0, "elbo": 0.0, "zero": 0.0}[self.config.negative]
        lowered_U = share * eubo_U + (1.0 - share) * elbo_U
        if self.config.negative == "zero":
            lowered_U = torch.zeros_like(elbo_U)
        return torch.where(credit_U > 0, elbo_U, lowered_U)

    def _moves(self, credit: float) -> bool:
        return credit > 0 or (credit < 0 and self.config.negative != "zero")

    def _row_masks(self, stream: np.random.Generator, group: TrajectoryGroup, length: int) -> list[Mask]:
        """[K], for a text of this many tokens."""
        config, C, size = self.config, group.completion_ids.shape[1], group.sampler.block_length
        if config.masking in ("block_random", "block_all"):
            starts_K = (stream.permutation(C // size) % -(-length // size))[: config.samples] * size
        else:
            starts_K, size = np.zeros(config.samples, dtype=np.int64), C
        masks = []
        for start in starts_K.tolist():
            v = min(size, length - start)
            count = self._count(stream, v)
            hidden_C = np.ones(C, dtype=bool)
            hidden_C[:start] = stream.random(start) < config.context_mask
            hidden_C[start : start + v] = random_subset(stream, v, count)
            masks.append(Mask(stream.random(group.prompt_ids.size) < config.context_mask, hidden_C))
        return masks

    def _count(self, stream: np.random.Generator, v: int) -> int:
        """How many of v tokens are masked."""
        if self.config.masking in ("block_all", "all"):
            return v
        least = max(int(v * self.config.min_masked), 1)
        most = max(int(v * self.config.max_masked), least)
        return int(stream.integers(least, most, endpoint=True))


def bound_unit(index: int, row: int, masks: Sequence[Mask], length: int, credit: float) -> Unit:
    """The views of one completion; the weight of each is 1 / t_k.

    Args:
        length: tokens of the text, at least 1; what lies behind them is not scored.
    """
    scored = [np.flatnonzero(mask.hidden_C[:length]) for mask in masks]
    assert all(scored_n.size for scored_n in scored), f"a mask of row {row} leaves its whole text visible"
    return tuple(
        View(index, row, mask.hidden_C, scored_n, credit, length / scored_n.size, mask.hidden_P)
        for mask, scored_n in zip(masks, scored, strict=True)
    )


def bounds(logp_N: torch.Tensor, batch: ViewBatch, *, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ELBO and EUBO per token, each [U]."""
    unit_N, view_N = batch.unit_of_score, batch.view_of_score
    views_U, scores_Z = np.bincount(batch.unit_of_view), np.bincount(view_N, minlength=batch.unit_of_view.size)
    # Of a text with gaps a mask may hide only what doesn't exist: such a view says nothing of the likelihood per token.
    scored_U = np.bincount(batch.unit_of_view, scores_Z > 0)
    unit_T, _, token_N = batch.tokens()
    place_N = view_N - np.flatnonzero(np.diff(batch.unit_of_view, prepend=-1))[unit_N]
    log_a_TK = logp_N.new_full((unit_T.size, int(views_U.max())), -torch.inf)
    to_unit_N, to_unit_T, to_token_N, to_place_N, share_N, log_weight_N, log_views_T, divisor_U = indices_and_values(
        logp_N.device,
        [unit_N, unit_T, token_N, place_N],
        [
            1.0 / (scores_Z[view_N] * scored_U[unit_N]),
            np.log(batch.weight),
            np.log(views_U[unit_T]),
            beta * np.bincount(unit_T, minlength=views_U.size).clip(min=1),
        ],
        dtype=logp_N.dtype,
    )

    def summed(terms: torch.Tensor, to_unit: torch.Tensor) -> torch.Tensor:
        return logp_N.new_zeros(views_U.size).index_add(0, to_unit, terms)

    log_a_TK = log_a_TK.index_put((to_token_N, to_place_N), beta * logp_N + log_weight_N)
    log_a_T = log_a_TK.logsumexp(1) - log_views_T
    return summed(logp_N * share_N, to_unit_N), summed(log_a_T, to_unit_T) / divisor_U


def lengths(batch: ViewBatch) -> np.ndarray:
    """[U], tokens of each unit's text: a view's weights add up to it."""
    views_U = np.bincount(batch.unit_of_view)
    return np.rint(np.bincount(batch.unit_of_score, batch.weight, minlength=views_U.size) / views_U)
