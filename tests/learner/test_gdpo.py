"""GDPO: its quadrature and draws, the law of its bound, its loss and gradient against closed forms."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from learner.likelihood.views import Unit
from learner.objectives import make_objective
from learner.objectives.elbo import unit_sums
from learner.objectives.espo import Espo
from learner.objectives.gdpo import Gdpo, masked_counts, quadrature
from learner.settings.methods.bounds import EspoConfig, GdpoConfig
from rollout.trajectory import TrajectoryGroup
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

# ---- quadrature


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 16])
def test_the_quadrature_is_exact_up_to_degree_2n_minus_1(nodes):
    at_N, weight_N = quadrature(nodes)
    assert weight_N.sum() == pytest.approx(1, abs=1e-14) and (at_N > 0).all() and (at_N < 1).all()
    for degree in range(2 * nodes):
        assert weight_N @ at_N**degree == pytest.approx(1 / (degree + 1), abs=1e-13)
    if nodes < 6:  # beyond that the error is below rounding
        error = abs(weight_N @ at_N ** (2 * nodes) - 1 / (2 * nodes + 1))
        assert error > 1e-7, "control: one degree more isn't exact"


def test_published_nodes_and_weights():
    np.testing.assert_allclose(quadrature(2), [[0.2113, 0.7887], [0.5, 0.5]], atol=5e-5)
    np.testing.assert_allclose(quadrature(3), [[0.1127, 0.5, 0.8873], [5 / 18, 8 / 18, 5 / 18]], atol=5e-5)


def test_counts_are_the_rounded_share_and_at_least_1():
    assert masked_counts(3, 24).tolist() == [3, 12, 21] and masked_counts(2, 256).tolist() == [54, 202]
    assert masked_counts(16, 24).tolist()[0] == 1 and masked_counts(3, 1).tolist() == [1, 1, 1]
    for nodes, length in itertools.product(range(1, 17), (1, 3, 8, 256)):
        counts_N = masked_counts(nodes, length)
        assert counts_N.min() >= 1 and counts_N.max() <= length and (np.diff(counts_N) >= 0).all()


# ---- the bound


def expected_bound(objective: Gdpo, group: TrajectoryGroup, theta: torch.Tensor, change=lambda view: view):
    """The mean of the estimate over all masks, its nodes being drawn independently; ``change``: of each view."""
    C, N = group.completion_ids.shape[1], objective.config.nodes
    per_node = [list(subsets(C, int(count))) for count in masked_counts(N, C)]
    total = torch.zeros((), dtype=torch.float64)
    for n, masks in enumerate(per_node):  # the estimate is a sum over nodes, so each may be taken alone
        for mask_C in masks:
            at_N = np.array([mask_C if m == n else others[0] for m, others in enumerate(per_node)])
            batch = build([(change(objective.unit(0, 0, at_N, 1.0)[n]),)], [group])
            total = total + unit_sums(table_logp(theta, batch), batch).sum() / len(masks)
    return total


def context_free(length: int) -> torch.Tensor:
    """A table whose law of a token doesn't depend on what is masked."""
    table = state_table(length).detach()
    return table[:1].expand_as(table)


@pytest.mark.parametrize(("nodes", "length"), [(1, 3), (2, 3), (3, 3), (3, 5), (4, 6)])
def test_the_expected_bound_of_a_context_free_model_is_the_enumerated_one(nodes, length):
    group = make_group([range(2, 2 + length)], [range(length)], steps=length)
    theta, objective = context_free(length), Gdpo(GdpoConfig(nodes=nodes))
    exact = exact_bound(theta, group.completion_ids[0]).item()
    assert expected_bound(objective, group, theta).item() == pytest.approx(exact, rel=1e-12)
    at_N, weight_N = quadrature(nodes)
    by_count = dict(zip(masked_counts(nodes, length).tolist(), weight_N / at_N, strict=True))
    if len(by_count) == nodes:
        wrong = expected_bound(
            objective, group, theta, lambda view: view._replace(weight=float(by_count[view.scored_n.size]))
        ).item()
        assert abs(wrong / exact - 1) > 0.02, "control: divided by the node, not by the share that is masked"


