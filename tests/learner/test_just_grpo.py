"""JustGRPO: its views, its gradient against that of expected reward over all completions, its loss by hand, the fast
variant, what it reduces to, and which samplers it refuses."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law
from learner.objectives import make_objective, ratio
from learner.objectives.agrpo import Agrpo
from learner.objectives.base import UpdateContext
from learner.objectives.just_grpo import JustGrpo, least_confident
from learner.objectives.ratio import clipped_terms, k3
from learner.ranks.plan import plan_update
from learner.settings.methods.states import AgrpoConfig, JustGrpoConfig
from learner.settings.run import load_config
from rewards.errors import ConfigError, DataError
from rollout.trajectory import SamplerSpec
from tests.support.hand_made import make_group
from tests.support.one_step_tables import EOS, C, assert_layout_changes_nothing, build, scored
from tests.support.state_tables import STATE_TABLES, path_logp, state_logp, state_table, walked_group

CONTEXT = UpdateContext(3, 0, groups=1, eos_ids=(EOS,))
TOKENS = 3  # of the vocabulary that completions are enumerated over


def left_to_right(texts, **fields):
    return walked_group(texts, [list(range(C))] * len(texts), **fields)


def views_of(objective: JustGrpo, group, credit):
    return [unit[0] for unit in objective.wanted(0, group, np.asarray(credit, float), CONTEXT).units]


# ---- views and credit


def test_a_view_shows_what_stands_before_its_position_and_masks_the_rest():
    group = left_to_right([[2, 3], [4, 5, 6, 7], []], rewards=[0, 1, 1])
    views = views_of(JustGrpo(JustGrpoConfig()), group, [1, 0, -1])
    assert [(view.row, view.scored_n.tolist()) for view in views] == [(r, [j]) for r in (0, 2) for j in range(C)]
    for view in views:
        assert (view.hidden_C == (np.arange(C) >= view.scored_n[0])).all() and view.hidden_P is None
        assert view.step == view.scored_n[0] and view.weight == 1


def test_the_divisor_counts_completions_with_an_advantage_over_all_groups():
    groups = [left_to_right([[2], [3], [4]], rewards=r, group_id=i) for i, r in enumerate(([0, 1, 2], [1, 1, 1]))]
    objective = JustGrpo(JustGrpoConfig())
    plan = {"run_seed": 1, "update_index": 0, "eos_ids": (EOS,), "ranks": 2, "views_per_forward": 3}
    both = plan_update(groups, objective=objective, **plan)
    assert both.normaliser == C * 2 and both.statistics["views"] == 2 * C, "one of three is at the mean"
    np.testing.assert_allclose(both.credit[0], np.array([-1, 0, 1]) / (1 + 1e-4))
    silent = plan_update(groups[1:], objective=objective, **plan)
    assert silent.normaliser == 1 and not silent.statistics["views"] and not silent.credit[0].any()
    with pytest.raises(DataError, match="finite"):
        objective.credit([dataclasses.replace(groups[0], rewards=np.full((3, 1), np.nan, np.float32))])


def test_what_was_filled_is_not_scored():
    group = make_group(
        [[EOS, EOS, EOS, EOS], [2, 3, 4, 5]],
        [[0, 1, 2, 2], [0, 1, 2, 3]],
        steps=4,
        block_length=2,
        drawn=[[1, 1, 0, 0], [1, 1, 1, 1]],
    )
    found = {(v.row, int(v.scored_n[0])) for v in views_of(JustGrpo(JustGrpoConfig()), group, [1, -1])}
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)}


# ---- gradient


@pytest.fixture(scope="module")
def everything():
    """All completions over the first tokens of the vocabulary, and their rewards."""
    texts = [list(ids) for ids in itertools.product(range(TOKENS), repeat=C)]
    rewards = np.random.default_rng(4).integers(0, 9, len(texts)) / 8
    entropy = np.random.default_rng(5).random((len(texts), C))
    return left_to_right(texts, rewards=rewards, entropy=entropy)


def closed_table() -> torch.Tensor:
    """A table that gives the other tokens next to no probability."""
    table = state_table(gradient=False)
    table[..., TOKENS:] = -60.0
    return table.requires_grad_()


def estimate(objective: JustGrpo, theta: torch.Tensor, group) -> np.ndarray:
    """The gradient of all completions, each credited with its probability times its reward: what the loss' expected
    gradient is, without its divisor and with the reward for an advantage."""
    with torch.no_grad():
        full = build(
            JustGrpo(JustGrpoConfig()).wanted(0, group, np.ones(group.size), CONTEXT).units, [group], Law.DRAWN
        )
        law = state_logp(theta, full).reshape(group.size, C).sum(1).exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-9), "the path's law is one of completions"
    recorded = state_logp(theta, full).detach().numpy().reshape(group.size, C)
    group = dataclasses.replace(group, logp=recorded)
    credit = law.numpy() * group.rewards.sum(axis=1)
    batch = build(objective.wanted(0, group, credit, CONTEXT).units, [group], Law.DRAWN)
    logp_N = state_logp(theta, batch)
    loss, figures = objective.loss(PolicyScores(Scores(logp_N, torch.ones_like(logp_N))), batch)
    assert figures.values()["log_ratio/abs_max"] == 0
    return -torch.autograd.grad(loss, theta)[0].numpy()


def test_the_expected_gradient_is_that_of_expected_reward(everything):
    theta = closed_table()
    logp = torch.stack([path_logp(theta, everything, row).sum() for row in range(everything.size)])
    expected = (logp.exp() * torch.from_numpy(everything.rewards.sum(axis=1)).double()).sum()
    exact = torch.autograd.grad(expected, theta)[0].numpy()
    size = np.linalg.norm(exact)
    assert np.linalg.norm(estimate(JustGrpo(JustGrpoConfig()), theta, everything) - exact) < 1e-9 * size
    fast = estimate(JustGrpo(JustGrpoConfig(share=0.25)), theta, everything)
    assert np.linalg.norm(fast - exact) > 0.1 * size, "control: the fast variant is biased"


def test_loss_and_slopes_off_the_policy_by_hand():
    group, advantages = left_to_right([[2, 3], [4, 5, 6, 7]]), np.array([2.0, -1.0])
    theta, old, reference = state_table(), state_table(1, gradient=False), state_table(2, gradient=False)
    before = torch.stack([path_logp(old, group, row) for row in range(2)])
    group = dataclasses.replace(group, logp=before.numpy())
    objective = JustGrpo(JustGrpoConfig(clip_low=0.1, clip_high=0.15, beta=0.3))
    wanted = objective.wanted(0, group, advantages, CONTEXT)
    batch = build(wanted.units, [group], Law.DRAWN)
    loss, figures = objective.loss(scored(theta, batch, reference=reference, denoiser=STATE_TABLES), batch)
    (slope,) = torch.autograd.grad(loss / wanted.divisor, theta)
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for row, a in enumerate(advantages):
        new, ref = (path_logp(t, group, row) for t in (theta, reference))
        rho, d = (new - before[row]).exp(), ref - new
        expected = expected - torch.min(rho * a, rho.clamp(0.9, 1.15) * a).sum() + 0.3 * (d.exp() - d - 1).sum()
        clipped += int(((rho < 0.9) if a < 0 else (rho > 1.15)).sum())
    assert wanted.divisor == 2 * C and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(slope, torch.autograd.grad(expected / (2 * C), theta)[0], rtol=1e-10, atol=1e-15)
    shares = figures.values()
    assert 8 * (shares["clip_fraction/low"] + shares["clip_fraction/high"]) == pytest.approx(clipped) and clipped


MISTAKES: list[tuple[str, Callable]] = [
    ("k3", lambda logp, reference: k3(reference, logp)),
    ("clipped_terms", lambda *a, clip: clipped_terms(*a, clip=(1.0, 1e9))),
    ("clipped_terms", lambda ratio, a, clip: clipped_terms(ratio, -a, clip=clip)),
]


@pytest.mark.parametrize(("part", "mistake"), MISTAKES, ids=["k3 reversed", "no clip", "sign"])
def test_controls_a_mistake_in_the_loss_is_seen_by_hand(monkeypatch, part, mistake):
    monkeypatch.setattr(ratio, part, mistake)
    with pytest.raises(AssertionError):
        test_loss_and_slopes_off_the_policy_by_hand()


def test_it_is_agrpo_on_all_steps_of_a_rollout_from_left_to_right():
    """AGRPO's C steps of weight 1/C each, k = 1: the same views, and slopes that differ by the factor of the advantage
    and by the completions that are counted (here all), off the policy too."""
    group = left_to_right([[2, 3], [4, 5, 6, 7], []], rewards=[0, 1, 0.25])
    group = dataclasses.replace(group, logp=np.stack([path_logp(state_table(1), group, r).detach() for r in range(3)]))
    theta, slopes = state_table(), []
    ours, agrpo = JustGrpo(JustGrpoConfig()), Agrpo(AgrpoConfig(k=1))
    (credit,) = ours.credit([group])
    (plain,) = agrpo.credit([group])
    np.testing.assert_allclose(credit * (np.std([0, 1, 0.25], ddof=1) + 1e-4), plain, rtol=1e-12)
    units = ours.wanted(0, group, credit, CONTEXT).units
    for objective, weight, divisor in ((ours, 1.0, 3 * C), (agrpo, 1 / C, 3)):
        batch = build([(unit[0]._replace(weight=weight),) for unit in units], [group], Law.DRAWN)
        logp_N = state_logp(theta, batch)
        loss, _ = objective.loss(PolicyScores(Scores(logp_N, torch.ones_like(logp_N))), batch)
        slopes.append(torch.autograd.grad(loss / divisor, theta)[0])
    np.testing.assert_allclose(*slopes, rtol=1e-12, atol=1e-15)


# ---- the fast variant


@pytest.mark.parametrize(
    ("entropy", "drawn", "block", "per_block", "chosen"),
    [
        ([0.1, 0.9, 0.5, 0.2], [1, 1, 1, 1], 4, 1, [1]),
        ([0.1, 0.9, 0.5, 0.2], [1, 1, 1, 1], 4, 2, [1, 2]),
        ([0.1, 0.9, 0.5, 0.2], [1, 1, 1, 1], 2, 1, [1, 2]),
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], 4, 2, [0, 1]),
        ([0.1, 0.1, 0.5, 0.5], [1, 1, 1, 1], 2, 1, [0, 2]),
        ([0.1, 0.9, 0.0, 0.0], [1, 1, 0, 0], 2, 1, [1]),
        ([0.1, 0.9, 0.5, 0.2], [1, 1, 1, 1], 4, 4, [0, 1, 2, 3]),
    ],
)
def test_the_largest_entropies_of_each_block_are_scored_and_the_first_of_equals(
    entropy, drawn, block, per_block, chosen
):
    found = least_confident(np.array(entropy, np.float32), np.array(drawn, bool), block, per_block)
    assert found.tolist() == chosen


@pytest.mark.parametrize(
    ("share", "length", "block", "per_block"),
    [(1.0, 24, 24, 24), (0.25, 24, 12, 3), (0.25, 24, 6, 2), (0.01, 24, 8, 1), (0.1, 60, 30, 3), (0.25, 24, 1, 1)],
)
def test_the_fast_variant_scores_and_costs_its_share_of_each_block(share, length, block, per_block):
    config, sampler = JustGrpoConfig(share=share), SamplerSpec(length, block, length, "left_to_right", 1.0)
    assert config.scored_per_block(sampler) == per_block
    assert config.cost(sampler).views == per_block * length // block


def test_the_fast_variant_has_part_of_the_views_over_their_number():
    entropy = np.random.default_rng(0).random((2, C))
    group = left_to_right([[2, 3], [4, 5, 6, 7]], entropy=entropy, block_length=2)
    whole = {(v.row, v.step): v for v in views_of(JustGrpo(JustGrpoConfig()), group, [1, -1])}
    fast = JustGrpo(JustGrpoConfig(share=0.5)).wanted(0, group, np.array([1.0, -1.0]), CONTEXT)
    assert len(fast.units) == fast.divisor == 4
    for (view,) in fast.units:
        same = whole[view.row, view.step]
        assert (view.hidden_C == same.hidden_C).all() and view.scored_n == same.scored_n
        block = int(view.scored_n[0]) // 2 * 2
        assert entropy[view.row, view.scored_n[0]] == entropy[view.row, block : block + 2].max()


# ---- layout and settings


def layout_groups():
    rng = np.random.default_rng(0)
    return [
        left_to_right(
            [list(rng.integers(2, 9, rng.integers(1, 5))) for _ in range(4)],
            rewards=rng.integers(0, 3, 4) / 2,
            group_id=i,
            entropy=rng.random((4, C)),
            logp=-rng.random((4, C)),
        )
        for i in range(4)
    ]


@pytest.mark.parametrize(("ranks", "views_per_forward", "share"), [(1, 1, 1.0), (2, 5, 0.5), (3, 5, 1.0)])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward, share):
    objective = make_objective(JustGrpoConfig(share=share, beta=0.05))
    assert_layout_changes_nothing(objective, layout_groups(), ranks, views_per_forward, STATE_TABLES)


def test_what_is_scored_and_refused():
    needs = JustGrpo(JustGrpoConfig()).needs
    assert needs.law is Law.DRAWN and not needs.old and not needs.reference
    assert JustGrpo(JustGrpoConfig(beta=0.1)).needs.reference
    fine = SamplerSpec(24, 12, 24, "left_to_right", 1.0)
    assert not JustGrpoConfig().refuses(fine)
    for change, words in (
        ({"position_rule": "random"}, "position_rule=random doesn't; set it to left_to_right"),
        ({"steps": 8}, "steps=8 for 24 positions reveals more; set it to 24"),
        ({"threshold": 0.9}, "threshold (0.9)"),
        ({"temperature": 0.0}, "set it above 0"),
    ):
        (problem,) = JustGrpoConfig().refuses(dataclasses.replace(fine, **change))
        assert words in problem


def test_the_recipe_fits_and_another_ones_sampler_is_refused_before_anything_starts():
    assert load_config(["recipe=sudoku_just_grpo"]).objective.type == "just_grpo"
    with pytest.raises(ConfigError, match="left_to_right") as refused:
        load_config(["recipe=sudoku", "objective.type=just_grpo"])
    assert "set it to 24" in str(refused.value)
