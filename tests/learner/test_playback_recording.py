"""What playback needs is recorded as it happened, and recording it changes nothing."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from transformers import PreTrainedTokenizerBase

from learner.likelihood.scorer import score
from learner.likelihood.views import View, build_batch, step_view
from learner.objectives import make_objective
from learner.objectives.advantages import group_advantages
from learner.ranks.plan import plan_update
from learner.ranks.scored import ScoredView, recorded_groups
from learner.reporting.metrics_file import read_rows
from learner.reporting.playback import ORDER_BINS, PlaybackRecorder, order_map, view_arrays
from learner.reporting.reporter import Reporter
from learner.runs.directory import RunDirectory
from rewards.task import Problem
from rollout.adapters import AdapterState, digest, load_state
from rollout.models.encoding import completion_text, load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import attach_lora
from rollout.trajectory import TrajectoryGroup
from services.store import schema
from services.store.writer import StoreWriter
from tests.support import store_rows
from tests.support.hand_made import Numbered, make_group, random_group
from tests.support.learner_ranks import (
    SAMPLER,
    ProbedGroup,
    draw_batch,
    importing_ray,
    lora_spec,
    probed_groups,
    put,
    random_adapter,
    settings,
)
from tests.support.playable_runs import branched

LR = 1e-3

# ---- real ranks


@pytest.fixture(scope="module")
def ranks(tiny_model) -> Iterator[dict[int, ProbedGroup]]:
    with importing_ray(cpus=4), probed_groups(tiny_model) as started:
        yield started


@pytest.fixture(scope="module")
def adapter(tiny_model) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def batch(tiny_model, adapter) -> list[TrajectoryGroup]:
    return draw_batch(tiny_model, settings(), adapter)


def planned_views(batch, tiny_model, config, update: int) -> list[View]:
    plan = plan_update(
        batch,
        objective=make_objective(config.objective),
        run_seed=config.run.seed,
        update_index=update,
        eos_ids=(policy_adapter(tiny_model).eos_token_id,),
        ranks=1,
        views_per_forward=1,
    )
    return [view for forward in plan.forwards[0] for view in forward.views]


def scorers_word(tiny_model, config, adapter, batch, view: ScoredView) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of the view under ``adapter``, by the scorer alone: one view, no DeepSpeed."""
    family = policy_adapter(tiny_model)
    model = attach_lora(load_model(tiny_model, config.learner.dtype), family, lora_spec(config))
    load_state(model, adapter)
    alone = build_batch(
        [step_view(batch[view.group], view.group, view.row, view.step, 1.0, 1.0)],
        batch,
        mask_id=family.mask_token_id,
        pad_id=0,
    )
    with torch.no_grad():
        scores = score(model, alone, family=family)
    return scores.logp_N, scores.choice_logp_Z


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_recorded_steps_and_weights_are_the_plans_and_log_probs_the_scorers(
    ranks, tiny_model, adapter, batch, number
) -> None:
    config = settings(learner__ranks=number, samples_per_iteration=5)
    group = ranks[number].restart(config, adapter)
    refs, weights = put(batch), adapter
    for update in range(2):
        scored = group.update(refs, update, LR).scored
        wanted = [view for view in planned_views(batch, tiny_model, config, update) if view.group in (0, 2)]
        assert sorted((v.group, v.row, v.step, v.draws, v.weight) for v in scored) == sorted(
            (v.group, v.row, v.step, v.draws, v.weight) for v in wanted
        )
        assert all(sum(v.draws for v in scored if (v.group, v.row) == (0, row)) == config.objective.k for row in (0, 3))
        distances = []
        for view in scored:
            source = batch[view.group]
            at = np.flatnonzero((source.unmask_step[view.row] == view.step) & source.drawn[view.row])
            assert view.positions.tolist() == at.tolist()
            expected, _ = scorers_word(tiny_model, config, weights, batch, view)
            assert view.logp == pytest.approx(expected.numpy(), abs=2e-5)
            assert math.isnan(view.choice_logp), "random order is no action of the policy"
            distances.append(np.abs(view.logp - source.logp[view.row, at]).max())
        if update == 0:
            assert max(distances) < 1e-5, "un-updated weights"
        else:
            assert max(distances) > 1e-3, "control: the weights have moved"
        weights = group.publish().state


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_recording_changes_no_bit_of_training(ranks, adapter, batch, number) -> None:
    found = {}
    for completions in (0, 4, 1000):
        config = settings(learner__ranks=number, samples_per_iteration=completions)
        group = ranks[number].restart(config, adapter)
        reports = [group.update(put(batch), update, LR) for update in range(3)]
        counts = group.ask("counted")
        figures = [dataclasses.replace(report, seconds=0.0, scored=(), credit=()) for report in reports]
        credit = [credit_G.tolist() for report in reports for credit_G in report.credit]
        found[completions] = (digest(group.publish().state), figures, credit, counts)
        recorded = {view.group for view in reports[0].scored}
        assert recorded == {0: set(), 4: {0}, 1000: {0, 2, 3}}[completions], "group 1 has no signal"
    assert found[0] == found[4] == found[1000], "weights, figures and numbers of forwards"
    other = ranks[number].restart(settings(learner__ranks=number), adapter)
    other.update(put(batch), 0, LR)
    assert digest(other.publish().state) != found[0][0], "control: one update is another policy than three"


