"""AGRPO's steps taken once and its baseline by fills: less noise, and the gradient of expected reward as before."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest

from learner.likelihood.timesteps import inclusion_probabilities, step_table, take_steps
from learner.objectives.advantages import fill_rewards, leave_one_out_advantages, total_rewards
from learner.objectives.agrpo import Agrpo, step_advantages
from learner.objectives.base import UpdateContext
from learner.settings.methods.states import AgrpoConfig, AgrpoFillsConfig
from learner.verification.enumeration import (
    RETIRING,
    SMALLEST,
    THREE_POSITIONS,
    TWO_TOKENS_A_STEP,
    Toy,
    enumerate_trajectories,
    exact_gradient,
    independent_law,
    relative_error,
)
from rollout.seeds import numpy_generator
from rollout.trajectory import DIVERSITY, GreedyBranches, SamplerSpec, TrajectoryGroup
from tests.support.branched_tables import in_order, mean_gradient, rows_of, with_branches
from tests.support.hand_made import random_group
from tests.support.one_step_tables import planned_gradient
from tests.support.state_tables import STATE_TABLES, walked_group

EOS = 9
TOYS = [SMALLEST, THREE_POSITIONS, RETIRING, TWO_TOKENS_A_STEP]


class Fixed:
    """Random numbers that are all the same."""

    def __init__(self, u: float) -> None:
        self.u = u

    def random(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        return np.full(shape, self.u)


def test_agrpo_with_fills_is_agrpo_with_what_is_tested_here() -> None:
    named, spelled = AgrpoFillsConfig(), AgrpoConfig(k=2, draws="once", baseline="fills")
    assert named.model_dump(exclude={"type"}) == spelled.model_dump(exclude={"type"})
    assert named.method == spelled.method and named.fills_leave_out_diversity


# ---- steps taken once


def test_probabilities_follow_the_size_and_stay_below_one() -> None:
    size = np.array([[8.0, 1.0, 0.0], [2.0, 1.0, 4.0]])
    p = inclusion_probabilities(size, 2.0)
    np.testing.assert_allclose(p, size / 8.0)
    p = inclusion_probabilities(size, 3.5)
    np.testing.assert_allclose(p, [[1.0, 0.375, 0.0], [0.75, 0.375, 1.0]])
    assert (inclusion_probabilities(size, 5.0) == (size > 0)).all(), "as many as there are"
    assert (inclusion_probabilities(size, 99.0) == (size > 0)).all()
    assert (inclusion_probabilities(np.zeros((2, 3)), 4.0) == 0).all()
    assert (inclusion_probabilities(np.full((1, 4), 1e-300), 4.0) == 1).all()


def mean_weights(group: TrajectoryGroup, p_Gm: np.ndarray, k: int, *, claimed: np.ndarray | None = None) -> np.ndarray:
    """[G, m]: E_u[weight of each step] of steps that are taken together, exact: what is taken is constant between the
    edges of the line.  ``claimed``: probabilities that the weights are made of, in place of those that take."""
    table, ends = step_table(group, "all", (EOS,)), np.cumsum(p_Gm)
    edges = np.unique(np.concatenate([[0.0, 1.0], 1.0 - ends % 1.0]))
    total_Gm, counts = np.zeros_like(p_Gm), set()
    for u, length in zip((edges[1:] + edges[:-1]) / 2, np.diff(edges), strict=True):
        if length < 1e-12:
            continue
        rows = take_steps(table, p_Gm, k, Fixed(u), together=True)  # type: ignore[arg-type]
        counts.add(sum(len(row.steps) for row in rows))
        for row, taken in enumerate(rows):
            weights = taken.weights if claimed is None else taken.weights * (p_Gm / claimed)[row, taken.steps]
            total_Gm[row, taken.steps] += length * weights
    assert counts <= {int(np.floor(p_Gm.sum())), int(np.ceil(p_Gm.sum()))}, "as many as the probabilities add up to"
    return total_Gm


@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_step_counts_the_same_on_average(k: int) -> None:
    group = random_group(3, size=4)
    table = step_table(group, "all", (EOS,))
    size_Gm = np.where(table.eligible_Gm, numpy_generator(0, "sizes").random(table.eligible_Gm.shape), 0.0)
    p_Gm = inclusion_probabilities(size_Gm, k * 4.0)
    wanted_Gm = table.eligible_Gm * k / table.denominator_G[:, None]
    np.testing.assert_allclose(mean_weights(group, p_Gm, k), wanted_Gm, rtol=1e-9)
    uniform_Gm = table.eligible_Gm * k * 4.0 / table.eligible_Gm.sum()
    if k == 1:
        biased = mean_weights(group, p_Gm, k, claimed=np.where(p_Gm > 0, uniform_Gm, 1.0))
        assert abs(biased - wanted_Gm).max() > 0.1, "control: weights of another law"


def test_one_by_one_they_are_taken_as_often() -> None:
    group = random_group(3, size=4)
    table = step_table(group, "all", (EOS,))
    p_Gm = inclusion_probabilities(
        np.where(table.eligible_Gm, 1.0 + np.arange(table.eligible_Gm.size).reshape(4, -1), 0.0), 4.0
    )
    generator, found_Gm = numpy_generator(1, "taken"), np.zeros_like(p_Gm)
    for _ in range(4000):
        for row, taken in enumerate(take_steps(table, p_Gm, 1, generator, together=False)):
            found_Gm[row, taken.steps] += 1 / 4000
    assert abs(found_Gm - p_Gm).max() < 0.04


def test_no_step_is_scored_twice_and_none_without_an_advantage() -> None:
    group = random_group(5, size=6)
    (credit_G,) = Agrpo(AgrpoConfig()).credit([group])
    credit_G[2] = 0.0
    for seed in range(30):
        for spread in (True, False):
            objective = Agrpo(AgrpoConfig(draws="once", k=2, low_discrepancy=spread))
            wanted = objective.wanted(0, group, credit_G, UpdateContext(seed, 0, groups=1, eos_ids=(EOS,)))
            places = [(view.row, view.step) for (view,) in wanted.units]
            assert len(set(places)) == len(places) and all(row != 2 for row, _ in places)
            assert wanted.divisor == 12
            if spread:
                assert abs(len(places) - 10) <= 1, "two for each of the five"


def test_a_tiny_advantage_is_no_large_weight() -> None:
    group = random_group(5, size=6)
    credit_G = np.array([0.5, -0.5, 1e-9, 0.25, -0.25, 1.0])
    largest = []
    for seed in range(300):
        wanted = Agrpo(AgrpoConfig(draws="once", k=1)).wanted(
            0, group, credit_G, UpdateContext(seed, 0, groups=1, eos_ids=(EOS,))
        )
        largest.append(wanted.statistics.values()["importance_weight/max"])
        assert all(abs(view.credit) * view.weight < 20 for (view,) in wanted.units), "the floor bounds what a step does"
    assert 1 < max(largest) < 50


def test_with_a_kl_term_every_step_may_be_taken() -> None:
    group = dataclasses.replace(random_group(5, size=6), rewards=np.zeros((6, 2), np.float32))
    objective = Agrpo(AgrpoConfig(draws="once", k=2, beta=0.1))
    (credit_G,) = objective.credit([group])
    contexts = [UpdateContext(seed, 0, groups=1, eos_ids=(EOS,)) for seed in range(200)]
    units = [objective.wanted(0, group, credit_G, context).units for context in contexts]
    places = {(view.row, view.step) for found in units for (view,) in found}
    assert len(places) == step_table(group, "all", (EOS,)).eligible_Gm.sum()


@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_all_steps_taken_have_the_gradient_of_expected_reward(toy: Toy) -> None:
    everything = in_order(toy, toy.steps)
    taken = mean_gradient(toy, Agrpo(AgrpoConfig(draws="once", k=toy.steps)), everything)
    assert relative_error(taken, exact_gradient(toy)) < 1e-6


# ---- the baseline by fills


def others(toy: Toy, states: int) -> list[TrajectoryGroup]:
    """Groups whose fills foretell their rewards well enough for a slope that is far from 0."""
    everything, numbers = in_order(toy, states), numpy_generator(5, "other groups")
    groups = [rows_of(everything, numbers.integers(0, everything.size, 4).tolist()) for _ in range(3)]
    return [
        dataclasses.replace(group, branch_rewards=np.repeat(group.rewards[:, None, None], states, axis=1) * 0.8)
        for group in groups
    ]


@pytest.mark.parametrize("states", ["all", "every other"])
@pytest.mark.parametrize("toy", TOYS, ids=str)
@pytest.mark.slow
def test_fills_leave_the_gradient_of_expected_reward(toy: Toy, states: str) -> None:
    count = toy.steps if states == "all" else max(1, toy.steps // 2)
    objective = Agrpo(AgrpoConfig(draws="once", k=toy.steps, baseline="fills"))
    everything, rest = in_order(toy, count), others(toy, count)
    exact = exact_gradient(toy) * 2  # the mean of the others leaves no factor (G-1)/G
    assert relative_error(mean_gradient(toy, objective, everything, others=rest), exact) < 1e-6
    credit, *_ = objective.credit([rows_of(everything, [0, 3]), *rest])
    plain = leave_one_out_advantages(rows_of(everything, [0, 3]).rewards)
    assert abs(credit - plain[:, None]).max() > 0.05, "the fills matter"


def test_control_the_fill_of_the_state_after_the_step_is_biased() -> None:
    toy = THREE_POSITIONS
    everything = in_order(toy, toy.steps)
    assert everything.branch_rewards is not None
    after = np.concatenate([everything.branch_rewards[:, 1:], everything.rewards[:, None, None]], axis=1)
    objective = Agrpo(AgrpoConfig(draws="once", k=toy.steps, baseline="fills"))
    found = mean_gradient(
        toy, objective, dataclasses.replace(everything, branch_rewards=after), others=others(toy, toy.steps)
    )
    assert relative_error(found, exact_gradient(toy) * 2) > 0.05


def test_control_slopes_of_the_own_group_are_biased() -> None:
    toy = SMALLEST
    everything = in_order(toy, toy.steps)

    class Own(Agrpo):
        def credit(self, groups: Any) -> Any:
            return step_advantages([groups[0], groups[0]])

    found = mean_gradient(toy, Own(AgrpoConfig(draws="once", k=toy.steps, baseline="fills")), everything)
    assert relative_error(found, exact_gradient(toy) * 2) > 0.05


APART = 0.5
"""Weight of the part of diversity."""


def distances(ids_nC: np.ndarray) -> np.ndarray:
    """[n, n], the share of positions in which two completions differ."""
    return np.asarray((ids_nC[:, None] != ids_nC).mean(axis=-1))


def with_diversity(group: TrajectoryGroup, name: str = DIVERSITY) -> TrajectoryGroup:
    """As an actor adds the part: fills have 0 in it."""
    assert group.branch_rewards is not None
    apart_G = APART * distances(group.completion_ids).sum(axis=1) / (group.size - 1)
    return dataclasses.replace(
        group,
        reward_names=(*group.reward_names, name),
        rewards=np.column_stack([group.rewards, apart_G.astype(np.float32)]),
        branch_rewards=np.pad(group.branch_rewards, [(0, 0)] * 3 + [(0, 1)]),
    )


def gradient_with_diversity(toy: Toy, size: int) -> np.ndarray:
    """By central differences, of expected reward plus what docs/methods.md says that the part comes to: half its
    weight, times (G-2)/(G-1), times the mean distance of two completions; shape of the table, over m."""
    paths, theta, eps = enumerate_trajectories(toy), toy.parameters, 1e-5
    reward_n, apart_nn = paths.rewards().sum(axis=1), distances(paths.ids)

    def value(theta: np.ndarray) -> float:
        law_n = independent_law(toy, theta, paths)
        return float(law_n @ reward_n + APART / 2 * (size - 2) / (size - 1) * (law_n @ apart_nn @ law_n))

    gradient = np.zeros_like(theta)
    for index in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[index] = eps
        gradient[index] = (value(theta + step) - value(theta - step)) / (2 * eps)
    return gradient / toy.steps


@pytest.mark.parametrize("size", [2, 3])
def test_fills_know_nothing_of_diversity_and_leave_its_gradient(size: int) -> None:
    toy = SMALLEST
    everything, rest = in_order(toy, toy.steps), [with_diversity(group) for group in others(toy, toy.steps)]
    objective = Agrpo(AgrpoConfig(draws="once", k=toy.steps, baseline="fills"))
    found = mean_gradient(toy, objective, everything, others=rest, size=size, rewarded=with_diversity)
    exact = gradient_with_diversity(toy, size)
    assert relative_error(found, exact) < 1e-6
    if size == 3:  # of two, each is as far from the other, and the part says nothing
        assert relative_error(exact_gradient(toy) * 2, exact) > 0.02, "diversity matters"


def test_control_a_fill_above_others_that_have_diversity_is_biased() -> None:
    toy = SMALLEST
    unknown = partial(with_diversity, name="apart")  # a part like any other
    rest = [unknown(group) for group in others(toy, toy.steps)]
    objective = Agrpo(AgrpoConfig(draws="once", k=toy.steps, baseline="fills"))
    found = mean_gradient(toy, objective, in_order(toy, toy.steps), others=rest, size=3, rewarded=unknown)
    assert relative_error(found, gradient_with_diversity(toy, 3)) > 0.005


def test_a_group_alone_has_the_mean_of_the_others() -> None:
    group = with_branches(random_group(1, size=4), [[0, 1, 2]] * 4, np.arange(12).reshape(4, 3))
    (credit_Gm,) = step_advantages([group])
    expected = np.repeat(leave_one_out_advantages(group.rewards)[:, None], group.sampler.steps, axis=1)
    np.testing.assert_array_equal(credit_Gm, expected)


def test_prompts_that_say_nothing_have_no_advantage_not_even_by_rounding() -> None:
    group = random_group(0, size=3)
    dead = with_branches(
        dataclasses.replace(group, rewards=np.tile(np.float32([0.1, 0.0]), (3, 1))), [[0, 1]] * 3, np.full((3, 2), 0.1)
    )
    live = with_branches(group, [[0, 1]] * 3, [[0.0, 1.0], [1.0, 0.0], [0.5, 1.0]])
    credit = step_advantages([dead, live, live])
    assert (credit[0] == 0).all() and credit[1].any()


def test_the_advantage_of_a_step_by_hand() -> None:
    """Two groups of two, so that each one's slope is the other's."""
    base = random_group(0, size=2)
    m = base.sampler.steps
    groups = []
    for rewards, fills in ([[1.0, 0.0], [[0.0, 1.0], [0.0, 0.0]]], [[1.0, 0.0], [[1.0, 1.0], [1.0, 0.0]]]):
        group = dataclasses.replace(base, rewards=np.column_stack([rewards, np.zeros(2)]).astype(np.float32))
        groups.append(with_branches(group, [[0, m // 2]] * 2, fills))
    first, second = step_advantages(groups)
    # The second group's rewards are 1 and -1 above the other's, and its fills (1, 0) and (1, -1): products 1 and 2,
    # squares 1 and 2, held back by the mean square of a step.
    half = np.arange(m) < m // 2
    held_back = np.where(half, 1.0, 2.0).mean()
    slope_m = np.where(half, 1 / (1 + held_back), 2 / (2 + held_back))
    np.testing.assert_allclose(first[0], 1 - slope_m * np.where(half, 0.0, 1.0))
    np.testing.assert_allclose(first[1], -1 - slope_m * -1.0)
    assert second.shape == (2, m)


def test_settings_say_what_is_branched() -> None:
    sampler = SamplerSpec(24, 24, 6, "random", 1.0)
    assert AgrpoConfig().branches(sampler) is None
    assert AgrpoConfig(baseline="fills").branches(sampler) == GreedyBranches(6, evenly=True)
    assert AgrpoConfig(baseline="fills", fills=4).branches(sampler) == GreedyBranches(4, evenly=True)


def test_the_gradient_does_not_depend_on_ranks_and_forwards() -> None:
    texts, orders = [[2, 3], [4, 5, 6, 7], [8], [8, 2, 3]], [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    groups = [
        with_branches(
            walked_group(texts, orders, steps=2, rewards=[0, 1, 0.5, 2], group_id=i, entropy=np.eye(4)),
            [[0, 1]] * 4,
            np.arange(8).reshape(4, 2) * (i + 1) % 3,
        )
        for i in range(2)
    ]
    objective = Agrpo(AgrpoConfig(draws="once", k=1, baseline="fills", beta=0.3))
    whole, figures = planned_gradient(objective, groups, ranks=1, views_per_forward=99, denoiser=STATE_TABLES)
    assert np.linalg.norm(whole) > 0.01
    for ranks, views, backwards in ((1, 1, False), (2, 3, True), (3, 2, False)):
        layout: dict[str, Any] = {"ranks": ranks, "views_per_forward": views, "backwards": backwards}
        cut, same = planned_gradient(objective, groups, denoiser=STATE_TABLES, **layout)
        np.testing.assert_allclose(cut, whole, atol=1e-12)
        assert same == pytest.approx(figures)


def test_rewards_of_fills_are_totals() -> None:
    rewards = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    np.testing.assert_array_equal(fill_rewards(rewards), rewards.sum(axis=2))
    assert total_rewards(rewards[0]).tolist() == [1.0, 5.0, 9.0]
