"""Exact moments of AGRPO's timestep draws: what a group's weights do on average, and how they vary together.

Given a group, the gradient estimate is linear in the gradients g of its (completion, step) views,

    estimate = sum over b, t of c[b, t] * g[b, t],   c[b, t] = (weights of the draws of t in row b) / (G k),

and only c is random. With the Gram matrix K = <g, g'> its conditional variance (trace of the covariance) is
``(Cov[c] * K).sum()``, so no gradient is ever sampled. Cov[c] has a closed form. One draw picks step t with probability
p_t and weight w_t = 1/(D p_t). Independent draws don't covary. Low-discrepancy draws fall into different strata, every
assignment of the S = G k strata being equally likely, so two of them covary by -1/(S-1) times the covariance, over
strata, of what each would be on average inside a stratum. Draws stratified over their own completion are independent,
one in each of its k strata. Steps that are taken at most once, with probability p and w = k / (D p), are a function of
one uniform number for the whole group, constant between the edges of the line of probabilities: a finite sum.

Shapes: G completions of a group, m steps, k draws per completion, S = G*k strata. Everything is float64.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from learner.likelihood.timesteps import StepTable, Strata, TimestepSampling, once_probabilities, step_probabilities
from learner.objectives.agrpo import relative_size
from learner.settings.methods.states import AgrpoConfig

Design = Strata | Literal["once", "once apart"]
"""How draws hang together: strata of repeated draws, or steps that are taken once, together or each by itself."""

DESIGNS: dict[Design, str] = {"none": "off", "group": "on", "row": "own", "once": "once", "once apart": "once, off"}
"""As the tables say it."""


@dataclass(frozen=True)
class Estimator:
    """How a group's timesteps are sampled."""

    sampling: TimestepSampling
    weight_floor: float
    design: Design
    k: int | None
    """Draws per completion; None: every eligible step once, which leaves nothing random."""

    @classmethod
    def of(cls, config: AgrpoConfig) -> "Estimator":
        """The one that a run's settings name; ``weight_floor`` means nothing to uniform sampling."""
        floor = config.weight_floor if config.timestep_sampling == "entropy" else 0.0
        once: Design = "once" if config.low_discrepancy else "once apart"
        return cls(
            config.timestep_sampling, floor, once if config.draws == "once" else config.strata_of_draws, config.k
        )

    @property
    def once(self) -> bool:
        return self.design in ("once", "once apart")

    @property
    def law(self) -> str:
        """The law of one draw, in words."""
        return self.sampling + (f", floor {self.weight_floor:g}" if self.weight_floor else "")

    @property
    def label(self) -> str:
        if self.k is None:
            return "all steps"
        return f"{self.law}, k={self.k}, low discrepancy {DESIGNS[self.design]}"


ALL_STEPS = Estimator("uniform", 0.0, "none", None)


def mean_weights(table: StepTable) -> np.ndarray:
    """[G, m] expectation of c, the same for every estimator: 1/(D G) at eligible steps."""
    return table.eligible_Gm / (table.denominator_G[:, None] * len(table.eligible_Gm))


def draw_weights(estimator: Estimator, table: StepTable, size_Gm: np.ndarray) -> np.ndarray:
    """[G, m] importance weight of one draw of each step, 0 where it isn't eligible; 1 on average over draws. Of steps
    that are taken once, times the size of the advantage over the mean of sizes.

    Args:
        size_Gm: the size of each step's advantage.
    """
    if estimator.k is None:
        return table.eligible_Gm.astype(np.float64)
    if estimator.once:
        return estimator.k * _weights(table, _once(estimator, table, size_Gm)) * relative_size(size_Gm)
    return _weights(table, step_probabilities(table, estimator.sampling, estimator.weight_floor))


def weight_covariance(estimator: Estimator, table: StepTable, size_Gm: np.ndarray) -> np.ndarray:
    """[G*m, G*m] covariance of c over the draws, rows and steps flattened in that order; ``size_Gm`` as above."""
    G, m = table.eligible_Gm.shape
    if estimator.k is None:
        return np.zeros((G * m, G * m))
    if estimator.once:
        p_Gm = _once(estimator, table, size_Gm)
        counts_N = _weights(table, p_Gm).ravel() / G
        both_NN = _taken_together(p_Gm.ravel()) if estimator.design == "once" else _taken_apart(p_Gm.ravel())
        return (both_NN - np.outer(p_Gm, p_Gm)) * np.outer(counts_N, counts_N)
    k, S = estimator.k, G * estimator.k
    p_Gm = step_probabilities(table, estimator.sampling, estimator.weight_floor)
    w_Gm = _weights(table, p_Gm)
    mean_Gm = p_Gm * w_Gm
    within_Gmm = k * (_diagonals(p_Gm * w_Gm**2) - mean_Gm[:, :, None] * mean_Gm[:, None, :])
    if estimator.design == "none":
        return _block_diagonal(within_Gmm) / S**2
    if estimator.design == "row":  # k independent draws, one in each stratum
        parts_kGm = strata_probabilities(p_Gm, k) * w_Gm
        outer_Gmm = np.einsum("kgm,kgn->gmn", parts_kGm, parts_kGm)
        return _block_diagonal(k * _diagonals(p_Gm * w_Gm**2) - outer_Gmm) / S**2
    strata_SGm = strata_probabilities(p_Gm, S) * w_Gm
    centred_SN = strata_SGm.reshape(S, G * m) - mean_Gm.reshape(G * m)
    between_NN = centred_SN.T @ centred_SN / S
    # k^2 pairs of draws for two rows, k (k-1) for a row with itself.
    own_Gmm = between_NN.reshape(G, m, G, m)[np.arange(G), :, np.arange(G), :]
    return (_block_diagonal(within_Gmm + k / (S - 1) * own_Gmm) - k**2 / (S - 1) * between_NN) / S**2


