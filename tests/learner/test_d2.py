"""d2-StepMerge: its segments and draws, its loss and gradient against closed forms, what it reduces to, and mistakes
that the recorded cases find."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.likelihood.views import build_batch
from learner.objectives import make_objective, ratio
from learner.objectives.advantages import group_advantages
from learner.objectives.base import UpdateContext
from learner.objectives.d2 import D2, segment_starts
from learner.objectives.diffu_grpo import DiffuGrpo
from learner.objectives.one_step import draw_prompt_masks
from learner.objectives.ratio import clipped_terms, k3
from learner.settings.methods.one_step import DiffuGrpoConfig
from learner.settings.methods.states import D2Config
from learner.verification.measurement import Meter
from learner.verification.methods import d2
from learner.verification.methods.case import read_method_case
from rollout.trajectory import SamplerSpec
from tests.support.hand_made import GOLDEN, make_group, random_group
from tests.support.one_step_tables import EOS, MASK, C, assert_layout_changes_nothing, build, prompt_masks, scored
from tests.support.state_tables import STATE_TABLES, path_logp, state_table, walked_group

LENGTHS = (3, 4, 1)


def context(update_index: int = 0, run_seed: int = 3) -> UpdateContext:
    return UpdateContext(run_seed, update_index, groups=1, eos_ids=(EOS,))


def three_texts():
    """One token a step, in orders of their own; texts of 3, 4 and 1 tokens, EOS included."""
    orders = [[2, 0, 3, 1], [3, 2, 1, 0], [0, 2, 1, 3]]
    return walked_group([[2, 3], [4, 5, 6, 7], []], orders, rewards=[0, 1, 0.25])


def views_of(objective: D2, group, credit=None):
    (found,) = objective.credit([group]) if credit is None else (credit,)
    return [unit[0] for unit in objective.wanted(0, group, found, context()).units]


# ---- views and draws


@pytest.mark.parametrize(
    ("steps", "segments", "starts"),
    [(12, 4, [0, 3, 6, 9]), (20, 3, [0, 6, 13]), (8, 1, [0]), (4, 4, [0, 1, 2, 3]), (3, 16, [0, 1, 2])],
)
def test_segments_begin_at_the_published_steps(steps, segments, starts):
    assert segment_starts(steps, segments) == starts
    assert D2Config(segments=segments).cost(SamplerSpec(60, 60, steps, "random", 1.0)).views == len(starts)


def test_a_segment_shows_the_state_at_its_start_and_scores_what_was_drawn_in_it():
    views = views_of(D2(D2Config(segments=2)), three_texts())
    expected = [  # row, hidden, scored: a text's tokens only
        (0, [1, 1, 1, 1], [1]),  # position 3, drawn at step 1, lies behind the text
        (0, [1, 0, 1, 0], [0, 2]),
        (1, [1, 1, 1, 1], [2, 3]),
        (1, [1, 1, 0, 0], [0, 1]),
        (2, [1, 1, 1, 1], [0]),  # its second segment scores nothing and is no view
    ]
    assert [(v.row, v.hidden_C.astype(int).tolist(), v.scored_n.tolist()) for v in views] == expected
    assert [v.weight for v in views] == [1 / 3, 1 / 3, 1 / 4, 1 / 4, 1]


@pytest.mark.parametrize("segments", [1, 2, 3, 5, 8, 16])
def test_the_segments_of_a_completion_score_each_token_of_its_text_once(segments):
    group = random_group(0, size=6, length=16, per_step=2)
    for view, scores in by_row(views_of(D2(D2Config(segments=segments)), group, np.ones(6))).items():
        text = np.isin(group.completion_ids[view], (EOS,)).argmax() + 1
        length = text if (group.completion_ids[view] == EOS).any() else 16
        assert sorted(scores) == list(range(length))


def by_row(views) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for view in views:
        found.setdefault(view.row, []).extend(view.scored_n.tolist())
    return found


def test_fillers_are_never_scored_and_segments_of_fillers_are_no_views():
    """Blocks of 2; the first block of row 0 came out all EOS, so its row left after 2 of 4 steps."""
    ids, orders = [[EOS, EOS, EOS, EOS], [2, 3, 4, 5]], [[0, 1, 2, 2], [0, 1, 3, 2]]
    drawn = [[1, 1, 0, 0], [1, 1, 1, 1]]
    group = make_group(ids, orders, steps=4, block_length=2, drawn=drawn)
    views = views_of(D2(D2Config(segments=4)), group)
    assert [(v.row, v.scored_n.tolist()) for v in views] == [(0, [0]), (1, [0]), (1, [1]), (1, [3]), (1, [2])]


def test_prompts_are_masked_anew_for_each_completion_and_update_and_alike_in_its_segments():
    group, objective = random_group(0, prompt=40), D2(D2Config(segments=4, prompt_mask=0.5))
    few = np.array([0.0, 1.0, 0.0, -1.0])
    drawn_GP = draw_prompt_masks(group, 0.5, context())
    for view in views_of(objective, group, few):
        np.testing.assert_array_equal(view.hidden_P, drawn_GP[view.row])
    quiet = D2(D2Config(segments=4, prompt_mask=0.5, beta=0))
    assert {view.row for view in views_of(quiet, group, few)} == {1, 3}, "draws don't depend on who is left out"
    for view in views_of(quiet, group, few):
        np.testing.assert_array_equal(view.hidden_P, drawn_GP[view.row])
    later = objective.wanted(0, group, few, context(update_index=1)).units
    assert not all((unit[0].hidden_P == drawn_GP[unit[0].row]).all() for unit in later)


def test_rows_without_gradient_stay_in_the_divisor():
    group = three_texts()
    for average, divisor in (("sequence", 3.0), ("token", 8.0)):
        objective = D2(D2Config(average=average, beta=0))
        nothing = objective.wanted(0, group, np.zeros(3), context())
        assert not nothing.units and nothing.divisor == divisor


# ---- loss and gradient


def expected_gradient(objective: D2, theta: torch.Tensor, group, rate: float) -> np.ndarray:
    """Of an update before the policy has moved, over all masks of the prompt by their probabilities."""
    (credit,) = objective.credit([group])
    wanted, total = objective.wanted(0, group, credit, context()), np.zeros(tuple(theta.shape))
    for probability, mask_P in prompt_masks(rate):
        units = [(unit[0]._replace(hidden_P=mask_P),) for unit in wanted.units]
        batch = build(units, [group])
        loss, _ = objective.loss(scored(theta, batch, denoiser=STATE_TABLES), batch)
        total += probability * torch.autograd.grad(loss / wanted.divisor, theta)[0].numpy()
    return total


def path_gradient(theta: torch.Tensor, group, rate: float, *, in_text: bool = True) -> np.ndarray:
    """Of - (1/G) sum over rows of A / length times the text's log-prob along the path, the prompt masked at random."""
    value = torch.zeros((), dtype=torch.float64)
    for row, (length, a) in enumerate(zip(LENGTHS, group_advantages(group.rewards), strict=True)):
        for probability, mask_P in prompt_masks(rate):
            logp_C = path_logp(theta, group, row, mask_P)
            value = value - a / length * probability * logp_C[: length if in_text else C].sum() / 3
    return torch.autograd.grad(value, theta)[0].numpy()


