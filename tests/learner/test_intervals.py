"""Intervals and pass@k against independent formulas, published values, brute force and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from learner.evaluation.intervals import best_of_k, bootstrap_means, has_fallen, pass_at_k, percentile_interval, wilson


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_published_values(successes: int, trials: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence, z", [(0.95, 1.959963985), (0.9, 1.644853627), (0.99, 2.575829304)])
def test_wilson_ends_are_the_roots_of_the_score_equation(confidence: float, z: float) -> None:
    for trials in (1, 7, 128):
        for successes in range(trials + 1):
            rate = successes / trials
            # (rate - p)^2 = z^2 p (1 - p) / n as a polynomial in p
            roots = np.roots([1 + z * z / trials, -(2 * rate + z * z / trials), rate * rate])
            assert wilson(successes, trials, confidence) == pytest.approx(sorted(roots.real), abs=1e-7)


def test_wilson_refuses_impossible_counts() -> None:
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError):
            wilson(successes, trials)


def test_wilson_covers_and_the_interval_of_the_normal_law_does_not() -> None:
    """Exact coverage, by summing over all outcomes."""
    trials = 40
    rates = np.linspace(0.02, 0.98, 49)
    pmf = np.array([[math.comb(trials, s) * p**s * (1 - p) ** (trials - s) for s in range(trials + 1)] for p in rates])

    def coverage(ends: list[tuple[float, float]]) -> np.ndarray:
        holds = np.array([[low <= p <= high for low, high in ends] for p in rates])
        return (pmf * holds).sum(axis=1)

    of_wilson = coverage([wilson(s, trials) for s in range(trials + 1)])
    half = [1.96 * math.sqrt(s / trials * (1 - s / trials) / trials) for s in range(trials + 1)]
    of_normal = coverage([(s / trials - h, s / trials + h) for s, h in enumerate(half)])
    assert 0.945 < of_wilson.mean() < 0.96 and of_wilson.min() > 0.88
    assert of_normal.min() < 0.6, "the control: it is bad near 0 and 1"


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for correct in range(samples + 1):
        right = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_best_of_k_is_the_mean_over_subsets(k: int) -> None:
    values = [2.0, -1.0, 0.5, 0.5, 3.25]
    subsets = list(itertools.combinations(values, k))
    assert best_of_k(values, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))
    right = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert best_of_k(right, k) == pytest.approx(pass_at_k(6, 2, k)), "of verdicts it is pass@k"
    with pytest.raises(ValueError, match="the best of 6 from 5"):
        best_of_k(values, 6)


def test_pass_at_k_is_unbiased_and_the_plug_in_is_not() -> None:
    samples, k, p = 8, 4, 0.2
    pmf = [math.comb(samples, c) * p**c * (1 - p) ** (samples - c) for c in range(samples + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(samples, c, k) for c, w in enumerate(pmf)) == pytest.approx(truth, abs=1e-12)
    plug_in = sum(w * (1 - (1 - c / samples) ** k) for c, w in enumerate(pmf))
    assert abs(plug_in - truth) > 0.02, "the control"
    assert pass_at_k(2000, 1, 1000) == 0.5, "big binomials stay exact"
    for samples, correct, k in ((4, 5, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(samples, correct, k)


def test_bootstrap_draws_the_same_problems_for_all_series() -> None:
    rng = np.random.default_rng(0)
    values_N = rng.random(50)
    means_RS = bootstrap_means(np.stack([values_N, values_N + 0.25, rng.random(50)], axis=1), 400, rng)
    assert means_RS.shape == (400, 3)
    assert np.allclose(means_RS[:, 1] - means_RS[:, 0], 0.25)
    assert (means_RS[:, 2] - means_RS[:, 0]).std() > 0.01, "the control: another series"
    assert means_RS[:, 0].std() == pytest.approx(values_N.std() / np.sqrt(50), rel=0.15)
    both_NS = np.stack([values_N, rng.random(50)], axis=1)
    alone_R1 = bootstrap_means(both_NS[:, 1:], 30, np.random.default_rng(1))
    assert (bootstrap_means(both_NS, 30, np.random.default_rng(1))[:, 1:] == alone_R1).all()


def test_paired_interval_covers_the_difference_and_is_narrower_than_an_unpaired_one() -> None:
    """60 problems of unequal difficulty; the second policy is a bit better on each."""
    rng = np.random.default_rng(3)
    hits, paired, unpaired = 0, [], []
    for _ in range(400):
        difficulty_N, luck_N = rng.random(60), rng.random(60)
        values_NS = np.stack([luck_N < 0.8 * difficulty_N, luck_N < 0.8 * difficulty_N + 0.1], axis=1)
        means_RS = bootstrap_means(values_NS.astype(float), 300, rng)
        low, high = percentile_interval(means_RS[:, 1] - means_RS[:, 0])
        hits += low <= 0.1 <= high
        paired.append(high - low)
        low, high = percentile_interval(means_RS[:, 1] - rng.permutation(means_RS[:, 0]))
        unpaired.append(high - low)
    assert 0.88 < hits / 400 < 0.98
    assert np.mean(paired) < 0.6 * np.mean(unpaired)


def test_completions_of_one_problem_are_not_independent() -> None:
    """Why sampled rates get a bootstrap over problems: Wilson over all completions is far too narrow."""
    rng = np.random.default_rng(5)
    samples, problems, truth = 8, 40, 0.5
    bootstrap = wrong = 0
    for _ in range(400):
        right_N = rng.binomial(samples, rng.beta(0.5, 0.5, size=problems))
        means_RS = bootstrap_means((right_N / samples)[:, None], 300, rng)
        low, high = percentile_interval(means_RS[:, 0])
        bootstrap += low <= truth <= high
        low, high = wilson(int(right_N.sum()), samples * problems)
        wrong += low <= truth <= high
    assert 0.9 < bootstrap / 400 < 0.98
    assert wrong / 400 < 0.75, "the control"


def test_a_fall_is_more_than_twice_its_standard_error() -> None:
    assert has_fallen(0.203, 0.75, 128)
    assert not has_fallen(0.64, 0.75, 128), "0.11, and twice its standard error is 0.114"
    assert has_fallen(0.63, 0.75, 128)
    assert not has_fallen(0.63, 0.75, 64), "fewer problems tell less"
    assert not has_fallen(0.75, 0.75, 128) and not has_fallen(1.0, 1.0, 1) and not has_fallen(0.9, 0.5, 128)
