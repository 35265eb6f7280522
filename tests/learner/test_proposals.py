"""Learned proposals of timesteps: the laws are those of the norms they were shown, judged on groups they weren't.

Shapes: H groups, G completions, m steps, N views of a group, P parameters.
"""

import dataclasses

import numpy as np
import pytest

from learner.bench.estimators import mean_weights
from learner.bench.proposals import (
    BOTH,
    ENTROPY,
    ITSELF,
    LAWS,
    STEP,
    UNIFORM,
    analyse,
    cosine_sums,
    laws_of,
    learned_norms,
    markdown,
)
from learner.bench.snapshot import GroupGradients
from learner.likelihood.timesteps import StepTable
from rewards.errors import DataError

G, M, P = 4, 5, 200
SCALE_M = np.array([8.0, 1.0, 0.2, 3.0, 0.5])


def made(seed: int, *, power: float = 0.0, shared: float = 0.0) -> GroupGradients:
    """Gradients whose norm is ``SCALE_M`` times a power of the entropy per unit of advantage; two of a completion have
    a cosine of ``shared``."""
    rng = np.random.default_rng(seed)
    entropy_Gm = rng.uniform(0.2, 5.0, size=(G, M))
    table = StepTable(np.ones((G, M), bool), np.full(G, M), entropy_Gm)
    noise_GmP = rng.normal(size=(G, M, P))
    direction_GmP = np.sqrt(shared) * rng.normal(size=(G, 1, P)) + np.sqrt(1 - shared) * noise_GmP
    direction_GmP /= np.linalg.norm(direction_GmP, axis=2, keepdims=True)
    credit_Gm = np.tile(np.array([[-2.0], [-0.5], [0.5], [2.0]]), (1, M))
    gradient_NP = (credit_Gm * SCALE_M * entropy_Gm**power)[:, :, None] * direction_GmP
    gradient_NP = gradient_NP.reshape(G * M, P)
    rows_N, steps_N = np.nonzero(table.eligible_Gm)
    return GroupGradients(
        table=table,
        rows_N=rows_N,
        steps_N=steps_N,
        credit_Gm=credit_Gm,
        gram_NN=gradient_NP @ gradient_NP.T,
        mean_P=(mean_weights(table)[rows_N, steps_N] @ gradient_NP).astype(np.float32),
        forwards=5.0,
        correct=0.5,
    )


def without_signal(group: GroupGradients) -> GroupGradients:
    nothing = np.zeros(0, np.int64)
    return dataclasses.replace(
        group, rows_N=nothing, steps_N=nothing, gram_NN=np.zeros((0, 0)), mean_P=np.zeros_like(group.mean_P)
    )


def test_learned_norms_are_those_of_the_other_half():
    groups = [made(seed, power=0.5) for seed in range(40)]
    for predicted_Gm, group in zip(learned_norms(groups, by_entropy=True), groups, strict=True):
        truth_Gm = SCALE_M * group.table.entropy_Gm**0.5
        np.testing.assert_allclose(predicted_Gm, truth_Gm, rtol=0.01)
    by_step = learned_norms([made(seed) for seed in range(40)], by_entropy=False)
    np.testing.assert_allclose(by_step[0], np.tile(SCALE_M, (G, 1)), rtol=1e-6)
    other = [made(0), *(made(seed) for seed in range(2, 40))]
    other[0] = dataclasses.replace(other[0], gram_NN=100 * other[0].gram_NN)
    changed = learned_norms(other, by_entropy=False)
    assert (changed[0] < 10).all() and (changed[1] > SCALE_M).any(), "a group's own norms never foretell its own"


