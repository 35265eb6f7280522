"""Terms that several methods are made of: the clipped ratio, the estimator k3 of a KL, their loss over tokens, the
weighted likelihood, and their figures.

Shapes: N actions, which are tokens, choices or whole completions.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import ViewBatch
from learner.objectives.statistics import Statistics
from rollout.copies import in_one_copy


class ClippedTerms(NamedTuple):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), each [N]."""

    log_ratio_N: torch.Tensor
    ratio_N: torch.Tensor
    loss_N: torch.Tensor
    averages: dict[str, torch.Tensor]
    """What is reported as a mean over actions."""

    def with_kl(self, kl_N: torch.Tensor, beta: float) -> "ClippedTerms":
        """With beta times a KL estimate added to each action's loss, and reported."""
        return self._replace(loss_N=self.loss_N + beta * kl_N, averages={**self.averages, "kl": kl_N})


def clipped_terms(
    log_ratio_N: torch.Tensor,
    advantage_N: torch.Tensor,
    *,
    clip: tuple[float, float],
    ratio_N: torch.Tensor | None = None,
) -> ClippedTerms:
    """The clipped surrogate (PPO, arXiv 1707.06347, eq. 7) of actions whose log-ratio carries the gradient.

    Args:
        clip: (low, high). With a width of 0 and a ratio of exactly 1, the gradient is the unclipped one.
        ratio_N: what stands for the ratio, of a method that bounds it; None for the exponential.
    """
    low, high = 1.0 - clip[0], 1.0 + clip[1]
    ratio_N = log_ratio_N.exp() if ratio_N is None else ratio_N
    loss_N = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(low, high) * advantage_N)
    averages = {
        "ratio/mean": ratio_N,
        "clip_fraction/low": (ratio_N < low) & (advantage_N < 0),
        "clip_fraction/high": (ratio_N > high) & (advantage_N > 0),
        "ratio/beyond_clip": (ratio_N < low) | (ratio_N > high),
    }
    return ClippedTerms(log_ratio_N, ratio_N, loss_N, averages)


def k3(logp_N: torch.Tensor, reference_logp_N: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 with d = logp_reference - logp: [N], never negative; its mean over actions of the current policy
    is the KL against the reference (J. Schulman, Approximating KL Divergence, 2020)."""
    d_N = reference_logp_N.detach() - logp_N
    return torch.expm1(d_N) - d_N


def clipped_token_loss(
    scores: PolicyScores, old_logp_N: torch.Tensor | None, batch: ViewBatch, *, clip: tuple[float, float], beta: float
) -> tuple[torch.Tensor, Statistics]:
    """The sum over tokens of weight times (clipped surrogate + beta * k3 against the reference); and their figures.

    Args:
        old_logp_N: [N], what the ratio is taken against; None for what the rollout recorded.
        beta: above 0 only with the reference's scores.
    """
    logp_N = scores.policy.logp_N
    known = (batch.credit, batch.weight, batch.logp if old_logp_N is None else None)
    advantage_N, weight_N, rollout_logp_N = in_one_copy(logp_N.device, *known, dtype=logp_N.dtype)
    old_logp_N = rollout_logp_N if old_logp_N is None else old_logp_N
    assert old_logp_N is not None, "every view is a recorded state"
    terms = clipped_terms(logp_N - old_logp_N, advantage_N, clip=clip)
    if beta > 0:
        assert scores.reference is not None, "beta > 0 needs the reference's log-probs"
        terms = terms.with_kl(k3(logp_N, scores.reference.logp_N), beta)
    statistics = ratio_statistics(terms.log_ratio_N, terms.averages, count="scored_tokens")
    return (weight_N * terms.loss_N).sum(), statistics


def weighted_likelihood(logp_N: torch.Tensor, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
    """Minus the sum of credit times weight times log-prob, and the mean log-prob of what is raised and lowered."""
    factor_N = torch.as_tensor(batch.credit * batch.weight, dtype=logp_N.dtype, device=logp_N.device)
    kinds = {"logp/raised": factor_N > 0, "logp/lowered": factor_N < 0}
    sums = [value for chosen_N in kinds.values() for value in ((logp_N.detach() * chosen_N).sum(), chosen_N.sum())]
    found = torch.stack([value.to(logp_N.dtype) for value in sums]).tolist()
    statistics = Statistics(
        means={name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(kinds)},
        totals={"scored_tokens": float(logp_N.numel())},
    )
    return -(factor_N * logp_N).sum(), statistics


def ratio_statistics(
    log_ratio_N: torch.Tensor, averages: Mapping[str, torch.Tensor], *, prefix: str = "", count: str
) -> Statistics:
    """Means of ``averages``, size of the log-ratios, and how many actions (``count``) there were.

    ``log_ratio/abs_max`` has no prefix: whatever the kind of action, it tells how far old and new policy are apart.
    """
    actions = log_ratio_N.numel()
    if not actions:
        return Statistics()
    log_ratio_N = log_ratio_N.detach()
    figures = [value.detach().to(log_ratio_N.dtype).sum() for value in averages.values()]
    figures += [log_ratio_N.square().sum(), log_ratio_N.abs().max(), log_ratio_N.max().exp()]
    *sums, squares, largest, ratio_max = torch.stack(figures).tolist()
    return Statistics(
        means={prefix + name: (total, float(actions)) for name, total in zip(averages, sums, strict=True)},
        rms={f"{prefix}log_ratio/rms": (squares, float(actions))},
        maxima={"log_ratio/abs_max": largest, f"{prefix}ratio/max": ratio_max},
        totals={count: float(actions)},
    )
