"""Noise and signal of independent gradients; see ``learner.bench.gradient_noise``.

Shapes: N batches, P trained parameters, R bootstrap resamples.
"""

import sys
from typing import Any

import numpy as np

from learner.comparison.budget import planned_cost
from learner.control.controller import Controller
from learner.evaluation.intervals import percentile_interval
from learner.settings.run import RunConfig
from rollout.adapters import AdapterState, unpack
from rollout.seeds import numpy_generator

RESAMPLES = 2000


def noise_over_signal(gram_NN: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Signal, noise and their ratio with its interval. ``value`` and the interval's ends are None where the signal is
    not above 0: more batches would find it.

    Args:
        gram_NN: [N, N] float64, inner products of the batches' gradients.
    """
    N = len(gram_NN)
    weights_RN = np.concatenate([np.ones((1, N)), N * numpy_generator(seed, "noise").dirichlet(np.ones(N), RESAMPLES)])
    squares_N = np.diag(gram_NN)
    pairs_R = np.einsum("rn,nk,rk->r", weights_RN, gram_NN, weights_RN) - weights_RN**2 @ squares_N
    signal_R = pairs_R / (N**2 - (weights_RN**2).sum(axis=1))
    noise_R = weights_RN @ squares_N / N - signal_R
    found_R = signal_R > 0
    ratio_R = np.where(found_R, noise_R / np.where(found_R, signal_R, 1.0), np.inf)
    if found_R.all():
        low, high = percentile_interval(ratio_R[1:])
    else:
        low, high = float(np.quantile(ratio_R[1:], 0.025, method="lower")), np.inf
    return {
        "batches": N,
        "signal": float(signal_R[0]),
        "noise": float(noise_R[0]),
        "value": _finite(float(ratio_R[0])),
        "interval": [_finite(low), _finite(high)],
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def measured(config: RunConfig, batches: int, into: dict[str, Any], controller: Controller) -> None:
    """The figures of a run's gradient, put ``into`` a dictionary."""
    rows = []
    for number in range(batches):
        rows.append(_flat(controller.gradient(number)))
        print(
            f"batch {number + 1} of {batches}: |gradient| {np.linalg.norm(rows[-1]):.4g}", file=sys.stderr, flush=True
        )
    gradients_NP = np.stack(rows)
    cost = planned_cost(config) / config.learner.updates_per_batch
    into |= {"objective": config.objective.type, "update_fe": cost, **noise_over_signal(gradients_NP @ gradients_NP.T)}
    if into["value"] is not None:
        into["signal_fe"] = into["value"] * cost
    into["signal_fe_interval"] = [None if end is None else end * cost for end in into["interval"]]


def _flat(gradient: AdapterState) -> np.ndarray:
    """[P] float64, by the parameters' names."""
    return np.concatenate([unpack(gradient[name]).double().numpy().ravel() for name in sorted(gradient)])
