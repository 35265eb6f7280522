"""Group advantages: the mean includes the row itself, nothing is divided, and rounding makes no signal."""

import numpy as np
import pytest

from learner.objectives.advantages import group_advantages
from rewards.errors import DataError
from tests.support.hand_made import recorded_case


def test_total_minus_self_inclusive_mean_without_deviation():
    rewards_GR = np.array([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    advantages = group_advantages(rewards_GR)
    assert advantages.dtype == np.float64
    np.testing.assert_array_equal(advantages, [1.0, 0.0, -0.5, -0.5])


def test_equal_totals_give_exact_zeros_where_subtracting_the_mean_would_not():
    rewards_GR = np.tile(np.array([1e3 / 3, 1e-6 / 7], dtype=np.float32), (7, 1))
    totals = rewards_GR.astype(np.float64).sum(axis=1)
    assert (totals - totals.mean()).any(), "control: the plain formula invents a signal here"
    assert not group_advantages(rewards_GR).any()


def test_equal_totals_of_different_components_are_no_signal():
    assert not group_advantages(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=np.float32)).any()


def test_memory_layout_does_not_matter():
    rewards_GR = np.random.default_rng(0).random((5, 9)).astype(np.float32)
    np.testing.assert_array_equal(group_advantages(rewards_GR), group_advantages(np.asfortranarray(rewards_GR)))


def test_a_reward_that_is_not_finite_is_named():
    rewards_GR = np.zeros((3, 2), dtype=np.float32)
    rewards_GR[1, 1] = np.nan
    with pytest.raises(DataError, match="component 1 of completion 1 is nan"):
        group_advantages(rewards_GR)


def test_recorded_reference_advantages():
    for number in ("01", "03", "05", "07", "11", "13"):
        _, arrays, settings = recorded_case(number)
        groups = arrays["rewards_per_func"].reshape(-1, settings["G"], arrays["rewards_per_func"].shape[1])
        ours = np.concatenate([group_advantages(rewards_GR) for rewards_GR in groups])
        np.testing.assert_allclose(ours, arrays["advantages"], atol=1e-6)
