"""RSPO: its gradient against the squared residual that it stands for, its centring, its draws and its limits."""

import dataclasses

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores
from learner.objectives.base import Weighed
from learner.objectives.rspo import Rspo
from learner.ranks.plan import plan_update
from learner.settings.methods.bounds import RspoConfig
from tests.support.hand_made import make_group
from tests.support.unit_scores import EOS, build, context, measured_sums, scored, state_table, table_logp

C = 4


def group_of(rewards, group_id: int = 0):
    ids = np.random.default_rng(group_id).integers(1, 9, (len(rewards), C))
    return make_group(
        ids, np.zeros_like(ids), steps=1, rewards=np.array(rewards, np.float32)[:, None], group_id=group_id
    )


GROUPS = [group_of([0.0, 1.0, 0.3, 0.2]), group_of([1.0, 0.0, 0.0], group_id=1)]


def update(objective: Rspo, groups, theta: torch.Tensor, reference: torch.Tensor, credit=None) -> torch.Tensor:
    """The loss of an update of a table, through measurement, plan and batches; ``credit`` in place of what it finds."""
    found = objective.weigh(groups, objective.credit(groups), measured_sums(objective, groups, theta, reference))
    if credit is not None:
        found = found._replace(by_group=credit)
    plan = plan_update(
        groups,
        objective=objective,
        run_seed=3,
        update_index=0,
        eos_ids=(EOS,),
        ranks=2,
        views_per_forward=3,
        final=found,
    )
    total = torch.zeros((), dtype=torch.float64)
    for forward in (forward for rank in plan.forwards for forward in rank):
        batch = build(forward.units, groups)
        total = total + objective.loss(scored(table_logp(theta, batch)), batch)[0] / plan.normaliser
    return total


def gradient(value: torch.Tensor, theta: torch.Tensor) -> np.ndarray:
    return torch.autograd.grad(value, theta)[0].numpy()


def distances(objective: Rspo, groups, theta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """d of every completion, with its gradient."""
    found = []
    for index, group in enumerate(groups):
        for unit in objective.measured(index, group, context()):
            batch = build([unit], groups)
            difference_N = table_logp(theta, batch) - table_logp(reference, batch).detach()
            found.append((torch.from_numpy(batch.weight) * difference_N).sum())
    return torch.stack(found)


def stated(objective: Rspo, groups, theta, reference, *, centre: str = "update") -> torch.Tensor:
    """lam times the mean of half the squared residual."""
    d_S = distances(objective, groups, theta, reference)
    if centre == "update":
        dhat_S = d_S - d_S.mean()
    else:
        parts = d_S.split([group.size for group in groups])
        dhat_S = torch.cat([part - part.mean() for part in parts])
    advantage_S = torch.from_numpy(np.concatenate(objective.credit(groups)))
    lam = objective.config.lam
    return lam * (dhat_S - advantage_S / lam).square().mean() / 2


@pytest.mark.parametrize("lam", [0.01, 3.0])
def test_the_gradient_is_that_of_the_squared_residual(lam):
    objective, theta, reference = Rspo(RspoConfig(lam=lam)), state_table(C), state_table(C, seed=1)
    assert isinstance(objective, Weighed) and objective.measures_each_update
    found = gradient(update(objective, GROUPS, theta, reference), theta)
    exact = gradient(stated(objective, GROUPS, theta, reference), theta)
    np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-14)
    blind = gradient(update(objective, GROUPS, theta, reference, objective.credit(GROUPS)), theta)
    assert abs(blind - exact).max() > 1e-3 * abs(exact).max(), "control: without the distance it is another"


def test_control_centring_over_a_part_of_the_update_has_another_gradient():
    objective, theta, reference = Rspo(RspoConfig(lam=3.0)), state_table(C), state_table(C, seed=1)
    found = gradient(update(objective, GROUPS, theta, reference), theta)
    per_group = gradient(stated(objective, GROUPS, theta, reference, centre="group"), theta)
    assert abs(found - per_group).max() > 0.01 * abs(found).max()


