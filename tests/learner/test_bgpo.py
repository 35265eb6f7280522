"""BGPO: that it bounds the ratio's objective, its loss by hand, its gradient by enumeration of all masks, and that each
mask is scored by itself."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.objectives import bgpo, make_objective
from learner.objectives.bgpo import Bgpo
from learner.objectives.copies import copies, independent_masks
from learner.objectives.espo import Espo
from learner.objectives.ratio import clipped_terms
from learner.settings.methods.bounds import BgpoConfig, EspoConfig
from rollout.trajectory import SamplerSpec
from tests.support.hand_made import make_group, random_group
from tests.support.unit_scores import (
    build,
    context,
    exact_bound,
    plan_gradient,
    scored,
    state_table,
    subsets,
    table_logp,
)

C = 4
UNCLIPPED = {"clip_low": 1.0, "clip_high": 1e9}


def two_texts(**fields):
    return make_group([[2, 3, 4, 5], [6, 7, 8, 2]], np.zeros((2, C)), steps=1, rewards=[[0], [1]], **fields)


def value(objective, logp, old, group, mask_RC, advantage: float) -> torch.Tensor:
    """Minus the loss of one completion with these masks."""
    units = [(view,) for view in copies(0, 0, mask_RC, advantage, 1.0)]
    batch = build(units, [group])
    loss, _ = objective.loss(scored(table_logp(logp, batch), table_logp(old, batch).detach()), batch)
    return -loss / len(units)


# ---- views


def test_copies_are_units_of_their_own_and_rows_without_advantage_stay_in_the_divisor():
    group, objective = random_group(0, size=4, length=8), Bgpo(BgpoConfig(samples=3))
    credit = np.array([0.0, 1.0, 0.0, -1.0])
    few, all_ = (objective.wanted(0, group, c, context()) for c in (credit, np.ones(4)))
    assert few.divisor == all_.divisor == 12
    assert [len(unit) for unit in few.units] == [1] * 6 and len(all_.units) == 12
    masks = independent_masks(context().stream(group, "masks"), 4, 3, 8)
    for number, (view,) in enumerate(few.units):
        row = (1, 3)[number // 3]
        np.testing.assert_array_equal(view.hidden_C, masks[row, number % 3])
        assert view.row == row and view.weight == pytest.approx(1 / view.scored_n.size)
    later = objective.wanted(0, group, credit, context(update_index=1)).units
    assert any((a[0].hidden_C != b[0].hidden_C).any() for a, b in zip(few.units, later, strict=True)), "fresh masks"


# ---- the bound


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("seed", range(5))
def test_it_lies_below_the_ratio_of_the_completions_bounds(advantage, seed):
    objective, group = Bgpo(BgpoConfig(**UNCLIPPED)), two_texts()
    theta, old = state_table(C, seed), state_table(C, 100 + seed)
    mask_RC = independent_masks(np.random.default_rng(seed), 1, 16, C)[0]
    batch = build([copies(0, 0, mask_RC, advantage, 1.0)], [group])
    weight_N = torch.from_numpy(batch.weight) / 16
    ratio = (weight_N * (table_logp(theta, batch) - table_logp(old, batch))).sum().exp()
    assert value(objective, theta, old, group, mask_RC, advantage) < advantage * ratio


def test_control_with_the_bounds_exchanged_it_lies_above(monkeypatch):
    """exp where the advantage is positive is Jensen's upper bound, 1 + d where it is negative the tangent's."""

    def exchanged(d_U, advantage_U, *, clip, ratio_N):
        return clipped_terms(d_U, advantage_U, clip=clip, ratio_N=torch.where(advantage_U > 0, d_U.exp(), 1 + d_U))

    monkeypatch.setattr(bgpo, "clipped_terms", exchanged)
    for advantage in (1.5, -1.5):
        with pytest.raises(AssertionError):
            test_it_lies_below_the_ratio_of_the_completions_bounds(advantage, 0)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_before_the_policy_has_moved_value_and_gradient_are_those_of_the_ratio(advantage):
    group, theta = two_texts(), state_table(C)
    mask_RC = independent_masks(np.random.default_rng(0), 1, 6, C)[0]
    ours = value(Bgpo(BgpoConfig()), theta, theta, group, mask_RC, advantage)
    (slope,) = torch.autograd.grad(ours, theta)
    batch = build([copies(0, 0, mask_RC, advantage, 1.0)], [group])
    logp_N = table_logp(theta, batch)
    ratio = (torch.from_numpy(batch.weight) / 6 * (logp_N - logp_N.detach())).sum().exp()
    (expected,) = torch.autograd.grad(advantage * ratio, theta)
    assert ours.item() == pytest.approx(advantage)
    np.testing.assert_allclose(slope, expected, rtol=1e-12, atol=1e-16)


# ---- loss and gradient


def test_loss_and_slopes_off_the_policy_by_hand():
    group, theta = two_texts(), state_table(C)
    old = theta.detach() + 0.2 * state_table(C, 1).detach()
    masks = {0: [[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]], 1: [[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 0, 0]]}
    advantages = (2.0, -1.0)
    objective = Bgpo(BgpoConfig(samples=3, clip_low=0.1, clip_high=0.15))
    units = [
        (view,)
        for row, mask_RC in masks.items()
        for view in copies(0, row, np.array(mask_RC, bool), advantages[row], 1.0)
    ]
    batch = build(units, [group])
    loss, figures = objective.loss(scored(table_logp(theta, batch), table_logp(old, batch)), batch)
    (slope,) = torch.autograd.grad(loss, theta)
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for row, mask_RC in masks.items():
        for mask_C in np.array(mask_RC, bool):
            at, a = np.flatnonzero(mask_C), advantages[row]
            ids, state = group.completion_ids[row, at], int((2**at).sum())
            new, before = (t.log_softmax(-1)[state, at, ids] for t in (theta, old))
            d = (new - before).mean()
            g = 1 + d if a > 0 else d.exp()
            expected = expected - torch.min(g * a, g.clamp(0.9, 1.15) * a)
            clipped += int((g < 0.9) if a < 0 else (g > 1.15))
    (wanted_slope,) = torch.autograd.grad(expected, theta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-10, atol=1e-15)
    shares = figures.values()
    assert shares["scored_copies"] == 6
    assert 6 * (shares["clip_fraction/low"] + shares["clip_fraction/high"]) == pytest.approx(clipped) and clipped


MISTAKES: list[tuple[str, Callable]] = [
    ("no clip", lambda *a, clip, ratio_N: clipped_terms(*a, clip=(1.0, 1e9), ratio_N=ratio_N)),
    ("sign", lambda d, a, *, clip, ratio_N: clipped_terms(d, -a, clip=clip, ratio_N=ratio_N)),
    ("plain ratio", lambda *a, clip, ratio_N: clipped_terms(*a, clip=clip)),
]


@pytest.mark.parametrize("mistake", [mistake for _, mistake in MISTAKES], ids=[name for name, _ in MISTAKES])
def test_controls_a_mistake_in_the_loss_is_seen_by_hand(monkeypatch, mistake):
    monkeypatch.setattr(bgpo, "clipped_terms", mistake)
    with pytest.raises(AssertionError):
        test_loss_and_slopes_off_the_policy_by_hand()


def expected_gradient(objective: Bgpo, theta: torch.Tensor, group, count_law: Callable[[int], float]) -> np.ndarray:
    """Of an update before the policy has moved, over all masks by their probabilities."""
    (credit,), total = objective.credit([group]), np.zeros(tuple(theta.shape))
    for n in range(1, C + 1):
        masks = list(subsets(C, n))
        for mask_C in masks:
            units = [(v,) for row in range(2) for v in copies(0, row, mask_C[None], float(credit[row]), 1.0)]
            batch = build(units, [group])
            loss, _ = objective.loss(scored(table_logp(theta, batch)), batch)
            total += count_law(n) / len(masks) * torch.autograd.grad(loss / 2, theta)[0].numpy()
    return total


def test_the_expected_gradient_over_all_masks_is_that_of_the_evidence_lower_bounds():
    """- (1/G) sum over rows of A times the gradient of the bound over C, which is ESPO's of a ratio of 1."""
    group, theta = two_texts(), state_table(C)
    bounds = [exact_bound(theta, ids_C) / C for ids_C in group.completion_ids.astype(int)]
    (exact,) = torch.autograd.grad(-(-0.5 * bounds[0] + 0.5 * bounds[1]) / 2, theta)
    size = np.linalg.norm(exact)
    ours = expected_gradient(Bgpo(BgpoConfig()), theta, group, lambda n: 1 / C)
    assert np.linalg.norm(ours - exact.numpy()) < 1e-12 * size
    binomial = expected_gradient(Bgpo(BgpoConfig()), theta, group, lambda n: {1: 4, 2: 6, 3: 4, 4: 1}[n] / 15)
    assert np.linalg.norm(binomial - exact.numpy()) > 0.1 * size, "control: another law of the counts"


