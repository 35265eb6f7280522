"""wd1: its two softmaxes, its loss and gradient against closed forms, what it reduces to, and mistakes that the
recorded cases find."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.objectives import make_objective, wd1
from learner.objectives.advantages import group_advantages
from learner.objectives.base import UpdateContext
from learner.objectives.diffu_grpo import DiffuGrpo
from learner.objectives.one_step import draw_prompt_masks
from learner.objectives.wd1 import Wd1, softmax
from learner.settings.methods.one_step import DiffuGrpoConfig, Wd1Config
from learner.verification.measurement import Meter
from learner.verification.methods import wd1 as recorded_wd1
from learner.verification.methods.case import read_method_case
from tests.support.hand_made import GOLDEN
from tests.support.one_step_tables import EOS, P, build, planned_gradient, prompt_masks, scored, table, text_group


def context(groups: int = 1) -> UpdateContext:
    return UpdateContext(3, 0, groups=groups, eos_ids=(EOS,))


def texts(rewards, group_id: int = 0):
    """A group of texts of lengths 3, 4, 1, 2, .."""
    return text_group(*[[2, 3], [4, 5, 6, 7], [EOS], [8]][: len(rewards)], rewards=rewards, group_id=group_id)


# ---- credit


def test_credit_is_the_difference_of_two_softmaxes():
    rewards = [0.0, 1.0, 0.25, 2.0]
    a = np.array(rewards) - np.mean(rewards)
    raised, lowered = (np.exp(sign * 1.5 * a) / np.exp(sign * 1.5 * a).sum() for sign in (1, -1))
    for negative_weight in (1.0, 0.3, 0.0):
        (credit,) = Wd1(Wd1Config(psi=1.5, negative_weight=negative_weight)).credit([texts(rewards)])
        np.testing.assert_allclose(credit, raised - negative_weight * lowered, rtol=1e-12)
        assert credit.sum() == pytest.approx(1 - negative_weight, abs=1e-15)


def test_equal_rewards_have_no_gradient_at_all():
    group = texts([0.1, 0.1, 0.1])
    for softmax_over in ("group", "batch"):
        objective = Wd1(Wd1Config(softmax_over=softmax_over, psi=3.0))
        (credit,) = objective.credit([group])
        assert not credit.any() and not objective.wanted(0, group, credit, context()).units
    (alone,) = Wd1(Wd1Config(negative_weight=0)).credit([group])
    np.testing.assert_allclose(alone, 1 / 3, rtol=1e-15)


def test_rewards_of_any_size_overflow_nothing():
    (credit,) = Wd1(Wd1Config(psi=10)).credit([texts([0.0, 1e4, -1e4])])
    np.testing.assert_allclose(credit, [0, 1, -1], atol=1e-12)
    assert softmax(np.array([-1e6, 0.0])).tolist() == [0.0, 1.0]


def test_softmaxes_over_the_batch_couple_its_groups():
    groups = [texts([0.0, 1.0, 0.5]), texts([4.0, 0.0], group_id=1)]
    a = np.concatenate([group_advantages(group.rewards) for group in groups])
    joint = softmax(a) - softmax(-a)
    credit = Wd1(Wd1Config(softmax_over="batch")).credit(groups)
    assert [part.size for part in credit] == [3, 2]
    np.testing.assert_allclose(np.concatenate(credit), joint, rtol=1e-12)
    apart = Wd1(Wd1Config()).credit(groups)
    assert all(part.sum() == pytest.approx(0, abs=1e-15) for part in apart)
    assert abs(np.concatenate(apart) - joint).max() > 0.1, "control: groups of their own have other weights"
    for objective, total in ((Wd1(Wd1Config()), 2.0), (Wd1(Wd1Config(softmax_over="batch")), 1.0)):
        parts = [objective.wanted(i, group, credit[i], context(groups=2)) for i, group in enumerate(groups)]
        assert sum(part.divisor for part in parts) == total


# ---- views, loss and gradient


def test_a_view_masks_the_completion_whole_and_scores_the_text():
    group, objective = texts([0.0, 1.0, 0.5]), Wd1(Wd1Config(prompt_mask=0.5))
    (credit,) = objective.credit([group])
    hidden_GP = draw_prompt_masks(group, 0.5, context())
    wanted = objective.wanted(0, group, credit, context())
    assert [unit[0].row for unit in wanted.units] == [0, 1], "the third reward is the mean"
    for (view,), length in zip(wanted.units, (3, 4), strict=True):
        assert view.hidden_C.all() and view.scored_n.tolist() == list(range(length)) and view.weight == 1
        assert view.hidden_P is not None and (view.hidden_P == hidden_GP[view.row]).all()
        assert view.credit == credit[view.row]


def test_the_expected_gradient_over_all_masks_is_that_of_the_weighted_log_likelihood():
    """- sum over rows of (w+ - w-) times the gradient of the text's log-prob, a sum over tokens, the prompt's tokens
    masked at random; nothing is divided."""
    theta, rate, rewards = table(), 0.3, [0.0, 1.0, 0.25]
    group, objective = texts(rewards), Wd1(Wd1Config(prompt_mask=rate))
    (credit,) = objective.credit([group])
    wanted, ours = objective.wanted(0, group, credit, context()), np.zeros(tuple(theta.shape))
    by_length = ours.copy()
    for (view,) in wanted.units:
        for probability, mask_P in prompt_masks(rate):
            batch = build([(view._replace(hidden_P=mask_P),)], [group])
            loss, _ = objective.loss(scored(theta, batch), batch)
            (gradient,) = torch.autograd.grad(loss / wanted.divisor, theta)
            ours += probability * gradient.numpy()
            by_length += probability * gradient.numpy() / view.scored_n.size
    a, value = torch.tensor(rewards, dtype=torch.float64) - np.mean(rewards), torch.zeros((), dtype=torch.float64)
    weights = (a.softmax(0) - (-a).softmax(0)).tolist()
    for row, (length, weight) in enumerate(zip((3, 4, 1), weights, strict=True)):
        for probability, mask_P in prompt_masks(rate):
            logp = theta.log_softmax(-1)[int(mask_P @ 2 ** np.arange(P))]
            value = value - weight * probability * sum(
                logp[j, int(group.completion_ids[row, j])] for j in range(length)
            )
    (exact,) = torch.autograd.grad(value, theta)
    size = np.linalg.norm(exact)
    assert np.linalg.norm(ours - exact.numpy()) < 1e-12 * size
    assert np.linalg.norm(by_length - exact.numpy()) > 0.1 * size, "control: a mean over tokens is another loss"


def test_figures_tell_raised_texts_from_lowered_ones():
    group, objective, theta = texts([0.0, 1.0, 0.5]), Wd1(Wd1Config()), table()
    (credit,) = objective.credit([group])
    batch = build(objective.wanted(0, group, credit, context()).units, [group])
    scores = scored(theta, batch)
    _, figures = objective.loss(scores, batch)
    logp_N = scores.policy.logp_N.detach().numpy()
    named = figures.values()
    assert named["scored_tokens"] == 7
    assert named["logp/lowered"] == pytest.approx(logp_N[:3].mean())
    assert named["logp/raised"] == pytest.approx(logp_N[3:].mean())


def test_small_psi_makes_it_the_gradient_of_diffu_grpo():
    """w+ - w- = 2 psi A / G + O(psi^2): before the policy has moved, G / (2 psi) of the loss has diffu-GRPO's gradient,
    but for its division by lengths (equal here) and by G."""
    rewards, psi, theta = [0.0, 1.0, 0.25, 0.5], 1e-4, table()
    group = text_group([2, 3], [4, 5], [6, 7], [8, 2], rewards=rewards)
    ours, theirs = Wd1(Wd1Config(psi=psi)), DiffuGrpo(DiffuGrpoConfig(beta=0))
    slopes = []
    for objective, factor in ((ours, 4 / (2 * psi)), (theirs, 3.0 * 4)):
        (credit,) = objective.credit([group])
        wanted = objective.wanted(0, group, credit, context())
        batch = build(wanted.units, [group])
        loss, _ = objective.loss(scored(theta, batch), batch)
        slopes.append(torch.autograd.grad(factor * loss / wanted.divisor, theta)[0].numpy())
    assert np.linalg.norm(slopes[0] - slopes[1]) < 1e-3 * np.linalg.norm(slopes[1])


# ---- layout


def layout_groups():
    rng = np.random.default_rng(0)
    bodies = [[list(rng.integers(2, 9, rng.integers(1, 5))) for _ in range(4)] for _ in range(4)]
    return [text_group(*four, rewards=rng.integers(0, 3, 4) / 2, group_id=i) for i, four in enumerate(bodies)]


@pytest.mark.parametrize("softmax_over", ["group", "batch"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("views_per_forward", [1, 5])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward, softmax_over):
    """Also where the softmaxes couple all rows of the update."""
    objective = make_objective(Wd1Config(softmax_over=softmax_over))
    whole, figures = planned_gradient(objective, layout_groups(), ranks=1, views_per_forward=1000)
    for backwards in (False, True):
        layout = {"ranks": ranks, "views_per_forward": views_per_forward, "backwards": backwards}
        ours, ours_figures = planned_gradient(objective, layout_groups(), **layout)
        assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
        assert ours_figures == pytest.approx(figures)


def test_control_a_divisor_per_forward_depends_on_the_layout():
    objective = make_objective(Wd1Config())
    whole, _ = planned_gradient(objective, layout_groups(), ranks=1, views_per_forward=1000, per_forward=True)
    ours, _ = planned_gradient(objective, layout_groups(), ranks=2, views_per_forward=5, per_forward=True)
    assert np.linalg.norm(ours - whole) > 1e-2 * np.linalg.norm(whole)


def test_nothing_but_the_policy_is_scored():
    needs = Wd1(Wd1Config()).needs
    assert not needs.old and not needs.reference


# ---- recorded cases


def uniform_when_negated(values: np.ndarray) -> np.ndarray:
    """Right for w+ and uniform for w-; the first row of the case is better than the mean."""
    return softmax(values) if values[0] > 0 else np.full(values.size, 1 / values.size)


MISTAKES: dict[str, Callable] = {
    "uniform w-": uniform_when_negated,
    "one sign": lambda values: softmax(-values),
    "temperature": lambda values: softmax(values / 2),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_controls_a_mistake_in_the_weights_fails_the_recorded_cases(monkeypatch, mistake):
    monkeypatch.setattr(wd1, "softmax", mistake)
    case = read_method_case(GOLDEN / "methods" / "wd1", "01_group_is_batch_mu1")
    found = recorded_wd1.check(case, Meter("cpu", "float32"))
    assert {"advantages", "loss", "gradient of the loss"} <= {m.quantity for m in found if not m.passed}