def test_the_bound_is_the_integral_where_log_probs_are_polynomials_of_the_masked_share():
    """Up to the rounding of counts to whole positions."""
    C, objective = 4000, Gdpo(GdpoConfig(nodes=3))
    group = make_group(np.full((1, C), 2), np.zeros((1, C)), steps=1)
    masks = objective.draw(group, context())[0]
    batch = build([objective.unit(0, 0, masks, 1.0)], [group])
    share_N = np.array([view.hidden_C.mean() for view in batch.views])[batch.view_of_score]
    for degree in range(8):
        bound = unit_sums(torch.from_numpy(share_N**degree), batch).item() / C
        assert (abs(bound - 1 / (degree + 1)) < 2e-4) == (degree < 6)


def test_the_first_update_s_expected_gradient_is_that_of_the_quadrature_of_the_bound():
    """-(A / C) grad of sum over n of w_n * mean over sets of x_n of (C / x_n) * sum of log-probs, and not of the whole
    bound where it isn't a polynomial."""
    group, theta, credit = make_group([[2, 3, 1, 1]], [[0, 1, 2, 3]], steps=4), state_table(4), 1.5
    objective = Gdpo(GdpoConfig(nodes=2, clip_low=0.0, clip_high=0.0))
    per_node = [list(subsets(4, int(count))) for count in masked_counts(2, 4)]
    total = np.zeros(tuple(theta.shape))
    for masks in itertools.product(*per_node):
        batch = build([objective.unit(0, 0, np.array(masks), credit)], [group])
        loss, _ = objective.loss(scored(table_logp(theta, batch)), batch)
        total += torch.autograd.grad(loss, theta)[0].numpy() / math.prod(map(len, per_node))
    logp, bound = theta.log_softmax(-1), torch.zeros((), dtype=torch.float64)
    for count, weight in ((1, 0.5), (3, 0.5)):
        for mask_C in subsets(4, count):
            at_n = np.flatnonzero(mask_C)
            of_state = logp[int((2**at_n).sum()), at_n, group.completion_ids[0][at_n]].sum()
            bound = bound + weight * 4 / count * of_state / math.comb(4, count)
    (exact,) = torch.autograd.grad(-credit / 4 * bound, theta)
    assert np.linalg.norm(total - exact.numpy()) < 1e-12 * np.linalg.norm(exact)
    (whole,) = torch.autograd.grad(-credit / 4 * exact_bound(theta, group.completion_ids[0]), theta)
    assert np.linalg.norm(total - whole.numpy()) > 0.1 * np.linalg.norm(whole), "control: another bound"


# ---- draws and views


def test_draws_have_the_stated_laws():
    group, objective, seeds = random_group(0, size=3, length=8), Gdpo(GdpoConfig(nodes=3)), 2000
    marked = np.zeros((3, 3, 8))
    for seed in range(seeds):
        mask_GNC = objective.draw(group, context(run_seed=seed))
        assert (mask_GNC.sum(axis=2) == masked_counts(3, 8)).all()
        marked += mask_GNC
    share_N1 = masked_counts(3, 8)[:, None] / 8
    assert (abs(marked / seeds - share_N1) < 4.5 * np.sqrt(share_N1 * (1 - share_N1) / seeds) + 1e-12).all()


def test_draws_are_named_by_run_group_and_update_and_touch_no_global_generator():
    group, objective = random_group(0, length=16), Gdpo(GdpoConfig())
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = objective.draw(group, context())
    np.testing.assert_array_equal(first, objective.draw(group, context()))
    others = [objective.draw(group, context(1)), objective.draw(group, context(run_seed=4))]
    others += [objective.draw(dataclasses.replace(group, group_id=1), context())]
    assert not any((first == other).all() for other in others), "fresh for another update, run or group"
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_rows_without_gradient_are_left_out_and_stay_in_the_divisor():
    group, some = random_group(0, length=8), np.array([0.0, 1.0, 0.0, -1.0])
    for beta, rows in ((0.0, [1, 3]), (0.1, [0, 1, 2, 3])):
        wanted = Gdpo(GdpoConfig(beta=beta)).wanted(0, group, some, context())
        assert [unit[0].row for unit in wanted.units] == rows and wanted.divisor == 4.0
        assert all(len(unit) == 3 for unit in wanted.units)
    few, every = (Gdpo(GdpoConfig()).wanted(0, group, c, context()).units for c in (some, np.ones(4)))
    for unit in few:  # the draws don't depend on which rows are left out
        for view, other in zip(unit, every[unit[0].row], strict=True):
            np.testing.assert_array_equal(view.hidden_C, other.hidden_C)