def test_the_better_a_law_knows_the_norm_the_less_noise_it_leaves():
    groups = [made(seed, power=1.0) for seed in range(30)]
    found = analyse(groups, [1, 4], view_cost=2.0, seed=0) | {"snapshot": {"baseline": "group"}}
    noise = {(row["law"], row["design"], row["k"]): row["timestep_over_rollout"]["value"] for row in found["proposals"]}
    assert len(noise) == len(LAWS) * 2 * 2
    for design in ("group", "once"):
        itself, both = noise[ITSELF, design, 1], noise[BOTH, design, 1]
        step, uniform = noise[STEP, design, 1], noise[UNIFORM, design, 1]
        assert itself <= both < step < uniform
    own = next(row for row in found["proposals"] if (row["law"], row["design"], row["k"]) == (ENTROPY, "group", 4))
    assert own["total_x_work_ratio"]["value"] == 1.0, "the default's own row"
    assert markdown(found).count("\n| norms of step and entropy |") == 4


def test_control_entropy_says_nothing_where_the_norm_is_the_steps():
    """Learned from the step alone it is the better law, so the table tells the laws apart."""
    found = analyse([made(seed) for seed in range(30)], [1], view_cost=2.0, seed=0)
    noise = {(row["law"], row["design"]): row["timestep_over_rollout"]["value"] for row in found["proposals"]}
    assert noise[STEP, "group"] < 0.5 * noise[ENTROPY, "group"]


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_the_cosine_is_the_cosine_of_neighbours(shared):
    groups = [made(seed, shared=shared) for seed in range(40)]
    for lag in (1, 2):
        inner, earlier, later = np.sum([cosine_sums(groups, lag)], axis=1)[0]
        # Each direction has a random length of its own, so the expected cosine is the one of the shared part.
        assert inner / np.sqrt(earlier * later) == pytest.approx(shared * _norms(lag) if shared else 0.0, abs=0.05), lag


def _norms(lag: int) -> float:
    """Of pairs ``lag`` steps apart: the sum of the products of their norms over the root of the products of sums."""
    first_m, second_m = SCALE_M[:-lag], SCALE_M[lag:]
    return float(first_m @ second_m / np.sqrt((first_m**2).sum() * (second_m**2).sum()))


def test_a_step_that_one_half_never_saw_gets_the_mean_of_all():
    """Whatever the norms' scale is."""
    groups = [scaled(made(seed), 1e-3) for seed in range(20)]
    first = [without_step(group, 4) if place % 2 == 0 else group for place, group in enumerate(groups)]
    for by_entropy in (False, True):
        predicted_Gm = learned_norms(first, by_entropy=by_entropy)[1]
        assert (predicted_Gm[:, 4] < 1e-2).all() and (predicted_Gm[:, 4] > 1e-4).all()


def scaled(group: GroupGradients, factor: float) -> GroupGradients:
    return dataclasses.replace(group, gram_NN=group.gram_NN * factor**2, mean_P=group.mean_P * factor)


def without_step(group: GroupGradients, step: int) -> GroupGradients:
    left_N = group.steps_N != step
    gram_NN = group.gram_NN[np.ix_(left_N, left_N)]
    return dataclasses.replace(group, rows_N=group.rows_N[left_N], steps_N=group.steps_N[left_N], gram_NN=gram_NN)


def test_steps_that_are_never_so_far_apart_have_no_cosine():
    groups = [without_step(without_step(made(seed), 0), 4) for seed in range(4)]
    found = analyse(groups, [1], view_cost=2.0, seed=0)
    assert found["cosines"].keys() == {"1", "2"}


def test_groups_without_a_signal_take_part_and_half_of_them_empty_is_refused():
    groups = [made(seed) for seed in range(10)]
    groups[3] = without_signal(groups[3])
    found = analyse(groups, [1], view_cost=2.0, seed=0)
    assert found["groups"] == 10
    assert all(len(drawn) == 10 for drawn in laws_of(groups).values())
    with pytest.raises(DataError, match="half of the groups have no signal"):
        analyse(
            [group if place % 2 else without_signal(group) for place, group in enumerate(groups)],
            [1],
            view_cost=2.0,
            seed=0,
        )