@pytest.mark.slow
def test_one_rank_and_two_record_the_same(ranks, adapter, batch) -> None:
    arrays = []
    for number in (1, 2):
        group = ranks[number].restart(settings(learner__ranks=number, samples_per_iteration=4), adapter)
        scored = group.update(put(batch), 0, LR).scored
        arrays.append(view_arrays([(0, view) for view in scored if view.row == 2]))
    one, two = arrays
    for name in one:
        if name == "new_logp":
            assert one[name] == pytest.approx(two[name], abs=1e-5)
        else:
            np.testing.assert_array_equal(one[name], two[name])
    assert one["new_logp"].size > one["view_step"].size >= 2


@pytest.mark.slow
def test_choices_of_positions_are_recorded_where_they_are_actions(ranks, tiny_model, adapter) -> None:
    decoupled = dataclasses.replace(SAMPLER, position_rule="decoupled_confidence", position_temperature=0.1)
    batch = draw_batch(tiny_model, settings(), adapter, decoupled)
    config = settings(samples_per_iteration=4)
    scored = ranks[1].restart(config, adapter).update(put(batch), 0, LR).scored
    assert scored
    for view in scored:
        expected = float(batch[0].position_logp[view.row, view.step])
        assert view.choice_logp == pytest.approx(expected, abs=1e-3)


# ---- which groups, in which form


def credits(groups: Sequence[TrajectoryGroup]) -> list[np.ndarray]:
    return [group_advantages(group.rewards) for group in groups]


def test_whole_groups_with_a_signal_come_first() -> None:
    silent = make_group([[1, 2]] * 4, [[0, 1]] * 4, steps=2, rewards=np.ones((4, 1)), group_id=0)
    groups = [silent, random_group(1), random_group(2), random_group(3)]
    assert recorded_groups(credits(groups), 0) == ()
    assert recorded_groups(credits(groups), 1) == recorded_groups(credits(groups), 4) == (1,)
    assert recorded_groups(credits(groups), 5) == (1, 2)
    assert recorded_groups(credits(groups), 13) == (0, 1, 2, 3) == recorded_groups(credits(groups), 10**9)
    assert recorded_groups(credits([silent]), 2) == (0,), "better a group without signal than none"


def views_of(*steps: tuple[int, int]) -> list[tuple[int, ScoredView]]:
    """(update, step) pairs, two positions each."""
    return [
        (update, ScoredView(0, 0, step, 1, 0.5, np.array([step, step + 1], np.int32), np.float32([-1, -2]), math.nan))
        for update, step in steps
    ]