def test_with_one_mask_of_all_positions_it_is_espo_on_the_policy():
    """Up to ESPO's baseline, which leaves one out: G / (G - 1) times."""
    group, theta, full = two_texts(), state_table(C), np.ones((1, C), bool)
    ours, espo = Bgpo(BgpoConfig(samples=1)), Espo(EspoConfig(samples=1, estimator="plain", beta=0))
    slopes = []
    for objective, unit in (
        (ours, lambda row, a: copies(0, row, full, a, 1.0)),
        (espo, lambda row, a: espo.unit(0, row, full, a)),
    ):
        (credit,) = objective.credit([group])
        batch = build([unit(row, float(credit[row])) for row in range(2)], [group])
        loss, _ = objective.loss(scored(table_logp(theta, batch)), batch)
        slopes.append(torch.autograd.grad(loss, theta)[0])
    np.testing.assert_allclose(2 * (C + 1) / C * slopes[0], slopes[1], rtol=1e-10, atol=1e-16)


# ---- layout and settings


@pytest.mark.parametrize(("ranks", "views_per_forward"), [(1, 1), (2, 5), (3, 2)])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward):
    """With one view in a forward too: no two masks of a completion have to meet."""
    objective = make_objective(BgpoConfig(samples=4, clip_low=0.01, clip_high=0.01))
    groups = [random_group(i, prompt=3 + i) for i in range(4)]
    whole, figures = plan_gradient(objective, groups, ranks=1, views_per_forward=1000)
    ours, ours_figures = plan_gradient(
        objective, groups, ranks=ranks, views_per_forward=views_per_forward, reverse=True
    )
    assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
    assert ours_figures == pytest.approx(figures) and figures["clip_fraction/high"] > 0


def test_control_masks_that_meet_in_a_ratio_cannot_be_scored_apart():
    objective, groups = make_objective(EspoConfig(samples=2, beta=0)), [random_group(i) for i in range(4)]
    whole, _ = plan_gradient(objective, groups, ranks=1, views_per_forward=1000)
    apart, _ = plan_gradient(objective, groups, ranks=1, views_per_forward=1000, cut=True)
    assert np.linalg.norm(apart - whole) > 1e-3 * np.linalg.norm(whole)


def test_what_it_costs_and_refuses():
    sampler = SamplerSpec(24, 24, 8, "random", 1.0)
    cost = BgpoConfig(samples=5).cost(sampler)
    assert (cost.views, cost.scored, cost.old, cost.reference) == (5, 12.5, True, False)
    assert not BgpoConfig().refuses(sampler)
    (problem,) = BgpoConfig().refuses(dataclasses.replace(sampler, temperature=0.0))
    assert "set it above 0" in problem
