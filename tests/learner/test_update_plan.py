"""The plan of an update: the same work whatever the ranks and forwards, and rows without signal cost nothing."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from learner.likelihood.timesteps import step_probabilities, step_table
from learner.likelihood.views import View, pad_view
from learner.objectives.agrpo import Agrpo
from learner.ranks.plan import UpdatePlan, deal, plan_update
from learner.settings.methods.states import AgrpoConfig
from tests.support.hand_made import make_group, random_group

EOS = 1


def plan(groups, *, ranks=1, views_per_forward=8, update_index=0, run_seed=3, **config) -> UpdatePlan:
    objective = Agrpo(AgrpoConfig(**{"k": 3, "timestep_sampling": "entropy", "weight_floor": 0.0, **config}))
    return plan_update(
        groups,
        objective=objective,
        run_seed=run_seed,
        update_index=update_index,
        eos_ids=(EOS,),
        ranks=ranks,
        views_per_forward=views_per_forward,
    )


def live_views(update: UpdatePlan) -> list[View]:
    return [view for rank in update.forwards for forward in rank for view in forward.views if view.scored_n.size]


def essence(view: View) -> tuple:
    """What can be compared of a view of a recorded state: the rest follows from it."""
    return view.group, view.row, view.step, view.credit, view.weight, view.draws


def essences(update: UpdatePlan) -> list[tuple]:
    return list(map(essence, live_views(update)))


def without_signal(group):
    return dataclasses.replace(group, rewards=np.ones_like(group.rewards))


@pytest.mark.parametrize("views_per_forward", [1, 2, 8, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_same_work_on_any_number_of_ranks_and_forwards(ranks, views_per_forward):
    groups = [random_group(i) for i in range(5)]
    whole, dealt = plan(groups), plan(groups, ranks=ranks, views_per_forward=views_per_forward)
    assert Counter(essences(dealt)) == Counter(essences(whole))
    assert (dealt.normaliser, dealt.statistics) == (whole.normaliser, whole.statistics)
    assert len(dealt.forwards) == ranks
    assert len({len(rank) for rank in dealt.forwards}) == 1, "ranks do equal numbers of passes"
    assert all(0 < len(forward.views) <= views_per_forward for rank in dealt.forwards for forward in rank)
    assert all(forward.passes == 1 for rank in dealt.forwards for forward in rank)
    shares = [sum(view.scored_n.size > 0 for forward in rank for view in forward.views) for rank in dealt.forwards]
    assert max(shares) - min(shares) <= 1
    assert [view.group for view in live_views(dealt)] == sorted(view.group for view in live_views(dealt))


def test_ranks_without_views_get_pads():
    update = plan([random_group(0, size=2)], ranks=9, views_per_forward=1, k=1)
    views = [view for rank in update.forwards for forward in rank for view in forward.views]
    assert len(views) == 9 and len(live_views(update)) == 2
    assert sum(forward.is_pad for rank in update.forwards for forward in rank) == 7


def test_groups_without_signal_cost_nothing_but_stay_in_the_denominator():
    groups = [random_group(0), without_signal(random_group(1)), random_group(2)]
    update = plan(groups)
    assert {view.group for view in live_views(update)} == {0, 2}
    assert update.normaliser == 3 * 4 * 3
    assert update.statistics["groups/no_signal_share"] == pytest.approx(1 / 3)
    kept = {view.group for view in live_views(plan(groups, beta=0.1))}
    assert kept == {0, 1, 2}, "the KL has a gradient in every row"


def test_no_signal_at_all_still_forwards_once():
    update = plan([without_signal(random_group(0))], ranks=2)
    assert [len(rank) for rank in update.forwards] == [1, 1]
    assert not live_views(update)


def test_draws_do_not_depend_on_which_rows_are_left_out():
    groups = [random_group(0), random_group(1)]
    alone = [v._replace(group=0) for v in live_views(plan(groups)) if v.group == 1]
    assert essences(plan([groups[1]])) == list(map(essence, alone)), "nor on the groups beside it"
    rewards = groups[1].rewards.copy()
    rewards[:] = 0.5
    rewards[0] = 5.0
    rewards[3] = -4.0  # rows 1 and 2 lose their advantage
    fewer = live_views(plan([dataclasses.replace(groups[1], rewards=rewards)]))
    assert {view.row for view in fewer} == {0, 3}
    assert {(v.row, v.step) for v in fewer} == {(v.row, v.step) for v in alone if v.row in (0, 3)}


def test_draws_change_with_update_version_and_seed_and_repeat_otherwise():
    group = random_group(0, size=8)
    first = essences(plan([group]))
    assert first == essences(plan([group]))
    newer = dataclasses.replace(group, policy_version=1)
    for other in (plan([group], update_index=1), plan([group], run_seed=4), plan([newer])):
        assert essences(other) != first


def test_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()
    plan([random_group(0)])
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def unit(row: int, size: int) -> tuple[View, ...]:
    hidden_C, scored_n = np.ones(4, dtype=bool), np.arange(4)
    return tuple(View(0, row, hidden_C, scored_n, 1.0, float(number + 1)) for number in range(size))


@pytest.mark.parametrize("views_per_forward", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[1] * 9, [3] * 8, [2, 1, 4, 1, 3, 3, 1, 2, 5, 1], [4]], ids=str)
def test_units_are_dealt_whole(sizes, ranks, views_per_forward):
    units = [unit(row, size) for row, size in enumerate(sizes)]
    dealt = deal(units, ranks, views_per_forward, pad=(pad_view(random_group(0)),))
    live = [unit for rank in dealt for forward in rank for unit in forward.units if not forward.is_pad]
    assert [[view.row for view in unit] for unit in live] == [[row] * size for row, size in enumerate(sizes)]
    assert len(dealt) == ranks and len({len(rank) for rank in dealt}) == 1, "ranks do equal numbers of forwards"
    for column in zip(*dealt, strict=True):
        assert len({forward.passes for forward in column}) == 1, "and of passes"
        most = max(len(forward.views) for forward in column)
        assert most <= views_per_forward * column[0].passes
        if column[0].passes > 1:
            assert any(len(forward.units) == 1 and len(forward.views) > views_per_forward for forward in column)
            assert all(len(forward.units) == 1 or len(forward.views) <= views_per_forward for forward in column)
    assert all(forward.number == i for rank in dealt for i, forward in enumerate(rank))


@pytest.mark.parametrize("draws", [{}, {"strata": "row"}, {"low_discrepancy": False}], ids=str)
@pytest.mark.parametrize("sampling", ["uniform", "entropy"])
def test_weights_average_to_every_step_once(sampling, draws):
    """Over run seeds, the summed weight of each step tends to k/m, through the generators that a run uses."""
    group = random_group(5, size=2)
    rewards = np.array([[1.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    group = dataclasses.replace(group, rewards=rewards)
    runs, k, m = 500, 3, group.sampler.steps
    total, unweighted = np.zeros((2, m)), np.zeros((2, m))
    for seed in range(runs):
        config = {"timestep_sampling": sampling, **draws}
        for view in live_views(plan([group], run_seed=seed, k=k, **config)):
            total[view.row, view.step] += view.weight / runs
            unweighted[view.row, view.step] += 1 / runs
    p = step_probabilities(step_table(group, "all", (EOS,)), sampling)
    standard_error = np.sqrt(k * (1 / p - 1) / runs) / m
    assert (abs(total - k / m) < 4 * standard_error).all()
    if sampling == "entropy":
        assert (abs(unweighted - k / m) > 4 * standard_error).any(), "control: draws without weights are biased"


def test_statistics():
    group = make_group(
        [[2, 3, EOS, EOS], [EOS] * 4, [2, 2, 2, 2], [2, 2, 2, EOS]],
        [[0, 1, 2, 3], [0, 1, 2, 2], [3, 2, 1, 0], [0, 1, 2, 3]],
        steps=4,
        drawn=[[1] * 4, [1, 1, 0, 0], [1] * 4, [1] * 4],
        entropy=[[0.5] * 4] * 4,
        rewards=[[1.0, 0.5], [0.0, 0.0], [1.0, 0.5], [0.0, 0.5]],
        correct=np.array([True, False, True, False]),
    )
    update = plan([group], step_range="until_last_token", k=8)
    figures = update.statistics
    expected = {
        "reward/mean": 3.5 / 4,
        "reward/part0": 0.5,
        "reward/part1": 1.5 / 4,
        "solve_rate": 0.5,
        "groups/no_signal_share": 0.0,
        "eos_rate": 0.75,
        "all_eos_completions": 1.0,
        "completion_length": 9 / 4,
        "completions": 4.0,
        "entropy": 0.5,
        "live_completions": 4.0,
        "importance_weight/max": 1.0,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["views"] + figures["draws_merged"] == 4 * 8
    assert [(v.step, v.weight) for v in live_views(update) if v.row == 1] == [(0, 8.0)], "all EOS: its first step only"
    assert update.normaliser == 4 * 8


def test_entropy_of_choices_is_a_mean_over_choices():
    logp, entropy = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    logp[:2, 0], entropy[0, 0], entropy[1, 0] = -0.5, 0.3, 0.5
    group = dataclasses.replace(random_group(0), position_logp=logp, position_entropy=entropy)
    assert plan([group]).statistics["position_entropy"] == pytest.approx(0.4)
    for others in (random_group(0), dataclasses.replace(group, position_logp=0 * logp)):
        assert "position_entropy" not in plan([others]).statistics


def test_groups_must_come_in_order():
    with pytest.raises(AssertionError, match="not ascending"):
        plan([random_group(1), random_group(0)])
