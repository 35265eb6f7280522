"""A completion's evidence lower bound as a weighted sum of log-probs, and the clipped ratio of two such bounds.

A unit holds the views of one completion. Its bound is L = sum over its scores of weight * logp: which views there are,
and their weights, make that an estimate of (LLaDA, arXiv 2502.09992, eq. 6)

    E over n uniform in 1..C, M a random set of n positions, of  (C / n) * sum over j in M of log p(y_j | all but M)

The policy, the old weights and the reference are scored on the same views, so their bounds don't differ by the noise of
the masks. With the completion's advantage A,

    rho = exp(exponent * (L - L_old));  k2 = (L - L_reference)^2 / 2
    loss of a unit = factor * -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta * k2 / C

k2 is half a squared log-ratio; its gradient, on samples of the current policy, is the KL's (J. Schulman, Approximating
KL Divergence, 2020). Differences are taken score by score before they are added up, in float64: bounds are hundreds of
nats, their differences small.

Shapes: N scores and U units of a batch, C completion positions.
"""

from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import ViewBatch
from learner.objectives.ratio import ClippedTerms, clipped_terms, ratio_statistics
from learner.objectives.statistics import Statistics
from rollout.copies import indices_and_values


class BoundTerms(NamedTuple):
    """What the losses of a batch's units are made of, float64."""

    bound_U: torch.Tensor
    """[U], L in nats."""
    clipped: ClippedTerms
    """[U], the ratio and -min(..)."""
    k2_per_token_U: torch.Tensor | None
    """[U], k2 / C, in squared nats; None where no reference was scored."""

    def loss(self, *, beta: float, factor: float) -> tuple[torch.Tensor, Statistics]:
        """The sum of the units' losses, and their figures."""
        loss_U, averages = factor * self.clipped.loss_N, {**self.clipped.averages, "bound/elbo": self.bound_U}
        if self.k2_per_token_U is not None:
            loss_U = loss_U + beta * self.k2_per_token_U
            averages["kl"] = self.k2_per_token_U
        return loss_U.sum(), ratio_statistics(self.clipped.log_ratio_N, averages, count="scored_completions")


def bound_terms(scores: PolicyScores, batch: ViewBatch, *, clip: tuple[float, float], exponent: float) -> BoundTerms:
    """The terms of each unit; ``clip``: (low, high) widths."""
    assert scores.old is not None, "a ratio needs the old log-probs"
    logp_N = scores.policy.logp_N
    units = Units.of(batch, logp_N.device)
    log_ratio_U = exponent * units.sums(logp_N - scores.old.logp_N)
    k2_per_token_U = None
    if scores.reference is not None:
        k2_per_token_U = units.sums(logp_N - scores.reference.logp_N).square() / (2 * completion_length(batch))
    return BoundTerms(units.sums(logp_N), clipped_terms(log_ratio_U, units.credit_U, clip=clip), k2_per_token_U)


class Units(NamedTuple):
    """What is known of a batch's units, on the device of its scores."""

    of_score_N: torch.Tensor
    """[N] int64, each score's unit."""
    weight_N: torch.Tensor
    """[N] float64"""
    credit_U: torch.Tensor
    """[U] float64"""

    @staticmethod
    def of(batch: ViewBatch, device: torch.device) -> "Units":
        """Those of ``batch``, in one copy."""
        credit_U = np.array([view.credit for view in batch.first_views])
        values = [batch.weight, credit_U]
        return Units(*indices_and_values(device, [batch.unit_of_score], values, dtype=torch.float64))

    def sums(self, value_N: torch.Tensor) -> torch.Tensor:
        """[U] float64, the sum of weight * value over each unit's scores: of log-probs, the units' bounds."""
        return torch.zeros_like(self.credit_U).index_add(0, self.of_score_N, self.weight_N * value_N)


def unit_sums(value_N: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    """``Units.sums`` of one value of each score."""
    return Units.of(batch, value_N.device).sums(value_N)


def completion_length(batch: ViewBatch) -> int:
    """C, the same for all views of a batch, however many of them a completion of a text with gaps has."""
    return int(batch.views[0].hidden_C.size)
