"""diffu-GRPO: its views and draws, its loss and gradient against closed forms, what it reduces to, and mistakes that
the recorded cases find."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, build_batch, step_view
from learner.objectives import make_objective, ratio
from learner.objectives.advantages import group_advantages
from learner.objectives.agrpo import Agrpo
from learner.objectives.base import UpdateContext
from learner.objectives.diffu_grpo import DiffuGrpo
from learner.objectives.one_step import draw_prompt_masks, one_step_unit
from learner.objectives.ratio import clipped_terms, k3
from learner.settings.methods.one_step import DiffuGrpoConfig
from learner.settings.methods.states import AgrpoConfig
from learner.verification.measurement import Meter
from learner.verification.methods import d1
from learner.verification.methods.case import read_method_case
from tests.support.hand_made import GOLDEN, random_group
from tests.support.one_step_tables import (
    EOS,
    MASK,
    C,
    P,
    build,
    planned_gradient,
    prompt_masks,
    scored,
    table,
    table_logp,
    text_group,
)


def context(update_index: int = 0, run_seed: int = 3) -> UpdateContext:
    return UpdateContext(run_seed, update_index, groups=1, eos_ids=(EOS,))


# ---- views and draws


def test_a_view_masks_the_completion_whole_and_scores_the_text():
    group = text_group([2, 3], [4, 5, 6, 7], [EOS], rewards=[0, 1, 0.5])
    wanted = DiffuGrpo(DiffuGrpoConfig()).wanted(0, group, np.array([-0.5, 0.5, 0.0]), context())
    hidden_GP = draw_prompt_masks(group, 0.15, context())
    assert [len(unit) for unit in wanted.units] == [1, 1, 1], "a KL term holds for all"
    for row, ((view,), length) in enumerate(zip(wanted.units, (3, 4, 1), strict=True)):
        assert view.row == row and view.hidden_C.all() and view.scored_n.tolist() == list(range(length))
        assert view.hidden_P is not None and (view.hidden_P == hidden_GP[row]).all()
        assert view.weight == 1 / length
    assert wanted.divisor == 3


def test_rows_without_gradient_are_left_out_and_stay_in_the_divisor():
    group = text_group([2, 3], [2, 3, 4], [5], [6, 7])
    some = np.array([0.0, 1.0, 0.0, -1.0])
    for average, divisor, weight in (("sequence", 4.0, 1 / 4), ("token", 3 + 4 + 2 + 3, 1.0)):
        objective = DiffuGrpo(DiffuGrpoConfig(average=average, beta=0, prompt_mask=0.5))
        assert not objective.wanted(0, group, np.zeros(4), context()).units
        few, all_ = (objective.wanted(0, group, credit, context()) for credit in (some, np.ones(4)))
        assert few.divisor == all_.divisor == divisor and [unit[0].row for unit in few.units] == [1, 3]
        assert few.units[0][0].weight == weight
        for (view,) in few.units:  # the draws don't depend on which rows are left out
            np.testing.assert_array_equal(view.hidden_P, all_.units[view.row][0].hidden_P)


def test_each_prompt_token_of_each_row_is_masked_with_the_stated_probability():
    group = random_group(0, size=4, prompt=16)
    masks = np.array([draw_prompt_masks(group, 0.15, context(run_seed=seed)) for seed in range(3000)])
    assert abs(masks.mean(axis=0) - 0.15).max() < 4.5 * np.sqrt(0.15 * 0.85 / 3000)
    counts = masks.sum(axis=2)
    assert counts.var() == pytest.approx(16 * 0.15 * 0.85, rel=0.06), "tokens are independent"
    assert abs(np.corrcoef(counts.T) - np.eye(4)).max() < 0.08, "and so are rows"
    assert not draw_prompt_masks(group, 0.0, context()).any() and draw_prompt_masks(group, 1.0, context()).all()


def test_masks_are_named_by_run_group_and_update_and_touch_no_global_generator():
    group = random_group(0, prompt=40)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, again = (draw_prompt_masks(group, 0.5, context()) for _ in range(2))
    assert (first == again).all()
    others = [draw_prompt_masks(group, 0.5, other) for other in (context(1), context(run_seed=4))]
    others.append(draw_prompt_masks(dataclasses.replace(group, group_id=1), 0.5, context()))
    assert not any((first == other).all() for other in others), "fresh for another update, run or group"
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_with_a_clean_prompt_every_update_sees_the_same():
    group, theta, objective = text_group([2, 3], [4]), table(), DiffuGrpo(DiffuGrpoConfig(prompt_mask=0))
    seen = [
        table_logp(theta, build(objective.wanted(0, group, np.ones(2), context(update)).units, [group]))
        for update in range(5)
    ]
    assert all(torch.equal(logp, seen[0]) for logp in seen)


# ---- loss and gradient


def test_loss_and_slopes_of_a_batch_by_hand():
    """Two texts of lengths 1 and 3: ratio, clip, KL and both averages from the formulas of the method."""
    group, hidden_P = text_group([EOS], [2, 3, EOS]), np.array([True, False])
    advantages, lengths = (2.0, -1.0), (1, 3)
    theta, old, reference = table(), table(1, gradient=False), table(2, gradient=False)
    for average, shares in (("sequence", (1 / 2, 1 / 6)), ("token", (1 / 4, 1 / 4))):
        objective = DiffuGrpo(DiffuGrpoConfig(average=average, clip_low=0.1, clip_high=0.15, beta=0.3))
        wanted = objective.wanted(0, group, np.array(advantages), context())
        units = [
            one_step_unit(group, 0, row, hidden_P, lengths[row], advantages[row], unit[0].weight)
            for row, unit in enumerate(wanted.units)
        ]
        batch = build(units, [group])
        loss, figures = objective.loss(scored(theta, batch, old=old, reference=reference), batch)
        (slope,) = torch.autograd.grad(loss / wanted.divisor, theta)
        expected, low, high = torch.zeros((), dtype=torch.float64), 0, 0
        for row, (length, a, share) in enumerate(zip(lengths, advantages, shares, strict=True)):
            for j in range(length):
                token = int(group.completion_ids[row, j])
                new, before, ref = (t.log_softmax(-1)[1, j, token] for t in (theta, old, reference))
                rho, d = (new - before).exp(), ref - new
                surrogate = torch.min(rho * a, rho.clamp(0.9, 1.15) * a)
                expected = expected + share * (-surrogate + 0.3 * (d.exp() - d - 1))
                low, high = low + int(rho < 0.9 and a < 0), high + int(rho > 1.15 and a > 0)
        (wanted_slope,) = torch.autograd.grad(expected, theta)
        assert loss.item() / wanted.divisor == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(slope, wanted_slope, rtol=1e-10, atol=1e-15)
        named = figures.values()
        assert named["scored_tokens"] == 4 and named["kl"] > 0 and low + high > 0, "control: some tokens are clipped"
        assert (named["clip_fraction/low"], named["clip_fraction/high"]) == (low / 4, high / 4)


def expected_gradient(objective: DiffuGrpo, theta: torch.Tensor, group, rate: float) -> np.ndarray:
    """Of an update before the policy has moved, over all masks of the prompt by their probabilities."""
    (credit,) = objective.credit([group])
    wanted, total = objective.wanted(0, group, credit, context()), np.zeros(tuple(theta.shape))
    for (view,) in wanted.units:
        for probability, mask_P in prompt_masks(rate):
            batch = build([(view._replace(hidden_P=mask_P),)], [group])
            loss, _ = objective.loss(scored(theta, batch), batch)
            (gradient,) = torch.autograd.grad(loss / wanted.divisor, theta)
            total += probability * gradient.numpy()
    return total


def test_the_expected_gradient_over_all_masks_is_that_of_the_mean_log_likelihood():
    """Before the policy has moved the ratio is 1: - (1/G) sum over rows of A / len times the gradient of the text's
    log-prob, the prompt's tokens masked at random."""
    theta, rate = table(), 0.3
    group = text_group([2, 3], [4, 5, 6, 7], [EOS], rewards=[0, 1, 0.25])
    lengths, value = (3, 4, 1), torch.zeros((), dtype=torch.float64)
    for row, (length, a) in enumerate(zip(lengths, group_advantages(group.rewards), strict=True)):
        for probability, mask_P in prompt_masks(rate):
            logp = theta.log_softmax(-1)[int(mask_P @ 2 ** np.arange(P))]
            text = sum(logp[j, int(group.completion_ids[row, j])] for j in range(length))
            value = value - a / length * probability * text / 3
    (exact,) = torch.autograd.grad(value, theta)
    size = np.linalg.norm(exact)
    objective = DiffuGrpo(DiffuGrpoConfig(beta=0, prompt_mask=rate))
    assert np.linalg.norm(expected_gradient(objective, theta, group, rate) - exact.numpy()) < 1e-12 * size
    by_token = DiffuGrpo(DiffuGrpoConfig(beta=0, prompt_mask=rate, average="token"))
    assert np.linalg.norm(expected_gradient(by_token, theta, group, rate) - exact.numpy()) > 0.1 * size, "control"
    assert np.linalg.norm(expected_gradient(objective, theta, group, 0.6) - exact.numpy()) > 0.1 * size, "control"


