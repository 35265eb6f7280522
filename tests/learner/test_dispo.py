"""DiSPO: its settings, views and draws, the loss of fills by hand, its sum with the base's, and the factor (Z-1)/Z of
its gradient by enumeration."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law
from learner.objectives import make_objective
from learner.objectives.base import UpdateContext
from learner.objectives.dispo import Dispo, fill_advantages
from learner.ranks.plan import plan_update
from learner.settings.methods.branches import DispoConfig
from learner.settings.methods.one_step import DiffuGrpoConfig, Wd1Config
from learner.settings.run import load_config
from rewards.errors import ConfigError, DataError
from rollout.trajectory import DrawnBranches, SamplerSpec, TrajectoryGroup
from tests.support.one_step_tables import EOS, MASK, C, P, V, build, planned_gradient, scored
from tests.support.state_tables import STATE_TABLES, state_logp, state_table, walked_group

CONTEXT = UpdateContext(3, 0, groups=1, eos_ids=(EOS,))
ORDERS = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]
TEXTS = [[2, 3], [4, 5, 6, 7], [8], [2, 3, 4]]


def with_fills(group: TrajectoryGroup, steps: Any, fills_GZC: Any, rewards_GZ: Any) -> TrajectoryGroup:
    """Drawn branches; ``fills_GZC`` are laid under what was revealed before the step, -1 for none."""
    step_G1 = np.asarray(steps, np.int16)[:, None]
    fills, (G, Z) = np.asarray(fills_GZC, np.int32), np.shape(rewards_GZ)
    hidden_G1C = (group.unmask_step >= step_G1)[:, None] & (step_G1 >= 0)[:, None]
    ids_GZC = np.where(hidden_G1C, fills, group.completion_ids[:, None]) * (step_G1 >= 0)[:, None]
    rewards = np.zeros((G, 1, Z, len(group.reward_names)), np.float32)
    rewards[:, 0, :, 0] = np.asarray(rewards_GZ) * (step_G1 >= 0)
    branched = dataclasses.replace(
        group,
        branch_step=step_G1,
        branch_ids=ids_GZC[:, None].astype(np.int32),
        branch_logp=np.where(np.broadcast_to(hidden_G1C, ids_GZC.shape), -1.0, 0.0).astype(np.float32)[:, None],
        branch_rewards=rewards,
        branch_correct=np.zeros((G, 1, Z), bool),
    )
    branched.validate()
    return branched


def batch_groups(count: int = 3, Z: int = 2) -> list[TrajectoryGroup]:
    """Groups of four with states before several steps, one completion without."""
    groups = []
    for i in range(count):
        rng = np.random.default_rng([7, i])
        group = walked_group(TEXTS, ORDERS, rewards=[0, 1, 0.5, 2] if i != 1 else [1] * 4, group_id=i)
        fills, rewards = rng.integers(2, 9, (4, Z, C)), rng.integers(0, 5, (4, Z)) / 4
        groups.append(with_fills(group, [1, 3, 2, -1], fills, rewards))
    return groups


# ---- settings


def test_the_base_is_a_section_of_its_own() -> None:
    assert isinstance(load_config(["objective.type=dispo"]).objective, DispoConfig)
    config = load_config(["objective.base.type=wd1", "objective.base.psi=2", "objective.type=dispo"]).objective
    assert isinstance(config, DispoConfig) and config.base == Wd1Config(psi=2)
    assert load_config(["objective.type=dispo", "objective.base.beta=0"]).objective.base == DiffuGrpoConfig(beta=0)
    for argument, sentence in {
        "objective.base.type=agrpo": 'objective.base.type="agrpo" must be',
        "objective.base.psi=2": "objective.base.psi is no setting of objective.base.type=diffu_grpo",
        "objective.samples=1": "objective.samples=1 must be a number of at least 2",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            load_config(["objective.type=dispo", argument])
    with pytest.raises(ConfigError, match=r"objective\.base\.masking=all .* objective\.base\.samples=2"):
        load_config(["objective.type=dispo", "objective.base.type=spg", "objective.base.masking=all"])


def test_what_it_wants_of_the_rollout_and_what_it_costs() -> None:
    sampler = SamplerSpec(24, 24, 8, "random", 1.0)
    config = DispoConfig(samples=3, prompt_masks=2)
    assert config.branches(sampler) == DrawnBranches(3, 4.0)
    cost = config.cost(sampler)
    assert (cost.views, cost.old, cost.reference) == (3, True, True)
    assert cost.views * cost.scored == pytest.approx(24 + 2 * 3 * 24 / 6)
    assert not DispoConfig(beta=0, base=Wd1Config()).cost(sampler).reference


# ---- credit, views and draws


def test_fills_are_credited_against_those_of_their_state() -> None:
    (group,) = batch_groups(1)
    (credit,) = Dispo(DispoConfig()).credit([group])
    (base,) = make_objective(DiffuGrpoConfig()).credit([group])
    assert credit.shape == (4, 3) and (credit[:, 0] == base).all()
    R = group.branch_rewards[:, 0, :, 0]
    np.testing.assert_allclose(credit[:, 1:], R - R.mean(axis=1, keepdims=True), atol=1e-12)
    assert (credit[3, 1:] == 0).all()
    rewards = group.branch_rewards.copy()
    rewards[0] = 0.1
    assert (fill_advantages(dataclasses.replace(group, branch_rewards=rewards))[0] == 0).all()
    rewards[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="nan"):
        fill_advantages(dataclasses.replace(group, branch_rewards=rewards))


def test_a_state_is_one_view_that_scores_every_fill() -> None:
    (group,) = batch_groups(1)
    objective = Dispo(DispoConfig(prompt_masks=2, prompt_mask=0.5, alpha=0.3))
    (credit,) = objective.credit([group])
    wanted = objective.wanted(0, group, credit, CONTEXT)
    plain = make_objective(DiffuGrpoConfig()).wanted(0, group, credit[:, 0], CONTEXT)
    assert len(wanted.units) == len(plain.units) and wanted.divisor == plain.divisor
    for (ours,), (theirs,) in zip(wanted.units, plain.units, strict=True):
        assert (ours.hidden_P == theirs.hidden_P).all(), "the base draws as it does alone"
    assert wanted.added is not None and wanted.added.divisor == 4
    assert [unit[0].row for unit in wanted.added.units] == [0, 1, 2]
    hidden_GNP = objective.draw(group, CONTEXT)
    for unit in wanted.added.units:
        assert len(unit) == 2
        batch = build([unit], [group])
        for n, view in enumerate(unit):
            row, step = view.row, int(group.branch_step[view.row, 0])
            masked = np.flatnonzero(group.unmask_step[row] >= step)
            assert (view.hidden_P == hidden_GNP[row, n]).all() and view.weight == 0.3 / 2 and view.part == 1
            at = batch.view_of_score == n
            assert batch.position[at].tolist() == [*masked, *masked]
            assert batch.targets[at].tolist() == group.branch_ids[row, 0][:, masked].ravel().tolist()
            assert batch.credit[at].tolist() == np.repeat(credit[row, 1:], masked.size).tolist()
            shown = batch.input_ids[n, -C:]
            assert (shown[masked] == MASK).all()
            others = np.setdiff1d(np.arange(C), masked)
            assert (shown[others] == group.completion_ids[row, others]).all()
        assert batch.logp is None, "the surrogate's prompt is masked: nothing recorded is of it"
    quiet = Dispo(DispoConfig(beta=0)).wanted(0, group, np.zeros_like(credit), CONTEXT)
    assert quiet.added is not None and not quiet.added.units and quiet.added.divisor == 4


def test_prompt_masks_are_those_of_a_stream_of_their_own() -> None:
    (group,) = batch_groups(1)
    objective = Dispo(DispoConfig(prompt_masks=3, prompt_mask=0.3))
    draws = np.array([objective.draw(group, UpdateContext(seed, 0, 1, (EOS,))) for seed in range(1500)])
    assert draws.shape == (1500, 4, 3, P)
    assert abs(draws.mean(axis=0) - 0.3).max() < 4.5 * np.sqrt(0.3 * 0.7 / 1500)
    assert abs(np.corrcoef(draws.reshape(1500, -1).T) - np.eye(12 * P)).max() < 0.15
    again = objective.draw(group, UpdateContext(0, 1, 1, (EOS,)))
    assert not (again == draws[0]).all(), "fresh in every update"


# ---- the loss


def test_the_loss_of_fills_by_hand() -> None:
    (group,) = batch_groups(1, Z=3)
    config = DispoConfig(samples=3, prompt_masks=2, prompt_mask=0.5, clip_low=0.2, clip_high=0.3, beta=0.2)
    objective = Dispo(config)
    (credit,) = objective.credit([group])
    wanted = objective.wanted(0, group, credit, CONTEXT)
    assert wanted.added is not None
    units, hidden_GNP = wanted.added.units, objective.draw(group, CONTEXT)
    theta, old, reference = (state_table(seed, gradient=seed == 0) for seed in range(3))
    batch = build(units, [group])
    found = scored(theta, batch, old=old, reference=reference, denoiser=STATE_TABLES)
    loss, figures = objective.loss(found, batch)
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for row in range(3):
        masked = np.flatnonzero(group.unmask_step[row] >= group.branch_step[row, 0])
        shown = [MASK if i in masked else int(group.completion_ids[row, i]) for i in range(C)]
        for z in range(3):
            logp, kl = [0.0, 0.0], 0.0
            for n in range(2):
                state = int(hidden_GNP[row, n] @ 2 ** np.arange(P))
                state += 2**P * sum(token * (V + 1) ** i for i, token in enumerate(shown))
                for j in masked:
                    token = int(group.branch_ids[row, 0, z, j])
                    new, before, ref = (t[state % len(t), j].log_softmax(-1)[token] for t in (theta, old, reference))
                    logp[0], logp[1] = logp[0] + new / 2, logp[1] + before / 2
                    kl = kl + ((ref - new).exp() - (ref - new) - 1) / 2
            rho, a = (logp[0] - logp[1]).exp(), credit[row, 1 + z]
            expected = expected + 0.5 / 3 * (-torch.min(rho * a, rho.clamp(0.8, 1.3) * a) + 0.2 * kl)
            clipped += int((rho < 0.8 and a < 0) or (rho > 1.3 and a > 0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and clipped > 0
    slopes = (torch.autograd.grad(value, theta, retain_graph=True)[0] for value in (loss, expected))
    np.testing.assert_allclose(*slopes, atol=1e-12)
    assert figures.values()["scored_fills"] == 9


@pytest.mark.parametrize(
    "base",
    [
        {"type": "diffu_grpo"},
        {"type": "diffu_grpo", "average": "token"},
        {"type": "spg", "samples": 1},
        {"type": "wd1", "softmax_over": "batch"},
        {"type": "espo"},
    ],
    ids=str,
)
def test_the_gradient_is_the_base_s_and_alpha_times_that_of_fills(base: dict[str, Any]) -> None:
    """Whatever the base divides by."""
    groups = batch_groups()
    layout: dict[str, Any] = {"ranks": 1, "views_per_forward": 99, "denoiser": STATE_TABLES}
    config = DispoConfig.model_validate({"base": base, "alpha": 0.7, "prompt_masks": 2})
    both, figures = planned_gradient(Dispo(config), groups, **layout)
    alone, base_figures = planned_gradient(make_objective(config.base), groups, **layout)
    step = step_gradient(config, groups)
    assert np.linalg.norm(step) > 1e-3 and np.linalg.norm(alone) > 1e-3
    error = np.linalg.norm(both - alone - 0.7 * step) / np.linalg.norm(both)
    assert error < 1e-6, "measured: 1e-15"
    assert np.linalg.norm(both - alone - 0.5 * step) / np.linalg.norm(both) > 1e-3, "control: another alpha"
    assert base_figures.keys() <= figures.keys() and figures["scored_fills"] == 18
    plan = plan_update(
        groups, objective=Dispo(config), run_seed=1, update_index=1, eos_ids=(EOS,), ranks=1, views_per_forward=99
    )
    lengths = sum(float(text_lengths(group, (EOS,)).sum()) for group in groups)
    assert plan.normaliser in (1, 12, lengths), "the base's"


def step_gradient(config: DispoConfig, groups: list[TrajectoryGroup]) -> np.ndarray:
    """Of L_step alone, with the same draws and tables as ``planned_gradient``."""
    objective, context = Dispo(config.model_copy(update={"alpha": 1.0})), UpdateContext(1, 1, len(groups), (EOS,))
    theta, old, reference = (state_table(seed, gradient=seed == 0) for seed in range(3))
    for index, (group, credit) in enumerate(zip(groups, objective.credit(groups), strict=True)):
        added = objective.wanted(index, group, credit, context).added
        assert added is not None
        batch = build(added.units, groups)
        found = scored(theta, batch, old=old, reference=reference, denoiser=STATE_TABLES)
        (objective.fill_loss(found, batch)[0] / sum(each.size for each in groups)).backward()
    assert theta.grad is not None
    return theta.grad.numpy()


def test_the_gradient_does_not_depend_on_ranks_and_forwards() -> None:
    groups, objective = batch_groups(), Dispo(DispoConfig(prompt_masks=2))
    whole, figures = planned_gradient(objective, groups, ranks=1, views_per_forward=99, denoiser=STATE_TABLES)
    for ranks, views, backwards in ((1, 1, False), (2, 3, True), (3, 2, False)):
        layout: dict[str, Any] = {"ranks": ranks, "views_per_forward": views, "backwards": backwards}
        cut, same = planned_gradient(objective, groups, denoiser=STATE_TABLES, **layout)
        np.testing.assert_allclose(cut, whole, atol=1e-12)
        assert same == pytest.approx(figures)
    wrong, _ = planned_gradient(
        objective, groups, ranks=2, views_per_forward=3, per_forward=True, denoiser=STATE_TABLES
    )
    assert abs(wrong - whole).max() > 1e-3, "control: divided by what is in a forward"


# ---- the gradient that the method states


@pytest.mark.parametrize("Z", [2, 3])
def test_at_a_fixed_state_it_is_the_gradient_of_a_fill_s_reward_but_for_one_of_z(Z: int) -> None:
    """Two masked positions, three tokens, every Z-tuple of fills by its probability."""
    tokens, group = (2, 3, 4), walked_group([[2, 3, 4, 5]], [[0, 1, 2, 3]], rewards=[1])
    fills = list(itertools.product(tokens, repeat=2))
    rng = np.random.default_rng(5)
    reward = dict(zip(fills, rng.integers(0, 9, len(fills)) / 8, strict=True))
    objective = Dispo(DispoConfig(samples=Z, prompt_mask=0, alpha=1, beta=0, base=DiffuGrpoConfig(beta=0)))
    theta = state_table()
    with torch.no_grad():  # nothing but these tokens can be drawn
        theta[:, :, [v for v in range(V) if v not in tokens]] = -1e9
    state = 2**P * sum(token * (V + 1) ** i for i, token in enumerate([2, 3, MASK, MASK]))
    state %= len(theta)
    logp_2V = theta[state, 2:].log_softmax(-1)
    chance = {fill: (logp_2V[0, fill[0]] + logp_2V[1, fill[1]]).exp() for fill in fills}
    (exact,) = torch.autograd.grad(sum(chance[fill] * reward[fill] for fill in fills), theta, retain_graph=True)
    total = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(fills, repeat=Z):
        ids = [[[0, 0, *fill] for fill in drawn]]
        branched = with_fills(group, [2], ids, [[reward[fill] for fill in drawn]])
        (credit,) = objective.credit([branched])
        wanted = objective.wanted(0, branched, credit, CONTEXT)
        assert not wanted.units and wanted.added is not None
        if not wanted.added.units:
            continue
        batch = build(wanted.added.units, [branched])
        logp_N = state_logp(theta, batch)
        scores = PolicyScores(found := Scores(logp_N, torch.ones_like(logp_N)), found.detached())
        weight = torch.stack([chance[fill] for fill in drawn]).prod().detach()
        total = total + weight * objective.loss(scores, batch)[0] / wanted.added.divisor
    (ours,) = torch.autograd.grad(-total, theta)
    np.testing.assert_allclose(ours, (Z - 1) / Z * exact, atol=1e-9)
    assert exact.abs().max() > 0.01 and abs(ours - exact).max() > 1e-3, "control: without the factor"


def test_laws_other_than_the_raw_one_have_no_fills() -> None:
    (group,) = batch_groups(1)
    objective = Dispo(DispoConfig())
    (credit,) = objective.credit([group])
    added = objective.wanted(0, group, credit, CONTEXT).added
    assert added is not None
    with pytest.raises(AssertionError, match="recorded states only"):
        build(added.units, [group], Law.DRAWN)
