"""ESPO: its recorded cases, its draws, the law of its estimate, its loss and gradient against closed forms."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from learner.likelihood.views import Unit
from learner.objectives import make_objective
from learner.objectives.advantages import group_advantages
from learner.objectives.elbo import BoundTerms, unit_sums
from learner.objectives.espo import Espo, stratified_counts
from learner.settings.methods.bounds import EspoConfig
from learner.verification.measurement import Meter
from learner.verification.methods import espo
from learner.verification.methods.case import read_method_case
from tests.support.hand_made import GOLDEN, make_group, random_group
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

RECORDED = ["01_mu1_onpolicy_nokl", "03_tight_clip_4e-4", "04_eps0_tie_onpolicy"]


# ---- recorded cases


def failed(name: str) -> set[str]:
    """Quantities of a recorded case that are out of bounds."""
    case = read_method_case(GOLDEN / "methods" / "espo", name)
    return {found.quantity for found in espo.check(case, Meter("cpu", "float32")) if not found.passed}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_cases_come_out_again(name):
    assert failed(name) == set()


class SelfIncluded(Espo):
    def credit(self, groups):
        return tuple(group_advantages(group.rewards) for group in groups)


class NotNormalised(Espo):
    def terms(self, scores, batch):
        terms = super().terms(scores, batch)
        ratio = (24 * terms.clipped.log_ratio_N).exp()
        credit = torch.tensor([view.credit for view in batch.first_views])
        return terms._replace(clipped=terms.clipped._replace(ratio_N=ratio, loss_N=-ratio * credit))


class Unclipped(Espo):
    def __init__(self, config):
        super().__init__(config.model_copy(update={"clip_low": 1.0, "clip_high": 9.0}))


class NoGradientAtTheTie(Espo):
    """As min(rho A, A) has it where the clipped branch is a constant: half."""

    def terms(self, scores, batch):
        terms = super().terms(scores, batch)
        return terms._replace(
            clipped=terms.clipped._replace(loss_N=(terms.clipped.loss_N + terms.clipped.loss_N.detach()) / 2)
        )


class WithoutTheOne(Espo):
    """C / x in place of (C + 1) / x."""

    def unit(self, *args):
        return tuple(view._replace(weight=view.weight * 24 / 25) for view in super().unit(*args))


@pytest.mark.parametrize(
    ("wrong", "name", "quantities"),
    [
        (SelfIncluded, "01_mu1_onpolicy_nokl", {"advantages", "gradient of the ELBO loss"}),
        (NotNormalised, "03_tight_clip_4e-4", {"ratios", "ELBO loss", "gradient of the ELBO loss"}),
        (Unclipped, "03_tight_clip_4e-4", {"ELBO loss", "clip fraction", "gradient of the ELBO loss"}),
        (NoGradientAtTheTie, "04_eps0_tie_onpolicy", {"gradient of the ELBO loss"}),
        (WithoutTheOne, "01_mu1_onpolicy_nokl", {"ELBO", "ELBO log-probs", "gradient of the ELBO loss"}),
    ],
)
def test_control_a_wrong_rule_does_not_come_out(monkeypatch, wrong, name, quantities):
    monkeypatch.setattr(espo, "Espo", wrong)
    assert quantities <= failed(name)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_counts_are_those_of_the_recorded_offsets(name):
    case = read_method_case(GOLDEN / "methods" / "espo", name)
    counts_NMB, offset_NM = case.arrays.by_name["counts"], case.arrays.by_name["offset_k"]
    for counts_MB, offset_M in zip(counts_NMB, offset_NM, strict=True):
        ours = [stratified_counts(int(offset), counts_MB.shape[1], 24) for offset in offset_M]
        np.testing.assert_array_equal(ours, counts_MB)


# ---- draws


@pytest.mark.parametrize(("length", "rows"), [(4, 3), (7, 2), (256, 3), (24, 8), (256, 2), (5, 9)])
def test_every_row_s_count_is_uniform_and_the_rows_are_spread_out(length, rows):
    counts_kb = np.array([stratified_counts(offset, rows, length) for offset in range(length + 1)])
    for row in range(rows):
        np.testing.assert_array_equal(np.sort(counts_kb[:, row]), np.arange(length + 1))
    for counts_b in counts_kb:
        gaps = np.diff(np.sort(counts_b), append=counts_b.min() + length + 1)
        assert gaps.max() - gaps.min() <= 1


def test_control_rounding_after_the_offset_is_added_loses_half_of_a_row_s_counts():
    """As the authors' code has it: the same for groups of 3, but not where a row's share is a half."""

    def published(offset, rows, length):
        return np.rint(offset + np.arange(rows) * (length + 1) / rows).astype(int) % (length + 1)

    for offset in range(257):
        np.testing.assert_array_equal(published(offset, 3, 256), stratified_counts(offset, 3, 256))
    assert len({published(offset, 8, 24)[4] for offset in range(25)}) == 13


def test_draws_have_the_stated_laws():
    group, objective = random_group(0, size=4, length=8), Espo(EspoConfig(samples=3))
    marked, counts, seeds = np.zeros((4, 8)), np.zeros((4, 9)), 1500
    for seed in range(seeds):
        mask_GMC = objective.draw(group, context(run_seed=seed))
        count_MG = mask_GMC.sum(axis=2).T
        assert all((c == stratified_counts(c[0], 4, 8)).all() for c in count_MG), "stratified over the rows of a sample"
        marked += mask_GMC.sum(axis=1)
        for row in range(4):
            counts[row] += np.bincount(count_MG[:, row], minlength=9)
    draws = 3 * seeds
    assert abs(counts / draws - 1 / 9).max() < 4.5 * np.sqrt(1 / 9 * 8 / 9 / draws)
    assert abs(marked / draws - 0.5).max() < 4.5 * np.sqrt(0.25 / draws), "every position alike"


def test_draws_are_named_by_run_group_and_update_and_touch_no_global_generator():
    group, objective = random_group(0, length=16), Espo(EspoConfig())
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = objective.draw(group, context())
    np.testing.assert_array_equal(first, objective.draw(group, context()))
    others = [objective.draw(group, context(1)), objective.draw(group, context(run_seed=4))]
    others += [objective.draw(dataclasses.replace(group, group_id=1), context())]
    assert not any((first == other).all() for other in others), "fresh for another update, run or group"
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])


# ---- views


def test_a_mask_and_its_complement_score_every_position_once():
    group, objective = random_group(0, size=6, length=12), Espo(EspoConfig(samples=3))
    mask_GMC = objective.draw(group, context())
    for unit in objective.wanted(0, group, np.ones(6), context()).units:
        assert np.bincount(np.concatenate([view.scored_n for view in unit])).tolist() == [3] * 12, (
            "EOS and what follows"
        )
        for view in unit:
            assert any(
                (view.hidden_C == (mask_C ^ side)).all() for mask_C in mask_GMC[view.row] for side in (False, True)
            )
            assert view.weight == pytest.approx(13 / view.hidden_C.sum() / 2 / 3)
            assert view.scored_n.tolist() == np.flatnonzero(view.hidden_C).tolist() and view.hidden_P is None


def test_a_count_of_0_or_all_leaves_one_view():
    for mask in (np.zeros((1, 4), bool), np.ones((1, 4), bool)):
        (view,) = Espo(EspoConfig()).unit(0, 0, mask, 1.0)
        assert view.hidden_C.all() and view.weight == pytest.approx(5 / 4 / 2)
    plain = Espo(EspoConfig(estimator="plain"))
    assert plain.unit(0, 0, np.zeros((2, 4), bool), 1.0) == ()
    (view,) = plain.unit(0, 0, np.array([[0, 0, 0, 0], [0, 1, 1, 0]], bool), 1.0)
    assert view.weight == pytest.approx(5 / 2 / 2)


def test_rows_without_gradient_are_left_out_and_stay_in_the_divisor():
    group, some = random_group(0, length=8), np.array([0.0, 1.0, 0.0, -1.0])
    for beta, rows in ((0.0, [1, 3]), (0.1, [0, 1, 2, 3])):
        wanted = Espo(EspoConfig(beta=beta)).wanted(0, group, some, context())
        assert [unit[0].row for unit in wanted.units] == rows and wanted.divisor == 4.0
    few, every = (Espo(EspoConfig(beta=0)).wanted(0, group, c, context()).units for c in (some, np.ones(4)))
    for unit in few:  # the draws don't depend on which rows are left out
        for view, other in zip(unit, every[unit[0].row], strict=True):
            np.testing.assert_array_equal(view.hidden_C, other.hidden_C)
    plain = Espo(EspoConfig(estimator="plain", samples=1, beta=0))
    empty = [c for c in range(20) if len(plain.wanted(0, group, np.ones(4), context(c)).units) < 4]
    assert empty, "control: some rows mask nothing"
    assert plain.wanted(0, group, np.ones(4), context(empty[0])).divisor == 4.0


def test_credit_is_leave_one_out_and_sums_to_0():
    group = make_group(np.ones((3, 4)), [[0, 1, 2, 3]] * 3, steps=4, rewards=[[1], [0], [0.5]])
    (credit,) = Espo(EspoConfig()).credit([group])
    np.testing.assert_allclose(credit, [0.75, -0.75, 0.0])
    (scaled,) = Espo(EspoConfig(scale_advantages=True)).credit([group])
    np.testing.assert_allclose(scaled, credit / (0.5 + 1e-4))
    (other,) = Espo(EspoConfig()).credit([random_group(3, size=6)])
    assert abs(other.sum()) < 1e-12 and other.any()


# ---- the estimate of the bound


def samples_of_the_toy(estimator: str) -> np.ndarray:
    """Estimates with one sample of the two tokens of the published table, by count and set, equally likely."""
    known, alone = (0.9, 0.7), (0.4, 0.2)  # the token's probability beside the other one, and with both masked
    group, objective, found = make_group([[3, 3]], [[0, 1]], steps=2), Espo(EspoConfig(estimator=estimator)), []
    for mask_C in [np.zeros(2, bool)] * 2 + list(subsets(2, 1)) + [np.ones(2, bool)] * 2:
        unit = objective.unit(0, 0, mask_C[None], 1.0)
        if not unit:
            found.append(0.0)
            continue
        batch = build([unit], [group])
        full = np.array([view.hidden_C.all() for view in unit])[batch.view_of_score]
        logp = [math.log((alone if f else known)[j]) for f, j in zip(full, batch.position, strict=True)]
        found.append(unit_sums(torch.tensor(logp, dtype=torch.float64), batch).item())
    return np.array(found)


@pytest.mark.parametrize(("estimator", "variance"), [("plain", 2.760), ("coupled", 0.321)])
def test_mean_and_variance_of_the_published_toy(estimator, variance):
    estimates = samples_of_the_toy(estimator)
    assert estimates.mean() == pytest.approx(-1.49388205, abs=1e-8)
    assert estimates.var() == pytest.approx(variance, abs=5e-4)


def expected_gradient(objective: Espo, change=lambda view: view, credit: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Of the loss of a completion's first update, over counts and masks by their probabilities; and of its bound.
    ``change``: of each view, for controls."""
    C, theta = 4, state_table(4)
    group, total = make_group([[2, 3, 1, 1]], [[0, 1, 2, 3]], steps=4), np.zeros(tuple(theta.shape))
    (bound,) = torch.autograd.grad(exact_bound(theta, group.completion_ids[0]), theta)
    for count in range(C + 1):
        for mask_C in subsets(C, count):
            unit = tuple(change(view) for view in objective.unit(0, 0, mask_C[None], credit))
            if unit:
                batch = build([unit], [group])
                loss, _ = objective.loss(scored(table_logp(theta, batch)), batch)
                (gradient,) = torch.autograd.grad(loss, theta)
                total += gradient.numpy() / (C + 1) / math.comb(C, count)
    return total, -credit / C * bound.numpy()


