"""Masked copies: the laws of their masks, and the bound that their scores estimate."""

import itertools
from math import comb

import numpy as np
import pytest
import torch

from learner.objectives.copies import copies, independent_masks, paired_masks
from tests.support.hand_made import make_group
from tests.support.unit_scores import build, exact_bound, state_table, table_logp

C = 4


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def all_masks() -> list[np.ndarray]:
    return [np.array(mask) for mask in itertools.product([False, True], repeat=C) if any(mask)]


def test_counts_of_independent_masks_are_uniform_and_sets_of_a_count_equally_likely():
    mask_SC = independent_masks(stream(), 5000, 4, C).reshape(-1, C)
    shares = np.bincount(mask_SC.sum(axis=1), minlength=C + 1) / len(mask_SC)
    np.testing.assert_allclose(shares, [0, *[1 / C] * C], atol=0.01)
    pairs = mask_SC[mask_SC.sum(axis=1) == 2] @ 2 ** np.arange(C)
    np.testing.assert_allclose(np.unique(pairs, return_counts=True)[1] / pairs.size, 1 / 6, atol=0.02)


def test_a_rate_drawn_again_where_nothing_is_masked_is_the_same_law():
    """The probability of n masked of C at a uniform rate is 1 / (C + 1) for every n, by the beta integral."""
    rates = stream().random(80000)
    counts = (stream(1).random((rates.size, C)) < rates[:, None]).sum(axis=1)
    shares = np.bincount(counts[counts > 0], minlength=C + 1)[1:] / (counts > 0).sum()
    np.testing.assert_allclose(shares, 1 / C, atol=0.01)


def test_pairs_partition_the_completion_and_never_mask_all_of_it():
    mask_GRC = paired_masks(stream(), 3000, 4, C)
    assert mask_GRC.shape == (3000, 4, C)
    np.testing.assert_array_equal(mask_GRC[:, :2], ~mask_GRC[:, 2:])
    counts = mask_GRC.sum(axis=2).ravel()
    np.testing.assert_allclose(np.bincount(counts, minlength=C + 1) / counts.size, [0, *[1 / 3] * 3, 0], atol=0.02)
    assert not np.array_equal(*(lambda m: (m[:, :2], ~m[:, 2:]))(independent_masks(stream(), 300, 4, C))), "control"


def score(theta: torch.Tensor, mask_RC: np.ndarray, weight_R: np.ndarray, ids_C: np.ndarray) -> float:
    group = make_group([ids_C], np.zeros((1, C)), steps=1)
    views = [copies(0, 0, mask_C[None], 0.0, float(w))[0] for mask_C, w in zip(mask_RC, weight_R, strict=True)]
    batch = build([(view,) for view in views], [group])
    return (torch.from_numpy(batch.weight) * table_logp(theta, batch)).sum().item()


def probability(mask_C: np.ndarray, *, paired: bool) -> float:
    """Of a copy, from its law."""
    n = int(mask_C.sum())
    counts = range(1, C) if paired else range(1, C + 1)
    return 1 / len(counts) / comb(C, n) if n in counts else 0.0


@pytest.mark.parametrize("paired", [False, True])
def test_over_all_masks_the_score_is_the_bound_over_the_length_or_one_without_its_last_state(paired):
    theta, ids_C, masks = state_table(C), np.array([2, 5, 1, 1]), all_masks()
    found = score(theta, np.array(masks), np.array([probability(mask, paired=paired) for mask in masks]), ids_C)
    exact = exact_bound(theta, ids_C).item() / C
    last = theta.log_softmax(-1)[-1, np.arange(C), ids_C].mean().item()
    assert found == pytest.approx((exact * C - last) / (C - 1) if paired else exact, rel=1e-12)
    assert (abs(found - exact) > 1e-3) == paired, "pairs leave the state out that masks everything"


@pytest.mark.parametrize("draw", [independent_masks, paired_masks])
def test_drawn_masks_come_to_the_enumerated_mean(draw):
    theta, ids_C, masks = state_table(C), np.array([2, 5, 1, 1]), all_masks()
    paired = draw is paired_masks
    exact = score(theta, np.array(masks), np.array([probability(mask, paired=paired) for mask in masks]), ids_C)
    each = {mask.tobytes(): score(theta, mask[None], np.ones(1), ids_C) for mask in masks}
    drawn = [each[mask.tobytes()] for mask in draw(stream(2), 5000, 2, C).reshape(-1, C)]
    assert np.mean(drawn) == pytest.approx(exact, abs=4 * np.std(drawn) / np.sqrt(len(drawn)))


def test_a_uniform_model_scores_minus_the_log_of_its_vocabulary():
    theta = torch.zeros(2**C, C, 9, dtype=torch.float64)
    mask_RC = paired_masks(stream(), 1, 4, C)[0]
    assert score(theta, mask_RC, np.full(4, 1 / 4), np.array([2, 5, 1, 1])) == pytest.approx(-np.log(9), rel=1e-12)