def test_the_arrays_do_not_depend_on_the_order_that_ranks_answer_in() -> None:
    expected = view_arrays(views_of((0, 1), (0, 4), (1, 2)))
    assert expected["view_step"].tolist() == [1, 4, 2] and expected["view_update"].tolist() == [0, 0, 1]
    assert expected["new_view"].tolist() == [0, 0, 1, 1, 2, 2]
    assert expected["new_position"].tolist() == [1, 2, 4, 5, 2, 3]
    shuffled = view_arrays(views_of((1, 2), (0, 4), (0, 1)))
    for name in expected:
        np.testing.assert_array_equal(expected[name], shuffled[name])
    assert all(array.size == 0 for array in view_arrays([]).values())


def test_drawn_masks_come_in_an_order_of_their_own() -> None:
    """They have no step to be sorted by; a recorded step beside them stays as it was."""
    masks = [([0, 1, 2], 0.5, -1.0), ([0, 2], 1.25, -2.0), ([1], -0.25, -3.0), ([1], -0.25, -4.0), ([1], 0.75, -3.0)]
    views = [
        (0, ScoredView(0, 0, -1, 1, w, np.array(at, np.int32), np.full(len(at), logp, np.float32), math.nan))
        for at, w, logp in masks
    ]
    views += views_of((0, 3), (1, 2))
    expected = view_arrays(views)
    assert expected["view_step"].tolist() == [-1, -1, -1, -1, -1, 3, 2]
    assert expected["view_weight"].tolist()[:5] == [0.5, 1.25, -0.25, -0.25, 0.75]
    assert expected["new_position"].tolist() == [0, 1, 2, 0, 2, 1, 1, 1, 3, 4, 2, 3]
    for order in ((6, 5, 4, 3, 2, 1, 0), (3, 0, 5, 2, 6, 4, 1)):
        shuffled = view_arrays([views[i] for i in order])
        for name in expected:
            np.testing.assert_array_equal(expected[name], shuffled[name])


def test_the_order_map_counts_drawn_tokens_only() -> None:
    drawn = np.array([[True, True, False, False]])
    group = make_group([[1, 2, 3, 4]], [[1, 0, 1, 1]], steps=2, drawn=drawn)
    about, arrays = order_map([group, make_group([[1, 2, 3, 4]], [[1, 1, 0, 1]], steps=2)])
    assert arrays["order_counts"].tolist() == [[0, 2], [1, 1], [1, 0], [0, 1]]
    assert arrays["order_mean_step"].tolist() == [1.0, 0.5, 0.0, 1.0]
    assert about["order"] == {
        "completions": 2,
        "positions": 4,
        "steps": 2,
        "positions_per_bin": 1,
        "steps_per_bin": 1,
    }
    _, arrays = order_map([group])
    assert math.isnan(arrays["order_mean_step"][3]), "never drawn"


def test_the_order_map_is_bounded() -> None:
    group = random_group(3, size=2, length=1000, per_step=1)
    about, arrays = order_map([group])
    counts = arrays["order_counts"]
    assert counts.shape[0] <= ORDER_BINS[0] and counts.shape[1] <= ORDER_BINS[1]
    assert counts.sum() == group.drawn.sum() == 2000
    assert about["order"]["positions_per_bin"] == 4 and about["order"]["steps_per_bin"] == 8


# ---- what reaches the store


@pytest.fixture
def reporter(tmp_path) -> Iterator[Reporter]:
    with RunDirectory.create(tmp_path, "r") as run_dir:
        reporter = Reporter(run_dir, StoreWriter(run_dir.store_url, "r"), total_iterations=2, quiet=True)
        yield reporter
        reporter.close()


def stored(reporter: Reporter, tmp_path) -> list[tuple[dict, dict[str, np.ndarray], dict, int]]:
    """Each sample's row, arrays, JSON of the header, and bytes."""
    assert reporter.flush(10)
    engine = schema.open_engine(f"sqlite:///{tmp_path / 'r' / 'store.sqlite'}", create=False)
    found = []
    for row in store_rows.list_samples(engine, "r"):
        data = store_rows.sample_trajectory(engine, row["id"])
        assert data is not None
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found.append((row, load(data), json.loads(header["__metadata__"]["playback"]), len(data)))
    engine.dispose()
    return found


