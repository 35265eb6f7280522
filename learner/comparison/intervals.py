"""Intervals of a mean over few seeds, each with many problems.

Both vary: another seed has another base, other puzzles and another course of training; of other held-out problems
another share would have been solved. Each resample adds both to the estimate, independently:

- problems: those of every seed drawn with replacement (``learner.evaluation.intervals.bootstrap_means``);
- seeds: three or five are too few to be drawn from (three give a range that covers 75 % at most), and too few to tell
  how much a method varies. So their part is Student's, and its variance that of all methods together, unless a method's
  own is larger. What problems account for of it is taken out.

Shapes: n seeds, N problems of a seed, R resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from learner.evaluation.intervals import bootstrap_means, percentile_interval

BySeed = Sequence[np.ndarray]
"""[n], of each seed its problems' outcomes [N] float64."""


class SeedSpread(NamedTuple):
    """How much seeds differ."""

    variance: float
    """Of a seed's mean over its problems."""
    freedom: int
    """Degrees of freedom of this estimate; 0 where no method has two seeds."""


def seed_spread(methods: Sequence[BySeed]) -> SeedSpread:
    """Pooled over methods."""
    means = [np.array([values_N.mean() for values_N in by_seed]) for by_seed in methods]
    freedom = sum(max(0, means_n.size - 1) for means_n in means)
    squares = sum(float(((means_n - means_n.mean()) ** 2).sum()) for means_n in means if means_n.size)
    return SeedSpread(squares / freedom if freedom else 0.0, freedom)


def seeds_and_problems(
    by_seed: BySeed, spread: SeedSpread, *, confidence: float, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Interval of the mean over seeds of each seed's mean over its problems.

    Where no method has two seeds, nothing is known of others, and the interval is that of the problems.
    """
    n = len(by_seed)
    drawn_nR = np.stack([bootstrap_means(values_N[:, None], resamples, rng)[:, 0] for values_N in by_seed])
    resampled_R = drawn_nR.mean(axis=0)
    if spread.freedom:
        of_problems = float(np.mean([values_N.var() / values_N.size for values_N in by_seed]))
        of_seeds = max(0.0, spread.variance - of_problems, seed_spread([by_seed]).variance - of_problems)
        resampled_R = resampled_R + (of_seeds / n) ** 0.5 * rng.standard_t(spread.freedom, size=resamples)
    return percentile_interval(resampled_R, confidence)