@pytest.mark.parametrize("estimator", ["coupled", "plain"])
def test_the_first_update_s_expected_gradient_is_that_of_the_bound(estimator):
    """-(A / C) grad L, by enumeration; the ratio is 1, so it doesn't depend on the clip."""
    for width in (0.2, 0.0):
        objective = Espo(EspoConfig(estimator=estimator, beta=0, clip_low=width, clip_high=width))
        ours, exact = expected_gradient(objective)
        assert np.linalg.norm(ours - exact) < 1e-12 * np.linalg.norm(exact)
    wrong, exact = expected_gradient(objective, lambda view: view._replace(weight=view.weight * 4 / 5))
    assert np.linalg.norm(wrong - exact) > 0.1 * np.linalg.norm(exact), "control: C / x, the rate of Bernoulli masks"
    wrong, exact = expected_gradient(objective, lambda view: view._replace(weight=1.0))
    assert np.linalg.norm(wrong - exact) > 0.1 * np.linalg.norm(exact), "control: unweighted"


# ---- the loss


def two_units(credits: tuple[float, float]) -> tuple[list[Unit], list]:
    group = make_group([[2, 3, 1, 1], [4, 5, 6, 1]], [[0, 1, 2, 3]] * 2, steps=4)
    masks = np.array([[[1, 0, 0, 1], [0, 0, 0, 0]], [[0, 1, 0, 0], [1, 1, 1, 0]]], bool)
    return [Espo(EspoConfig()).unit(0, row, masks[row], credits[row]) for row in range(2)], [group]


