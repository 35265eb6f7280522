"""Intervals of solve rates, pass@k, and the best of k.

Wilson's score interval is for independent right-or-wrong outcomes (one completion per problem). Whatever is a mean over
problems otherwise (several completions per problem, differences) gets a percentile bootstrap over *problems*, because
the completions of one problem are not independent. Shapes: N problems, S series, R resamples.
"""

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

_COUNTS_AT_ONCE = 1 << 22


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion (Wilson 1927): the rates p with
    ``|successes/trials - p| <= z * sqrt(p (1-p) / trials)``."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At 0 and at all of them one end is the rate itself; rounding must not put it beyond.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def has_fallen(rate: float, best: float, trials: int) -> bool:
    """Whether ``rate`` lies below ``best``, each of ``trials`` independent outcomes, by more than twice the standard
    error of their difference."""
    variance = (rate * (1 - rate) + best * (1 - best)) / trials
    return best - rate > 2 * sqrt(variance)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions is right, from ``correct`` of ``samples`` (Chen et al.
    2021, arXiv 2107.03374): 1 - C(n-c, k) / C(n, k), in exact integers up to the last division."""
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} from {correct} right ones of {samples}")
    everything = comb(samples, k)
    return (everything - comb(samples - correct, k)) / everything


def best_of_k(values: Sequence[float], k: int) -> float:
    """Unbiased estimate of the largest of k values, from n >= k of them: the mean of the largest over all subsets of
    size k. For values that are 0 or 1 it is ``pass_at_k``."""
    n = len(values)
    if not 1 <= k <= n:
        raise ValueError(f"the best of {k} from {n}")
    # The i-th smallest, counted from 0, is the largest of C(i, k-1) subsets.
    return sum(value * (comb(i, k - 1) / comb(n, k)) for i, value in enumerate(sorted(values)))


def bootstrap_means(values_NS: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of S series over N problems drawn with replacement, [R, S] float64.

    Every resample draws the same problems for all series, so a difference of two columns is the paired one.
    """
    problems = values_NS.shape[0]
    if problems < 1 or resamples < 1:
        raise ValueError(f"{resamples} resamples of {problems} problems")
    rows = max(1, _COUNTS_AT_ONCE // problems)
    parts = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn_RN = rng.integers(problems, size=(count, problems))
        cell_RN = drawn_RN + problems * np.arange(count)[:, None]
        times_RN = np.bincount(cell_RN.ravel(), minlength=count * problems).reshape(count, problems)
        times_RN = times_RN.astype(np.float64)
        # A series at a time: its means then don't depend, in the last bit, on which series stand beside it.
        means = [times_RN @ np.ascontiguousarray(values_N, dtype=np.float64) / problems for values_N in values_NS.T]
        parts.append(np.stack(means, axis=1))
    return np.concatenate(parts)


def percentile_interval(resampled_R: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The middle ``confidence`` of resampled values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_R, [tail, 1 - tail])
    return float(low), float(high)
