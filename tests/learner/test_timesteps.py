"""Sampled denoising steps: the published law to the letter, unbiasedness over u, strata, and rows that ended early."""

import numpy as np
import pytest

from learner.likelihood.timesteps import (
    StepTable,
    draw_timesteps,
    draw_uniforms,
    last_token_step,
    step_probabilities,
    step_table,
    stratify,
)
from rollout.seeds import numpy_generator
from tests.support.hand_made import make_group, random_group, recorded_case

EOS = 9


@pytest.fixture
def published() -> StepTable:
    """An example worked by hand: entropies .3 .6 0 .1 .9 at steps 0..4, the last token at step 3."""
    group = make_group(
        [[1, 1, 1, 1, EOS]], [[0, 1, 2, 3, 4]], steps=5, entropy=[[0.3, 0.6, 0.0, 0.1, 0.9]], rewards=[[0.0]]
    )
    return step_table(group, "until_last_token", (EOS,))


@pytest.fixture
def retired():
    """Blocks of 2, one token a step. Row 0: block 1 came out all EOS, so block 2 was filled. Row 1: all EOS."""
    return make_group(
        [[1, 2, EOS, EOS, EOS, EOS], [EOS] * 6, [1, EOS, EOS, 2, 3, EOS]],
        [[1, 0, 2, 3, 4, 4], [0, 1, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5]],
        steps=6,
        block_length=2,
        drawn=[[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6],
    )


def one_draw(table: StepTable, u: float, sampling="entropy", floor: float = 0.0) -> tuple[int, float]:
    (row,) = draw_timesteps(table, np.array([[u]]), sampling, floor)
    return int(row.steps[0]), float(row.weights[0])


def sliver(table: StepTable) -> float:
    """A u inside the 1e-8 that the step of zero entropy has (0.9 to 0.90000001, but for the float32 of the record)."""
    p = step_probabilities(table, "entropy")[0]
    return float(p[0] + p[1] + p[2] / 2)


def mean_over_u(table: StepTable, sampling, floor: float = 0.0) -> np.ndarray:
    """[G, m]: E_u[weight of each step], exact, as the estimator is constant between the edges of the law."""
    p_Gm = step_probabilities(table, sampling, floor)
    edges = np.unique(np.concatenate([[0.0, 1.0], np.cumsum(p_Gm, axis=1).ravel().clip(0, 1)]))
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    total_Gm = np.zeros_like(p_Gm)
    for u, length in zip(middles, lengths, strict=True):
        for row, drawn in enumerate(draw_timesteps(table, np.full((len(p_Gm), 1), u), sampling, floor)):
            total_Gm[row, drawn.steps] += length * drawn.weights
    return total_Gm


def test_published_example(published):
    np.testing.assert_allclose(step_probabilities(published, "entropy")[0], [0.3, 0.6, 1e-8, 0.1, 0], rtol=1e-6)
    np.testing.assert_allclose(np.cumsum(step_probabilities(published, "entropy")[0]), [0.3, 0.9, 0.90000001, 1, 1])
    for u, step, weight in ((0.05, 0, 0.833333), (0.5, 1, 0.416667), (sliver(published), 2, 2.5e7), (0.95, 3, 2.5)):
        drawn = one_draw(published, u)
        assert drawn[0] == step
        assert drawn[1] == pytest.approx(weight, rel=1e-6)
    steps = {one_draw(published, u)[0] for u in np.linspace(0, 1, 2001)}
    assert steps <= {0, 1, 2, 3}, "step 4 comes after the last token"


def test_the_floor_bounds_the_weight(published):
    assert one_draw(published, sliver(published))[1] > 1e7, "control: unbounded without it"
    law = step_probabilities(published, "entropy", 0.25)[0]
    assert (1 / (4 * law[:4])).max() <= 1 / 0.25
    assert law.sum() == pytest.approx(1)


@pytest.mark.parametrize("step_range", ["all", "until_last_token"])
@pytest.mark.parametrize(("sampling", "floor"), [("uniform", 0.0), ("entropy", 0.0), ("entropy", 0.3)])
def test_unbiased_over_u(published, retired, step_range, sampling, floor):
    """T1, T2: the mean over u is every eligible step with weight 1/D, for early-ended rows too."""
    tables = [published, step_table(retired, step_range, (EOS,)), step_table(random_group(1), step_range, (EOS,))]
    for table in tables:
        exact_Gm = table.eligible_Gm / table.denominator_G[:, None]
        np.testing.assert_allclose(mean_over_u(table, sampling, floor), exact_Gm, rtol=1e-7)


def test_control_weights_of_another_law_are_biased():
    table = step_table(random_group(1), "all", (EOS,))
    wrong = mean_over_u(table, "entropy") * step_probabilities(table, "entropy") / step_probabilities(table, "uniform")
    assert not np.allclose(wrong, table.eligible_Gm / table.denominator_G[:, None], rtol=1e-2)


def test_step_ranges_of_rows_that_ended_early(retired):
    """T7. Fillers are no actions: their step isn't eligible, and an all-EOS row has a denominator."""
    np.testing.assert_array_equal(last_token_step(retired, (EOS,)), [1, -1, 4])
    everything = step_table(retired, "all", (EOS,))
    np.testing.assert_array_equal(everything.eligible_Gm.sum(axis=1), [4, 2, 6])
    assert not everything.eligible_Gm[0, 4:].any()
    np.testing.assert_array_equal(everything.denominator_G, [6, 6, 6])
    published = step_table(retired, "until_last_token", (EOS,))
    np.testing.assert_array_equal(published.eligible_Gm.sum(axis=1), [2, 1, 5])
    np.testing.assert_array_equal(published.denominator_G, [2, 1, 5])
    assert published.eligible_Gm[1, 0]
    for u in np.linspace(0, 1, 50):
        for row, drawn in enumerate(draw_timesteps(published, np.full((3, 1), u), "entropy")):
            scored = (retired.unmask_step[row] == drawn.steps[0]) & retired.drawn[row]
            assert scored.sum() == 1, "one token a step, whatever was filled"


def test_one_draw_in_each_stratum():
    """T4."""
    for seed in range(20):
        u = draw_uniforms(numpy_generator(seed), 8, 24, strata="group")
        assert u.shape == (8, 24)
        np.testing.assert_array_equal(np.floor(np.sort(u.ravel()) * 192), np.arange(192))
        own = draw_uniforms(numpy_generator(seed), 8, 24, strata="row")
        np.testing.assert_array_equal(np.floor(own * 24), np.tile(np.arange(24), (8, 1)))
    assert (np.floor(np.sort(u, axis=1) * 24) != np.arange(24)).any(), "control: a group's strata don't fill a row's"
    plain = draw_uniforms(numpy_generator(0), 8, 24, strata="none")
    assert (np.floor(np.sort(plain.ravel()) * 192) != np.arange(192)).any(), "control: plain uniforms don't fill strata"


@pytest.mark.parametrize("sampling", ["uniform", "entropy"])
def test_u_that_rounds_to_one_stays_in_range(published, sampling):
    order, jitter = np.arange(192), np.full(192, np.nextafter(1.0, 0.0))
    u = stratify(order, jitter)[-1]
    assert u == 1.0, "control: the last stratum does reach 1.0"
    assert one_draw(published, u, sampling)[0] == 3
    assert one_draw(published, 0.0, sampling)[0] == 0


def test_u_on_an_edge_of_the_law():
    """Published: floor(u T) when uniform, the smallest step with F >= u by entropy."""
    table = step_table(make_group([[1, 1]], [[0, 1]], steps=2, rewards=[[0.0]]), "all", ())
    assert one_draw(table, 0.5, "uniform")[0] == 1
    assert one_draw(table, 0.5, "entropy")[0] == 0


def test_repeated_draws_are_merged(published):
    u = np.array([[0.1, 0.2, 0.5, 0.29]])
    (merged,) = draw_timesteps(published, u, "entropy")
    assert merged.steps.tolist() == [0, 1] and merged.counts.tolist() == [3, 1]
    apart = [one_draw(published, value)[1] for value in u[0]]
    assert merged.weights[0] == pytest.approx(apart[0] + apart[1] + apart[3])
    assert merged.weights[1] == pytest.approx(apart[2])


def test_a_slightly_negative_entropy_is_no_negative_probability():
    group = make_group([[1, 1]], [[0, 1]], steps=2, entropy=[[-5e-8, 0.5]], rewards=[[0.0]])
    assert (step_probabilities(step_table(group, "all", ()), "entropy") > 0).all()


@pytest.mark.parametrize("number", ["01", "03", "05", "07", "11", "13"])
def test_recorded_reference_draws(number):
    group, arrays, settings = recorded_case(number)
    table = step_table(group, "until_last_token", (settings["eos"],))
    np.testing.assert_array_equal(table.denominator_G, arrays["last_step"][:, 0] + 1)
    sampling = settings["importance_sampling"]
    if sampling == "entropy":
        np.testing.assert_allclose(step_probabilities(table, sampling), arrays["step_probs"], rtol=1e-5, atol=1e-12)
    for draw in range(settings["k"]):
        ours = draw_timesteps(table, arrays["u"][:, draw : draw + 1].astype(np.float64), sampling)
        np.testing.assert_array_equal([row.steps[0] for row in ours], arrays["mc_steps"][:, draw])
        np.testing.assert_allclose([row.weights[0] for row in ours], arrays["importance_weights"][:, draw], rtol=1e-5)