def expected_views(estimator: Estimator, table: StepTable, size_Gm: np.ndarray) -> np.ndarray:
    """[G] distinct steps drawn per completion, on average: the views that the product scores after merging; ``size_Gm``
    as above."""
    if estimator.k is None:
        return table.eligible_Gm.sum(axis=1).astype(np.float64)
    if estimator.once:
        return _once(estimator, table, size_Gm).sum(axis=1)
    p_Gm = step_probabilities(table, estimator.sampling, estimator.weight_floor)
    if estimator.design == "none":
        return (1.0 - (1.0 - p_Gm) ** estimator.k).sum(axis=1)
    if estimator.design == "row":
        return (1.0 - (1.0 - strata_probabilities(p_Gm, estimator.k)).prod(axis=0)).sum(axis=1)
    S = len(p_Gm) * estimator.k
    # A row's k draws lie in k different strata, every choice of k being equally likely: the elementary symmetric
    # polynomial of degree k in the strata's probabilities of missing the step, over the number of choices.
    missed_kGm = np.zeros((estimator.k + 1, *p_Gm.shape))
    missed_kGm[0] = 1.0
    for miss_Gm in 1.0 - strata_probabilities(p_Gm, S):
        missed_kGm[1:] += miss_Gm * missed_kGm[:-1]
    return (1.0 - missed_kGm[-1] / math.comb(S, estimator.k)).sum(axis=1)


def strata_probabilities(p_Gm: np.ndarray, S: int) -> np.ndarray:
    """[S, G, m] probability that u, uniform in stratum [s/S, (s+1)/S), picks each step by the inverse of p's sums."""
    upper_Gm = np.cumsum(p_Gm, axis=1)
    upper_Gm /= upper_Gm[:, -1:]
    lower_Gm = np.concatenate([np.zeros((len(p_Gm), 1)), upper_Gm[:, :-1]], axis=1)
    edge_S11 = np.arange(S)[:, None, None] / S
    shared_SGm = np.minimum(upper_Gm, edge_S11 + 1 / S) - np.maximum(lower_Gm, edge_S11)
    return np.maximum(shared_SGm, 0.0) * S


def _once(estimator: Estimator, table: StepTable, size_Gm: np.ndarray) -> np.ndarray:
    assert estimator.k is not None
    return once_probabilities(table, size_Gm, estimator.k, estimator.sampling, estimator.weight_floor)


def _taken_together(p_N: np.ndarray) -> np.ndarray:
    """[N, N] probability that two steps are both taken, of steps taken together."""
    ends_N = np.concatenate([[0.0], np.cumsum(p_N)])
    edges = np.unique(np.concatenate([[0.0, 1.0], -ends_N % 1.0]))
    middles_U, lengths_U = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    taken_UN = np.diff(np.floor(ends_N + middles_U[:, None]), axis=1)
    return taken_UN.T @ (taken_UN * lengths_U[:, None])


def _taken_apart(p_N: np.ndarray) -> np.ndarray:
    """The same of steps that are each taken by itself."""
    both_NN = np.outer(p_N, p_N)
    np.fill_diagonal(both_NN, p_N)
    return both_NN


def _weights(table: StepTable, p_Gm: np.ndarray) -> np.ndarray:
    full_Gm = np.broadcast_to(table.denominator_G[:, None], p_Gm.shape)
    return np.divide(1.0, full_Gm * p_Gm, out=np.zeros_like(p_Gm), where=p_Gm > 0)


def _diagonals(values_Gm: np.ndarray) -> np.ndarray:
    return values_Gm[:, :, None] * np.eye(values_Gm.shape[1])


def _block_diagonal(blocks_Gmm: np.ndarray) -> np.ndarray:
    G, m, _ = blocks_Gmm.shape
    whole_GmGm = np.zeros((G, m, G, m))
    whole_GmGm[np.arange(G), :, np.arange(G), :] = blocks_Gmm
    return whole_GmGm.reshape(G * m, G * m)