def test_with_a_segment_for_each_step_the_expected_gradient_is_that_of_the_path():
    theta, group, rate = state_table(), three_texts(), 0.3
    exact = path_gradient(theta, group, rate)
    size = np.linalg.norm(exact)
    ours = expected_gradient(D2(D2Config(segments=C, beta=0, prompt_mask=rate)), theta, group, rate)
    assert np.linalg.norm(ours - exact) < 1e-12 * size
    merged = expected_gradient(D2(D2Config(segments=2, beta=0, prompt_mask=rate)), theta, group, rate)
    assert np.linalg.norm(merged - exact) > 0.1 * size, "control: merged steps have another"
    beyond = path_gradient(theta, group, rate, in_text=False)
    assert np.linalg.norm(ours - beyond) > 0.1 * size, "control: what follows the text isn't scored"


def test_with_one_segment_it_is_diffu_grpo_to_the_last_bit():
    groups = [three_texts(), walked_group([[8], [2, 3]], [[1, 0, 3, 2], [3, 1, 2, 0]], group_id=1)]
    theta, old, reference = state_table(), state_table(1, gradient=False), state_table(2, gradient=False)
    for average in ("sequence", "token"):
        shared = {"average": average, "clip_low": 0.1, "clip_high": 0.15, "beta": 0.3}
        found = []
        for objective in (D2(D2Config(segments=1, **shared)), DiffuGrpo(DiffuGrpoConfig(**shared))):
            credit = objective.credit(groups)
            wanted = [objective.wanted(i, g, credit[i], context(1)) for i, g in enumerate(groups)]
            batch = build([unit for part in wanted for unit in part.units], groups)
            scores = scored(theta, batch, old=old, reference=reference, denoiser=STATE_TABLES)
            loss, figures = objective.loss(scores, batch)
            slope = torch.autograd.grad(loss, theta)[0]
            found.append((batch, loss.item(), slope, sum(part.divisor for part in wanted), figures))
        (ours, *our_values), (theirs, *their_values) = found
        assert (ours.input_ids == theirs.input_ids).all() and (ours.weight == theirs.weight).all()
        assert our_values[0] == their_values[0] and torch.equal(our_values[1], their_values[1])
        assert our_values[2:] == their_values[2:]


