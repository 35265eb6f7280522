"""Intervals over seeds and problems cover on simulated data, whichever of the two varies more."""

import math

import numpy as np
import pytest

from learner.comparison.intervals import BySeed, SeedSpread, seed_spread, seeds_and_problems

RATE = 0.6
METHODS = 6
TRIALS = 200
NO_SPREAD = SeedSpread(0.0, 0)


def drawn(seeds: int, problems: int, deviation: float, rng: np.random.Generator) -> BySeed:
    """A method whose seeds' own rates are normal around the true one."""
    rates = np.clip(RATE + deviation * rng.standard_normal(seeds), 0, 1)
    return [(rng.random(problems) < rate).astype(float) for rate in rates]


def coverage(seeds: int, problems: int, deviation: float, *, over_problems_alone: bool = False) -> tuple[float, float]:
    """How often the 95 % interval of a method holds the true rate, and its mean width."""
    rng = np.random.default_rng([seeds, problems, round(1000 * deviation)])
    held, widths = 0, []
    for _ in range(TRIALS):
        methods = [drawn(seeds, problems, deviation, rng) for _ in range(METHODS)]
        spread = NO_SPREAD if over_problems_alone else seed_spread(methods)
        low, high = seeds_and_problems(methods[0], spread, confidence=0.95, resamples=400, rng=rng)
        held += low <= RATE <= high
        widths.append(high - low)
    return held / TRIALS, float(np.mean(widths))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("deviation", [0.0, 0.03, 0.1])
def test_covers(seeds: int, deviation: float) -> None:
    held, _ = coverage(seeds, 64, deviation)
    assert 0.91 <= held <= 0.995, held


def test_problems_alone_do_not_cover_when_seeds_vary() -> None:
    """The control."""
    held, _ = coverage(3, 64, 0.1, over_problems_alone=True)
    assert held < 0.8, held


def test_is_hardly_wider_than_needed_when_seeds_do_not_vary() -> None:
    _, width = coverage(3, 64, 0.0)
    needed = 2 * 1.96 * math.sqrt(RATE * (1 - RATE) / (3 * 64))
    assert width < 1.3 * needed


def test_a_method_that_varies_more_than_the_others_has_a_wider_interval() -> None:
    rng = np.random.default_rng(0)
    calm = [drawn(3, 64, 0.0, rng) for _ in range(METHODS)]
    wild = [np.repeat([1.0, 0.0], [right, 64 - right]) for right in (10, 38, 60)]
    spread = seed_spread([*calm, wild])
    widths = []
    for method in (calm[0], wild):
        low, high = seeds_and_problems(method, spread, confidence=0.95, resamples=2000, rng=rng)
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_one_seed_has_the_interval_of_its_problems() -> None:
    values = np.repeat([1.0, 0.0], [60, 40])
    spread = seed_spread([[values]])
    low, high = seeds_and_problems([values], spread, confidence=0.95, resamples=4000, rng=np.random.default_rng(0))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert spread == NO_SPREAD
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.012)


def test_equal_outcomes_have_no_width() -> None:
    method, rng = [np.ones(10)] * 3, np.random.default_rng(0)
    assert seeds_and_problems(method, seed_spread([method]), confidence=0.95, resamples=99, rng=rng) == (1.0, 1.0)


def test_spread_is_pooled_within_methods() -> None:
    low, high = [np.array([0.0]), np.array([0.2])], [np.array([0.7]), np.array([0.9])]
    assert seed_spread([low, high, [np.array([5.0])]]) == pytest.approx((0.02, 2))