def test_credit_is_the_distance_from_the_group_s_mean():
    group = make_group(np.ones((3, 4)), [[0, 1, 2, 3]] * 3, steps=4, rewards=[[1], [0], [0.5]])
    (credit,) = Gdpo(GdpoConfig()).credit([group])
    np.testing.assert_allclose(credit, [0.5, -0.5, 0.0])


# ---- the loss


def two_units(objective: Gdpo) -> tuple[list[Unit], list[TrajectoryGroup]]:
    group = make_group([[2, 3, 1, 1], [4, 5, 6, 1]], [[0, 1, 2, 3]] * 2, steps=4)
    mask_GNC = objective.draw(group, context())
    return [objective.unit(0, row, mask_GNC[row], credit) for row, credit in enumerate((2.0, -1.0))], [group]


@pytest.mark.parametrize("normalise", [False, True])
def test_loss_and_slopes_of_a_batch_by_hand(normalise):
    config = GdpoConfig(nodes=2, normalise_ratio=normalise, clip_low=0.05, clip_high=0.1, beta=0.3)
    units, groups = two_units(Gdpo(config))
    batch = build(units, groups)
    tables = state_table(4, 0), state_table(4, 1).detach(), state_table(4, 2).detach()
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for row, advantage in enumerate((2.0, -1.0)):
        bounds = []
        for table in tables:
            total = torch.zeros((), dtype=torch.float64)
            for view, share in zip(units[row], (0.25, 0.75), strict=True):
                state = int((2 ** np.flatnonzero(view.hidden_C)).sum())
                ids_n = groups[0].completion_ids[row][view.scored_n]
                total = total + 0.5 / share * table.log_softmax(-1)[state, view.scored_n, ids_n].sum()
            bounds.append(total)
        new, before, ref = bounds
        rho = ((new - before) / (4 if normalise else 1)).exp()
        surrogate = torch.min(rho * advantage, rho.clamp(0.95, 1.1) * advantage)
        clipped += int(surrogate != rho * advantage)
        expected = expected - surrogate / 4 + 0.3 * (new - ref) ** 2 / 2 / 4
    loss, figures = Gdpo(config).loss(scored(*(table_logp(table, batch) for table in tables)), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, exact = (torch.autograd.grad(value, tables[0])[0].numpy() for value in (loss, expected))
    np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-12)
    named = figures.values()
    assert named["clip_fraction/low"] + named["clip_fraction/high"] == clipped / 2
    assert named["scored_completions"] == 2 and named["kl"] > 0


def test_with_a_normalised_ratio_it_is_espo_s_loss_over_the_length():
    """On the same views: the two differ by their draws, weights and advantages alone."""
    gdpo, espo = Gdpo(GdpoConfig(normalise_ratio=True)), Espo(EspoConfig(beta=0))
    units, groups = two_units(gdpo)
    batch = build(units, groups)
    new, old = table_logp(state_table(4, 0), batch), table_logp(state_table(4, 1), batch)
    ours, theirs = (method.loss(scored(new, old.detach()), batch)[0].item() for method in (gdpo, espo))
    assert ours == pytest.approx(theirs / 4, rel=1e-12)
    plain = Gdpo(GdpoConfig()).loss(scored(new, old.detach()), batch)[0].item()
    assert plain != pytest.approx(ours, rel=0.01), "control: the published exponent is another"


# ---- layout


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("views_per_forward", [1, 7])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward):
    groups = [random_group(i, prompt=3 + i) for i in range(4)]
    objective = make_objective(GdpoConfig(beta=0.05))
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
    objective = make_objective(GdpoConfig())
    assert isinstance(objective, Gdpo) and objective.needs.old and not objective.needs.reference
    assert Gdpo(GdpoConfig(beta=0.1)).needs.reference
    cost = GdpoConfig(nodes=5).cost(random_group(0).sampler)
    assert cost.views == len(Gdpo(GdpoConfig(nodes=5)).wanted(0, random_group(0), np.ones(4), context()).units[0])