def recorder_of(reporter: Reporter, tokenizer: PreTrainedTokenizerBase, *, completions: int) -> PlaybackRecorder:
    """Of the one problem that hand-made groups are of."""
    train, held_out = ([Problem("hand-made", {"n": n})] for n in (1, 2))
    task = Numbered()
    return PlaybackRecorder(reporter, tokenizer, completions=completions, task=task, train=train, held_out=held_out)


def test_what_the_task_shows_is_kept_and_its_mistakes_cost_no_sample(reporter, tiny_model, tmp_path) -> None:
    recorder, groups = recorder_of(reporter, load_tokenizer(tiny_model), completions=8), [random_group(0, size=2)]
    groups[0].correct[:] = [True, False]
    step = int(groups[0].unmask_step[0, 4])
    logp = groups[0].logp[0, [4]] + np.float32(0.25)
    views = [ScoredView(0, 0, step, 1, -1.5, np.array([4], np.int32), logp, math.nan)]
    recorder.iteration(7, groups, credits(groups), [views])
    recorder.evaluation(7, "trained", groups)
    right, wrong, evaluated, _ = (row["data"] for row, *_ in stored(reporter, tmp_path))
    assert (right["question"], right["expected"], right["largest"]) == ("Number 1?", "1", {"a": 2.0})
    assert right["layout"]["cells"][0]["mark"] == "right" and "layout" not in wrong
    assert evaluated["question"] == "Number 2?", "of its own split"
    assert reporter.failures["playback"] == 2 and wrong["question"] == "Number 1?"
    means = [
        groups[0].entropy[row][groups[0].drawn[row] & (groups[0].unmask_step[row] == at)].mean()
        for row in range(2)
        for at in np.unique(groups[0].unmask_step[row][groups[0].drawn[row]])
    ]
    assert (
        right["scales"]
        == wrong["scales"]
        == pytest.approx({"entropy": max(means), "weight": 1.5, "log_ratio": 0.25}, rel=1e-5)
    )
    assert evaluated["scales"] == pytest.approx({"entropy": max(means), "weight": 0.0, "log_ratio": 0.0}, rel=1e-5)


