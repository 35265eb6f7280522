"""Views: the state just before a step, what is scored in it, and the arrays that go with each score."""

import numpy as np
import pytest

from learner.likelihood.views import Law, View, build_batch, pad_view, step_view
from tests.support.hand_made import make_group, random_group, recorded_case

MASK, PAD, EOS = 99, 98, 9


@pytest.fixture
def short():
    """Two tokens a step in row 0; row 1 came out all EOS in its first block of two and was filled at step 1."""
    return make_group(
        [[1, 2, 3, 4], [EOS, EOS, EOS, EOS]],
        [[0, 1, 0, 1], [0, 0, 1, 1]],
        steps=2,
        drawn=[[1, 1, 1, 1], [1, 1, 0, 0]],
        logp=[[-0.1, -0.2, -0.3, -0.4], [-0.5, -0.6, 0, 0]],
        logp_raw=[[-1.1, -1.2, -1.3, -1.4], [-1.5, -1.6, 0, 0]],
        entropy=[[2.1, 2.2, 2.3, 2.4], [2.5, 2.6, 0, 0]],
        prompt_ids=np.array([50, 51], dtype=np.int32),
        support_indptr=np.array([0, 1, 3, 4, 6, 7, 8, 8, 8]),
        support_ids=np.array([1, 2, 7, 3, 4, 8, EOS, EOS], dtype=np.int32),
    )


def build(views, groups):
    return build_batch(views, groups, mask_id=MASK, pad_id=PAD)


def test_inputs_mask_what_is_revealed_at_or_after_the_step(short):
    batch = build(
        [step_view(short, 0, 0, 0, 1.0, 1.0), step_view(short, 0, 0, 1, 1.0, 1.0), step_view(short, 0, 1, 0, 1.0, 1.0)],
        [short],
    )
    assert batch.input_ids.dtype == np.int64
    np.testing.assert_array_equal(
        batch.input_ids,
        [
            [50, 51, MASK, MASK, MASK, MASK],
            [50, 51, 1, MASK, 3, MASK],
            [50, 51, MASK, MASK, MASK, MASK],  # fillers too: they came after step 0
        ],
    )
    assert batch.attention_mask is None


def test_scores_are_the_drawn_positions_of_the_step(short):
    batch = build([step_view(short, 0, 0, 1, -0.5, 2.0), step_view(short, 0, 1, 0, 0.5, 3.0)], [short])
    np.testing.assert_array_equal(batch.score_rows, [3, 5, 6 + 2, 6 + 3])
    assert (batch.input_ids.ravel()[batch.score_rows] == MASK).all()
    np.testing.assert_array_equal(batch.targets, [2, 4, EOS, EOS])
    np.testing.assert_array_equal(batch.view_of_score, [0, 0, 1, 1])
    np.testing.assert_allclose(batch.logp, [-0.2, -0.4, -0.5, -0.6])
    np.testing.assert_array_equal(batch.position, [1, 3, 0, 1])
    np.testing.assert_array_equal(batch.credit, [-0.5, -0.5, 0.5, 0.5])
    np.testing.assert_array_equal(batch.weight, [2.0, 2.0, 3.0, 3.0])
    indptr, ids = batch.support
    np.testing.assert_array_equal(indptr, [0, 2, 4, 5, 6])
    np.testing.assert_array_equal(ids, [2, 7, 4, 8, EOS, EOS])


def test_a_step_of_fillers_is_never_a_view(short):
    with pytest.raises(AssertionError, match="drew nothing at step 1"):
        build([step_view(short, 0, 1, 1, 1.0, 1.0)], [short])


def test_prompts_of_different_length_are_padded_on_the_left():
    groups = [random_group(0, prompt=3), random_group(1, prompt=5)]
    batch = build([step_view(groups[0], 0, 0, 0, 1.0, 1.0), step_view(groups[1], 1, 2, 1, 1.0, 1.0)], groups)
    assert batch.input_ids.shape == (2, 13)
    np.testing.assert_array_equal(batch.attention_mask, [[0, 0] + [1] * 11, [1] * 13])
    np.testing.assert_array_equal(batch.input_ids[0, :5], [PAD, PAD, *groups[0].prompt_ids])
    alone = build([step_view(groups[0], 0, 0, 0, 1.0, 1.0)], groups)
    np.testing.assert_array_equal(alone.input_ids[0], batch.input_ids[0, 2:])
    np.testing.assert_array_equal(alone.score_rows + 2, batch.score_rows[batch.view_of_score == 0])
    drawn_at_1 = groups[1].completion_ids[2][groups[1].unmask_step[2] == 1]
    np.testing.assert_array_equal(batch.targets, [*alone.targets, *drawn_at_1])