@pytest.mark.parametrize(("credits", "clipped"), [((-2.0, -1.0), 0), ((2.0, -1.0), 1), ((2.0, 1.0), 2)])
def test_loss_and_slopes_of_a_batch_by_hand(credits, clipped):
    """Bounds, ratios, clip and KL from the formulas of the method, written out for both masks of both rows."""
    units, groups = two_units(credits)
    batch = build(units, groups)
    theta, old, reference = state_table(4, 0), state_table(4, 1).detach(), state_table(4, 2).detach()

    def bound(table: torch.Tensor, row: int, masks: list[list[int]]) -> torch.Tensor:
        logp, ids, total = table.log_softmax(-1), groups[0].completion_ids[row], torch.zeros((), dtype=torch.float64)
        for mask in masks:
            for hidden in (mask, [j for j in range(4) if j not in mask]):
                for j in hidden:
                    total = total + 5 / len(hidden) / 2 / 2 * logp[sum(2**i for i in hidden), j, int(ids[j])]
        return total

    config = EspoConfig(clip_low=0.02, clip_high=0.01, beta=0.3)
    loss, figures = Espo(config).loss(scored(*(table_logp(t, batch) for t in (theta, old, reference))), batch)
    expected, mean, kl, low, high = torch.zeros((), dtype=torch.float64), 0.0, 0.0, 0.0, 0.0
    for row, (masks, advantage) in enumerate(zip(([[0, 3], []], [[1], [0, 1, 2]]), credits, strict=True)):
        new, before, ref = (bound(t, row, masks) for t in (theta, old, reference))
        rho, k2 = ((new - before) / 4).exp(), (new - ref) ** 2 / 2
        expected = expected - torch.min(rho * advantage, rho.clamp(0.98, 1.01) * advantage) + 0.3 * k2 / 4
        mean, kl = mean + new.item() / 2, kl + k2.item() / 4 / 2
        low, high = low + float(rho < 0.98 and advantage < 0) / 2, high + float(rho > 1.01 and advantage > 0) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, exact = (torch.autograd.grad(value, theta)[0].numpy() for value in (loss, expected))
    np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-12)
    named = figures.values()
    assert named["scored_completions"] == 2 and low + high == clipped / 2
    assert (named["clip_fraction/low"], named["clip_fraction/high"]) == (low, high)
    assert (named["bound/elbo"], named["kl"]) == pytest.approx((mean, kl))