def test_a_constant_in_every_score_of_the_base_changes_nothing():
    objective, theta, reference = Rspo(RspoConfig(lam=1.0)), state_table(C), state_table(C, seed=1)
    sums, credit = measured_sums(objective, GROUPS, theta, reference), objective.credit(GROUPS)
    weights = objective.weigh(GROUPS, credit, sums).by_group
    moved = sums._replace(reference=tuple(s_G + 7 for s_G in sums.reference))
    for ours, theirs in zip(weights, objective.weigh(GROUPS, credit, moved).by_group, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    one = sums._replace(reference=(sums.reference[0] + 7, sums.reference[1]))
    assert abs(objective.weigh(GROUPS, credit, one).by_group[0] - weights[0]).min() > 1, "control: in some only"


def test_equal_rewards_draw_the_policy_back_to_the_base():
    groups, reference = [group_of([1.0] * 5)], state_table(C, seed=1)

    def spread_after(lam: float) -> tuple[float, float]:
        objective, theta = Rspo(RspoConfig(lam=lam)), state_table(C).detach().requires_grad_()
        before = distances(objective, groups, theta, reference).std()
        for _ in range(200):
            theta = (theta - 8 * torch.autograd.grad(update(objective, groups, theta, reference), theta)[0]).detach()
            theta.requires_grad_()
        return before.item(), distances(objective, groups, theta, reference).std().item()

    before, after = spread_after(1.0)
    assert after < 0.01 * before
    assert len(set(spread_after(0.0))) == 1, "control: without lam nothing pulls"


def test_without_lam_it_is_the_likelihood_weighted_by_z_scores():
    objective, theta, reference = Rspo(RspoConfig(lam=0.0)), state_table(C), state_table(C, seed=1)
    advantage_S = np.concatenate(objective.credit(GROUPS))
    for group, credit_G in zip(GROUPS, objective.credit(GROUPS), strict=True):
        rewards_G = group.rewards[:, 0].astype(float)
        np.testing.assert_allclose(credit_G, (rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + 1e-4))
    plain = -(torch.from_numpy(advantage_S) * distances(objective, GROUPS, theta, reference)).mean()
    found = gradient(update(objective, GROUPS, theta, reference), theta)
    np.testing.assert_allclose(found, gradient(plain, theta), rtol=1e-10, atol=1e-14)


def test_what_is_measured_is_what_is_scored_and_each_update_has_masks_of_its_own():
    objective, (group, _) = Rspo(RspoConfig()), GROUPS
    (credit, _) = objective.credit(GROUPS)

    def inputs(units) -> set[tuple]:
        return {(view.row, view.hidden_C.tobytes(), view.weight) for unit in units for view in unit}

    measured = inputs(objective.measured(0, group, context()))
    wanted = objective.wanted(0, group, credit, context())
    assert inputs(wanted.units) == measured and wanted.divisor == group.size
    assert inputs(objective.measured(0, group, context(update_index=1))) != measured
    silent = np.where(np.arange(group.size) == 1, 0.0, 1.0)
    left = objective.wanted(0, group, silent, context())
    assert inputs(left.units) == {view for view in measured if view[0] != 1}, "rows without a weight are left out"
    assert left.divisor == group.size


def test_figures_say_how_far_policy_and_base_are_apart():
    objective, theta, reference = Rspo(RspoConfig(lam=5.0)), state_table(C), state_table(C, seed=1)
    credit, sums = objective.credit(GROUPS), measured_sums(objective, GROUPS, theta, reference)
    figures = objective.weigh(GROUPS, credit, sums).statistics.values()
    d_S = distances(objective, GROUPS, theta, reference).detach().numpy()
    dhat_S, advantage_S = d_S - d_S.mean(), np.concatenate(credit)
    assert figures["log_ratio/reference"] == pytest.approx(d_S.mean())
    assert figures["log_ratio/centred"] == pytest.approx(d_S.std())
    assert figures["residual"] == pytest.approx(np.sqrt(np.mean((advantage_S - 5 * dhat_S) ** 2)))
    past = (5 * dhat_S / advantage_S) > 1
    assert figures["residual/overshot_share"] == pytest.approx(past.mean()) and 0 < past.mean() < 1


def test_cost_counts_what_is_measured_before_every_update():
    cost = RspoConfig(samples=3).cost(GROUPS[0].sampler)
    assert (cost.views, cost.measured, cost.measured_each_update, cost.old, cost.reference) == (
        3,
        3,
        True,
        False,
        False,
    )
    assert not RspoConfig().refuses(GROUPS[0].sampler)
    assert RspoConfig().refuses(dataclasses.replace(GROUPS[0].sampler, temperature=0.0))


def test_the_loss_needs_the_policy_alone():
    objective, theta = Rspo(RspoConfig()), state_table(C)
    batch = build(objective.wanted(0, GROUPS[0], objective.credit(GROUPS)[0], context()).units, GROUPS)
    whole, figures = objective.loss(PolicyScores(scored(table_logp(theta, batch)).policy), batch)
    assert whole.requires_grad and figures.values()["scored_tokens"] == batch.targets.size