def test_a_whole_group_is_kept_with_its_tokens_and_the_order_of_the_batch(reporter, tiny_model, tmp_path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    recorder = recorder_of(reporter, tokenizer, completions=2)
    groups = [random_group(i) for i in range(3)]
    views = [ScoredView(0, 1, 2, 3, 1.5, np.array([4, 6], np.int32), np.float32([-0.5, -0.25]), math.nan)]
    recorder.iteration(7, groups, credits(groups), [views])
    found = stored(reporter, tmp_path)
    assert [row["row"] for row, *_ in found] == [0, 1, 2, 3]
    assert {row["group_id"] for row, *_ in found} == {0} and {row["kind"] for row, *_ in found} == {"train"}
    for row, arrays, kept, _ in found:
        ids = groups[0].completion_ids[row["row"]]
        assert kept["tokens"] == [tokenizer.decode([int(token)]) for token in ids]
        assert arrays["special"].tolist() == [int(token) in tokenizer.all_special_ids for token in ids]
        assert math.isfinite(row["data"]["advantage"])
        assert ("order" in kept) == ("order_counts" in arrays) == (row["row"] == 0)
    assert found[0][1]["order_counts"].sum() == sum(group.drawn.sum() for group in groups)
    second = found[1][1]
    assert second["view_weight"].tolist() == [1.5] and second["view_count"].tolist() == [3]
    assert second["new_position"].tolist() == [4, 6] and second["new_logp"].tolist() == [-0.5, -0.25]
    assert found[2][1]["view_step"].size == 0


def test_nothing_is_kept_where_nothing_is_wanted(reporter, tiny_model, tmp_path) -> None:
    group, recorder = random_group(1), recorder_of(reporter, load_tokenizer(tiny_model), completions=0)
    recorder.iteration(1, [group], credits([group]), [[]])
    assert stored(reporter, tmp_path) == []


def test_evaluations_are_kept_under_their_kind(reporter, tiny_model, tmp_path) -> None:
    recorder = recorder_of(reporter, load_tokenizer(tiny_model), completions=2)
    for iteration, kind in ((0, "base"), (2, "trained")):
        recorder.evaluation(iteration, kind, [random_group(number, size=1) for number in range(2)])
    found = [(row["iteration"], row["kind"], row["group_id"]) for row, *_ in stored(reporter, tmp_path)]
    assert found == [(0, "base", 0), (0, "base", 1), (2, "trained", 0), (2, "trained", 1)]


def test_the_text_file_holds_what_a_grader_needs(reporter, tiny_model, tmp_path) -> None:
    """The fields come from the split that was drawn from, where both have a problem of that name."""
    recorder, group = recorder_of(reporter, load_tokenizer(tiny_model), completions=1), random_group(1, size=2)
    recorder.evaluation(0, "base", [group])
    recorder.iteration(1, [group], credits([group]), [[]])
    rows = read_rows(tmp_path / "r" / "samples" / "completions.jsonl")
    assert [(row["id"], row["problem_id"], row["fields"]) for row in rows] == [
        *((f"base-0-1-{row}", "hand-made", {"n": 2}) for row in (0, 1)),
        *((f"train-1-1-{row}", "hand-made", {"n": 1}) for row in (0, 1)),
    ]


def test_branches_are_kept_beside_their_completion(reporter, tiny_model, tmp_path) -> None:
    tokenizer, group = load_tokenizer(tiny_model), branched(random_group(1, size=2, length=16))
    assert group.branch_step is not None and group.branch_ids is not None and group.branch_rewards is not None
    group.branch_step[1], group.branch_ids[1], group.branch_rewards[1] = -1, 0, 0
    credit = np.array([[0.5, 1.0, -1.0], [0.25, 0.0, 0.0]])
    recorder_of(reporter, tokenizer, completions=1).iteration(1, [group], [credit], [[]])
    rows = read_rows(tmp_path / "r" / "samples" / "completions.jsonl")
    (first, *_, about, _), (other, *_, nothing, _) = stored(reporter, tmp_path)
    assert [row["data"]["advantage"] for row in (first, other)] == [0.5, 0.25], "the first stands for the completion"
    texts = [completion_text(tokenizer, ids_C.tolist()) for ids_C in group.branch_ids[0, 0]]
    assert [branch["completion"] for branch in about["branches"]] == texts and texts[0] != texts[1]
    assert [branch["step"] for branch in about["branches"]] == [5, 5]
    named = dict(zip(group.reward_names, group.rewards[0].tolist(), strict=True))
    assert about["branches"][1]["rewards"] == named and about["branches"][1]["logp"] < 0
    assert rows[0]["branches"] == about["branches"]
    assert "branches" not in nothing and "branches" not in rows[1], "the completion ended before its step"


def test_the_bytes_of_an_iteration_are_bounded(reporter, tiny_model, tmp_path) -> None:
    """The shape of the published GSM8K recipe: 16 groups of 8, C 384, m 128, k 24."""
    groups = [random_group(i, size=8, length=384, per_step=3) for i in range(16)]
    views = [
        ScoredView(0, row, step, 1, 1.0, np.arange(3, dtype=np.int32), np.zeros(3, np.float32), math.nan)
        for row in range(8)
        for step in range(24)
    ]
    recorder_of(reporter, load_tokenizer(tiny_model), completions=2).iteration(1, groups, credits(groups), [views])
    sizes = [size for *_, size in stored(reporter, tmp_path)]
    print(f"{len(sizes)} samples, {sum(sizes)} bytes, the first {sizes[0]}, the others {sizes[1]}")
    assert len(sizes) == 8
    assert sum(sizes) < 300_000