def test_loss_and_slopes_off_the_policy_by_hand():
    group, advantages = three_texts(), np.array([2.0, -1.0, 1.5])
    theta, old, reference = state_table(), state_table(1, gradient=False), state_table(2, gradient=False)
    clean = {"prompt_mask": 0.0, "segments": C}
    for average in ("sequence", "token"):
        objective = D2(D2Config(average=average, clip_low=0.1, clip_high=0.15, beta=0.3, **clean))
        wanted = objective.wanted(0, group, advantages, context())
        batch = build(wanted.units, [group])
        scores = scored(theta, batch, old=old, reference=reference, denoiser=STATE_TABLES)
        loss, figures = objective.loss(scores, batch)
        (slope,) = torch.autograd.grad(loss / wanted.divisor, theta)
        expected, clipped = torch.zeros((), dtype=torch.float64), 0
        for row, (length, a) in enumerate(zip(LENGTHS, advantages, strict=True)):
            new, before, ref = (path_logp(t, group, row)[:length] for t in (theta, old, reference))
            rho, d = (new - before).exp(), ref - new
            terms = -torch.min(rho * a, rho.clamp(0.9, 1.15) * a) + 0.3 * (d.exp() - d - 1)
            expected = expected + (terms.mean() / 3 if average == "sequence" else terms.sum() / 8)
            clipped += int(((rho < 0.9) if a < 0 else (rho > 1.15)).sum())
        assert loss.item() / wanted.divisor == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(slope, torch.autograd.grad(expected, theta)[0], rtol=1e-10, atol=1e-15)
        shares = figures.values()
        assert 8 * (shares["clip_fraction/low"] + shares["clip_fraction/high"]) == pytest.approx(clipped) and clipped


# ---- layout and settings


def layout_groups():
    rng = np.random.default_rng(0)
    found = []
    for i in range(4):
        texts = [list(rng.integers(2, 9, rng.integers(1, 5))) for _ in range(4)]
        orders = [rng.permutation(C) for _ in range(4)]
        found.append(walked_group(texts, orders, rewards=rng.integers(0, 3, 4) / 2, group_id=i))
    return found


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize(("ranks", "views_per_forward"), [(1, 1), (2, 5), (3, 1), (3, 5)])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward, average):
    objective = make_objective(D2Config(segments=2, average=average, beta=0.05, clip_low=0.1, clip_high=0.1))
    assert_layout_changes_nothing(objective, layout_groups(), ranks, views_per_forward, STATE_TABLES)


def test_what_is_scored_and_refused():
    assert D2(D2Config()).needs.old and D2(D2Config()).needs.reference and not D2(D2Config(beta=0)).needs.reference
    sampler = SamplerSpec(24, 24, 8, "random", 1.0)
    assert not D2Config().refuses(sampler)
    (problem,) = D2Config().refuses(dataclasses.replace(sampler, threshold=0.9))
    assert "threshold (0.9)" in problem and "sample without one" in problem


def test_a_batch_of_its_views_is_no_recorded_state():
    group = three_texts()
    views = views_of(D2(D2Config(segments=2)), group)
    assert build_batch(views, [group], mask_id=MASK, pad_id=0, law=D2(D2Config()).needs.law).logp is None


# ---- recorded cases


MISTAKES: list[tuple[str, str, Callable]] = [
    ("04_N1_is_diffu_grpo", "k3", lambda logp, reference: k3(reference, logp)),
    ("03_N4_two_batches_nokl_fixedseed", "clipped_terms", lambda *a, clip: clipped_terms(*a, clip=(1e-3, 1e-3))),
    ("03_N4_two_batches_nokl_fixedseed", "clipped_terms", lambda ratio, a, clip: clipped_terms(ratio, -a, clip=clip)),
]


@pytest.mark.parametrize(("name", "part", "mistake"), MISTAKES, ids=["k3 reversed", "narrow clip", "sign"])
def test_controls_a_mistake_in_the_loss_fails_the_recorded_cases(monkeypatch, name, part, mistake):
    monkeypatch.setattr(ratio, part, mistake)
    found = d2.check(read_method_case(GOLDEN / "methods" / "d2", name), Meter("cpu", "float32"))
    assert {"loss", "gradient of the loss"} <= {m.quantity for m in found if not m.passed}


def test_control_other_states_fail_the_recorded_cases(monkeypatch):
    """With all but the scored tokens shown."""
    segments = D2.segments

    def later(*arguments, **named):
        views = segments(*arguments, **named)
        return [view._replace(hidden_C=np.isin(np.arange(view.hidden_C.size), view.scored_n)) for view in views]

    monkeypatch.setattr(D2, "segments", later)
    found = d2.check(read_method_case(GOLDEN / "methods" / "d2", "01_N4_mu2_onpolicy_k3"), Meter("cpu", "float32"))
    assert {"masks", "token log-probs"} <= {m.quantity for m in found if not m.passed}