def test_a_rollout_of_one_step_makes_it_agrpo():
    """One step writes all tokens from the masked completion, which is AGRPO's only state: its sum over tokens is C
    times the mean, at any ratio, when no text ends early and the prompt is clean."""
    group = text_group([2, 3, 4, 5], [6, 7, 8, 2], rewards=[0, 1])
    theta, old = table(), table(1, gradient=False)
    ours = DiffuGrpo(DiffuGrpoConfig(beta=0, prompt_mask=0, clip_low=0.2, clip_high=0.3))
    agrpo = Agrpo(AgrpoConfig(k=1, clip_low=0.2, clip_high=0.3))
    (credit,) = ours.credit([group])
    wanted = ours.wanted(0, group, credit, context())
    batch = build(wanted.units, [group])
    loss, _ = ours.loss(scored(theta, batch, old=old), batch)
    recorded = table_logp(old, batch).numpy().reshape(2, C)
    group = dataclasses.replace(group, logp=recorded)
    views = [step_view(group, 0, row, 0, float(credit[row]), 1.0) for row in range(2)]
    states = build_batch(views, [group], mask_id=MASK, pad_id=0, law=Law.DRAWN)
    logp_N = table_logp(theta, states)
    theirs, _ = agrpo.loss(PolicyScores(Scores(logp_N, torch.ones_like(logp_N))), states)
    divisor = agrpo.wanted(0, group, credit, context()).divisor
    slopes = [torch.autograd.grad(x, theta)[0] for x in (C * loss / wanted.divisor, theirs / divisor)]
    assert C * loss.item() / wanted.divisor == pytest.approx(theirs.item() / divisor, rel=1e-12)
    np.testing.assert_allclose(*slopes, rtol=1e-10, atol=1e-15)