@pytest.mark.parametrize("credit", [2.0, -2.0])
def test_without_a_clip_width_the_gradient_passes_at_a_ratio_of_exactly_1_and_is_one_sided_beside_it(credit):
    units, groups = two_units((credit, credit))
    batch = build(units[:1], groups)
    theta, objective = state_table(4), Espo(EspoConfig(clip_low=0.0, clip_high=0.0, beta=0))
    logp_N = table_logp(theta, batch)
    (of_bound,) = torch.autograd.grad(unit_sums(logp_N, batch).sum(), theta, retain_graph=True)
    for shift, passes in ((0.0, 1.0), (1e-3, float(credit < 0)), (-1e-3, float(credit > 0))):
        old_N = logp_N.detach() - shift
        loss, figures = objective.loss(scored(logp_N, old_N), batch)
        (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
        ratio = figures.values()["ratio/mean"]
        assert (ratio == 1.0) == (shift == 0.0)
        np.testing.assert_allclose(gradient, -passes * ratio * credit / 4 * of_bound, rtol=1e-10, atol=1e-14)


def test_the_gradient_of_the_kl_term():
    """beta (L - L_ref) / C grad L: alone where there is no advantage."""
    units, groups = two_units((0.0, 0.0))
    batch = build(units[:1], groups)
    theta = state_table(4)
    logp_N, reference_N = table_logp(theta, batch), table_logp(state_table(4, 2).detach(), batch)
    bound, reference = unit_sums(logp_N, batch), unit_sums(reference_N, batch)
    (of_bound,) = torch.autograd.grad(bound.sum(), theta, retain_graph=True)
    loss, _ = Espo(EspoConfig(beta=0.3)).loss(scored(logp_N, None, reference_N), batch)
    (gradient,) = torch.autograd.grad(loss, theta)
    apart = (bound - reference).item()
    np.testing.assert_allclose(gradient, 0.3 * apart / 4 * of_bound, rtol=1e-10, atol=1e-14)
    assert abs(apart) > 0.1


def test_small_differences_of_large_bounds_are_exact():
    """Two bounds of -200 nats that differ by 1e-5: in float32 a bound has steps of 1.5e-5."""
    group = make_group(np.full((1, 64), 2), [list(range(64))], steps=64)
    unit = Espo(EspoConfig(samples=1)).unit(0, 0, (np.arange(64) % 2 == 0)[None], 1.0)
    batch = build([unit], [group])
    old_N = torch.full((64,), -3.0)
    old_N[0] = -1.0
    new_N = old_N.clone()
    new_N[0] += 1e-5
    terms: BoundTerms = Espo(EspoConfig()).terms(scored(new_N, old_N), batch)
    exact = float(new_N[0].double() - old_N[0].double()) * batch.weight[0] / 64
    assert terms.bound_U.item() < -190 and terms.clipped.log_ratio_N.item() == pytest.approx(exact, rel=1e-12)


# ---- layout


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("views_per_forward", [1, 9])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward):
    groups = [random_group(i, prompt=3 + i) for i in range(4)]
    objective = make_objective(EspoConfig(beta=0.05, clip_low=0.005, clip_high=0.005))
    whole, figures = plan_gradient(objective, groups, ranks=1, views_per_forward=1000)
    for reverse in (False, True):
        ours, ours_figures = plan_gradient(
            objective, groups, ranks=ranks, views_per_forward=views_per_forward, reverse=reverse
        )
        assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
        assert ours_figures == pytest.approx(figures)
    assert figures["clip_fraction/high"] > 0 and figures["kl"] > 0
    wrong, _ = plan_gradient(objective, groups, ranks=1, views_per_forward=1000, cut=True)
    assert np.linalg.norm(wrong - whole) > 0.01 * np.linalg.norm(whole), "control: units that are cut"


def test_the_settings_reach_the_method():
    objective = make_objective(EspoConfig())
    assert isinstance(objective, Espo) and objective.needs.old and objective.needs.reference
    assert not Espo(EspoConfig(beta=0)).needs.reference
    cost = EspoConfig().cost(random_group(0).sampler)
    assert cost.views == max(len(unit) for unit in objective.wanted(0, random_group(0), np.ones(4), context()).units)