def test_every_drawn_token_is_scored_in_exactly_one_step():
    group = random_group(3)
    views = [
        step_view(group, 0, row, step, 1.0, 1.0) for row in range(group.size) for step in range(group.sampler.steps)
    ]
    batch = build(views, [group])
    assert sorted(batch.targets) == sorted(group.completion_ids.ravel())
    assert batch.logp.sum() == pytest.approx(group.logp.sum(), rel=1e-6)


@pytest.mark.parametrize("number", ["01", "03", "05", "07", "11", "13"])
def test_recorded_reference_positions(number):
    group, arrays, _ = recorded_case(number)
    P, C = group.prompt_ids.size, group.completion_ids.shape[1]
    for draw, positions_BU in enumerate(arrays["mc_positions"]):
        views = [step_view(group, 0, row, int(arrays["mc_steps"][row, draw]), 1.0, 1.0) for row in range(group.size)]
        batch = build(views, [group])
        ours = (batch.score_rows % (P + C) - P).reshape(positions_BU.shape)
        np.testing.assert_array_equal(ours, np.sort(positions_BU, axis=1))
        recorded = np.take_along_axis(arrays["old_logps_at_step"][draw], np.argsort(positions_BU, axis=1), axis=1)
        np.testing.assert_array_equal(batch.logp.reshape(positions_BU.shape), recorded)


def test_the_raw_law_has_no_support_and_the_rollouts_raw_log_probs(short):
    views = [step_view(short, 0, 0, 1, 1.0, 1.0)]
    batch = build_batch(views, [short], mask_id=MASK, pad_id=PAD, law=Law.RAW)
    assert (batch.support, batch.choices, batch.temperature) == (None, None, 1.0)
    np.testing.assert_allclose(batch.logp, [-1.2, -1.4])


def test_views_that_the_rollout_never_saw(short):
    """Masks of a prompt, of any positions, and units."""
    hidden_C, scored_n = np.array([True, False, True, True]), np.array([0, 3])
    views = [
        View(0, 0, hidden_C, scored_n, 0.5, -2.0, hidden_P=np.array([False, True])),
        View(0, 0, ~hidden_C, np.array([1]), 0.5, 1.0),
        View(0, 1, hidden_C, scored_n, -0.5, 1.0),
    ]
    batch = build_batch(views, [short], mask_id=MASK, pad_id=PAD, law=Law.RAW, unit_sizes=[2, 1])
    np.testing.assert_array_equal(
        batch.input_ids, [[50, MASK, MASK, 2, MASK, MASK], [50, 51, 1, MASK, 3, 4], [50, 51, MASK, EOS, MASK, MASK]]
    )
    np.testing.assert_array_equal(batch.score_rows, [2, 5, 6 + 3, 12 + 2, 12 + 5])
    np.testing.assert_array_equal(batch.targets, [1, 4, 2, EOS, EOS])
    np.testing.assert_array_equal(batch.weight, [-2.0, -2.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(batch.unit_of_score, [0, 0, 0, 1, 1])
    assert [view.row for view in batch.first_views] == [0, 1]
    assert batch.logp is None
    with pytest.raises(AssertionError, match="known at recorded states only"):
        build(views, [short])
    with pytest.raises(AssertionError, match="scores what it shows"):
        build_batch([views[0]._replace(scored_n=np.array([1]))], [short], mask_id=MASK, pad_id=PAD, law=Law.RAW)


def test_a_pad_scores_nothing(short):
    batch = build([pad_view(short)], [short])
    assert batch.input_ids.shape == (1, 6) and not (batch.input_ids == MASK).any()
    assert batch.targets.size == batch.score_rows.size == 0
    assert batch.support is not None and batch.support[0].tolist() == [0]