# ---- layout


def layout_groups():
    rng = np.random.default_rng(0)
    texts = [[list(rng.integers(2, 9, rng.integers(1, 5))) for _ in range(4)] for _ in range(4)]
    return [text_group(*four, rewards=rng.integers(0, 3, 4) / 2, group_id=i) for i, four in enumerate(texts)]


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("views_per_forward", [1, 5])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward, average):
    objective = make_objective(DiffuGrpoConfig(average=average, beta=0.05, clip_low=0.1, clip_high=0.1))
    whole, figures = planned_gradient(objective, layout_groups(), ranks=1, views_per_forward=1000)
    for backwards in (False, True):
        layout = {"ranks": ranks, "views_per_forward": views_per_forward, "backwards": backwards}
        ours, ours_figures = planned_gradient(objective, layout_groups(), **layout)
        assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
        assert ours_figures == pytest.approx(figures)
    assert figures["clip_fraction/high"] > 0 and figures["kl"] > 0


def test_control_a_divisor_per_forward_depends_on_the_layout():
    objective = make_objective(DiffuGrpoConfig())
    whole, _ = planned_gradient(objective, layout_groups(), ranks=1, views_per_forward=1000, per_forward=True)
    ours, _ = planned_gradient(objective, layout_groups(), ranks=2, views_per_forward=5, per_forward=True)
    assert np.linalg.norm(ours - whole) > 1e-2 * np.linalg.norm(whole)


def test_what_is_scored():
    assert DiffuGrpo(DiffuGrpoConfig()).needs.reference and DiffuGrpo(DiffuGrpoConfig()).needs.old
    assert not DiffuGrpo(DiffuGrpoConfig(beta=0)).needs.reference


# ---- recorded cases


MISTAKES: list[tuple[str, str, Callable]] = [
    ("04_leftpads_kl", "k3", lambda logp, reference: k3(reference, logp)),
    ("04_leftpads_kl", "clipped_terms", lambda *a, clip: clipped_terms(*a, clip=(1.0, 1e9))),
    ("04_leftpads_kl", "clipped_terms", lambda log_ratio, a, clip: clipped_terms(log_ratio, -a, clip=clip)),
]


@pytest.mark.parametrize(("name", "part", "mistake"), MISTAKES, ids=["k3 reversed", "no clip", "sign"])
def test_controls_a_mistake_in_the_loss_fails_the_recorded_cases(monkeypatch, name, part, mistake):
    monkeypatch.setattr(ratio, part, mistake)
    found = d1.check(read_method_case(GOLDEN / "methods" / "d1", name), Meter("cpu", "float32"))
    assert {"loss", "gradient of the loss"} <= {m.quantity for m in found if not m.passed}


def test_control_a_mean_of_rows_fails_the_recorded_cases(monkeypatch):
    def by_row(*arguments):
        (view,) = one_step_unit(*arguments)
        return (view._replace(weight=1 / view.scored_n.size),)

    monkeypatch.setattr(d1, "one_step_unit", by_row)
    found = d1.check(read_method_case(GOLDEN / "methods" / "d1", "01_onpolicy_mu1"), Meter("cpu", "float32"))
    assert {"loss", "gradient of the loss"} <= {m.quantity for m in found if not m.passed}
