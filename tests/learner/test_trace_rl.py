"""TraceRL: its views, its loss and gradient against closed forms, what it reduces to, and mistakes that the recorded
cases find."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, step_view
from learner.objectives import make_objective, trace_rl
from learner.objectives.agrpo import Agrpo
from learner.objectives.base import UpdateContext
from learner.objectives.ratio import clipped_terms, k3
from learner.objectives.trace_rl import TraceRl
from learner.settings.methods.states import AgrpoConfig, TraceRlConfig
from learner.verification.measurement import Meter
from learner.verification.methods import tracerl
from learner.verification.methods.case import read_method_case
from rewards.errors import DataError
from rollout.trajectory import SamplerSpec
from tests.support.hand_made import GOLDEN, make_group, random_group
from tests.support.one_step_tables import EOS, C, assert_layout_changes_nothing, build, scored
from tests.support.state_tables import STATE_TABLES, path_logp, state_logp, state_table, walked_group

CONTEXT = UpdateContext(3, 0, groups=1, eos_ids=(EOS,))


def walk(**fields):
    """Two tokens at each of two steps."""
    texts, orders = [[2, 3], [4, 5, 6, 7], [8]], [[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    return walked_group(texts, orders, steps=2, rewards=[0, 1, 1], **fields)


def views_of(objective: TraceRl, group, credit=None):
    (found,) = objective.credit([group]) if credit is None else (credit,)
    return [unit[0] for unit in objective.wanted(0, group, found, CONTEXT).units]


# ---- views and credit


@pytest.mark.parametrize("shrink", [1, 2, 3, 5, 8, 20])
def test_the_views_of_a_completion_score_each_drawn_token_once_from_the_state_before_it(shrink):
    group = random_group(0, size=5, length=16, per_step=2)
    views = views_of(TraceRl(TraceRlConfig(shrink=shrink)), group)
    assert len(views) == 5 * -(-8 // shrink) == 5 * TraceRlConfig(shrink=shrink).cost(group.sampler).views
    for row in range(5):
        own = [view for view in views if view.row == row]
        assert sorted(np.concatenate([view.scored_n for view in own])) == list(range(16))
        for number, view in enumerate(own):
            steps = group.unmask_step[row]
            np.testing.assert_array_equal(view.hidden_C, steps >= number * shrink)
            assert set(steps[view.scored_n] // shrink) == {number}
            assert view.hidden_P is None


def test_fillers_are_never_scored():
    group = make_group(
        [[EOS, EOS, EOS, EOS], [2, 3, 4, 5]],
        [[0, 1, 2, 2], [0, 1, 3, 2]],
        steps=4,
        block_length=2,
        drawn=[[1, 1, 0, 0], [1, 1, 1, 1]],
    )
    views = views_of(TraceRl(TraceRlConfig(shrink=2)), group)
    assert [(v.row, v.scored_n.tolist()) for v in views] == [(0, [0, 1]), (1, [0, 1]), (1, [2, 3])]


@pytest.mark.parametrize(
    ("eos_scored", "scores"), [(None, [4, 4, 4]), (0, [2, 4, 1]), (1, [3, 4, 2]), (2, [4, 4, 3]), (9, [4, 4, 4])]
)
def test_of_a_completions_eos_the_first_ones_are_scored(eos_scored, scores):
    views = views_of(TraceRl(TraceRlConfig(eos_scored=eos_scored)), walk())
    found = {row: [int(p) for v in views if v.row == row for p in v.scored_n] for row in range(3)}
    assert [len(found[row]) for row in range(3)] == scores
    assert all(sorted(found[row]) == list(range(scores[row])) for row in range(3)), "they stand at the end"


def test_the_advantage_is_over_the_deviation_of_the_whole_group():
    objective, group = TraceRl(TraceRlConfig()), walk()
    (credit,) = objective.credit([group])
    np.testing.assert_allclose(credit, (np.array([0, 1, 1]) - 2 / 3) / np.std([0, 1, 1]))
    assert credit.std() == pytest.approx(1)
    (none,) = objective.credit([dataclasses.replace(group, rewards=np.full((3, 1), 0.1, np.float32))])
    assert (none == 0).all()
    with pytest.raises(DataError, match="finite"):
        objective.credit([dataclasses.replace(group, rewards=np.full((3, 1), np.nan, np.float32))])


def test_rows_without_gradient_are_left_out_and_stay_in_the_divisor():
    group, credit = walk(), np.array([0.0, 1.0, -1.0])
    quiet, with_kl = (TraceRl(TraceRlConfig(shrink=1, beta=beta)) for beta in (0.0, 0.01))
    assert {view.row for view in views_of(quiet, group, credit)} == {1, 2}
    assert {view.row for view in views_of(with_kl, group, credit)} == {0, 1, 2}
    assert all(o.wanted(0, group, credit, CONTEXT).divisor == 6 for o in (quiet, with_kl))


# ---- loss and gradient


@pytest.mark.parametrize("kl", ["k3", "k1"])
def test_loss_and_slopes_off_the_policy_by_hand(kl):
    """Each view's own mean, the KL to the old policy as a sum, then the mean over views."""
    group, advantages = walk(), np.array([2.0, -1.0, 0.5])
    theta, old = state_table(), state_table(1, gradient=False)
    objective = TraceRl(TraceRlConfig(shrink=1, eos_scored=1, clip_low=0.1, clip_high=0.15, beta=0.3, kl=kl))
    wanted = objective.wanted(0, group, advantages, CONTEXT)
    batch = build(wanted.units, [group])
    loss, figures = objective.loss(scored(theta, batch, old=old, denoiser=STATE_TABLES), batch)
    (slope,) = torch.autograd.grad(loss / wanted.divisor, theta)
    expected, by_token, lengths = [], [], (3, 4, 2)
    for row, a in enumerate(advantages):
        new, before = (path_logp(t, group, row) for t in (theta, old))
        for step in (0, 1):
            at = [j for j in range(lengths[row]) if group.unmask_step[row, j] == step]
            if not at:
                continue
            d = before[at] - new[at]
            rho = (-d).exp()
            surrogate = -torch.min(rho * a, rho.clamp(0.9, 1.15) * a)
            penalty = 0.3 * (d.exp() - d - 1 if kl == "k3" else -d).sum()
            expected.append(surrogate.mean() + penalty)
            by_token.append(surrogate.sum() + penalty)
    assert wanted.divisor == len(expected) == 5
    assert loss.item() / 5 == pytest.approx(sum(expected).item() / 5, rel=1e-12)
    np.testing.assert_allclose(
        slope, torch.autograd.grad(sum(expected) / 5, theta, retain_graph=True)[0], rtol=1e-10, atol=1e-15
    )
    assert figures.values()["scored_tokens"] == 9 and "kl" in figures.values()
    (other,) = torch.autograd.grad(sum(by_token) / 9, theta)
    assert torch.linalg.norm(slope - other) > 0.05 * torch.linalg.norm(slope), "control: a mean over tokens is another"


def test_before_the_policy_has_moved_the_kl_has_no_gradient_with_k3_and_has_one_with_k1():
    group, theta, slopes = walk(), state_table(), {}
    for kl, beta in (("k3", 0.0), ("k3", 5.0), ("k1", 5.0)):
        objective = TraceRl(TraceRlConfig(shrink=1, beta=beta, kl=kl))
        batch = build([(view,) for view in views_of(objective, group)], [group])
        loss, _ = objective.loss(scored(theta, batch, denoiser=STATE_TABLES), batch)
        slopes[kl, beta] = torch.autograd.grad(loss, theta)[0]
    assert torch.equal(slopes["k3", 0.0], slopes["k3", 5.0])
    assert not torch.allclose(slopes["k3", 0.0], slopes["k1", 5.0], rtol=0.1), "control"


def test_with_shrink_1_it_is_agrpo_on_all_steps_up_to_the_stated_weights():
    """At temperature 1, on the policy: AGRPO's sum over the tokens of all T steps with weight 1/T each, k = 1 and G
    completions. TraceRL divides by a step's tokens (2) and by G T views, and its advantage by the group's deviation."""
    theta, group = state_table(), walk()
    ours = TraceRl(TraceRlConfig(shrink=1, beta=0))
    (credit,) = ours.credit([group])
    wanted = ours.wanted(0, group, credit, CONTEXT)
    batch = build(wanted.units, [group])
    loss, _ = ours.loss(scored(theta, batch, denoiser=STATE_TABLES), batch)
    (slope,) = torch.autograd.grad(loss / wanted.divisor, theta)

    agrpo = Agrpo(AgrpoConfig(k=1))
    logp = torch.stack([path_logp(theta, group, row) for row in range(3)]).detach().numpy()
    group = dataclasses.replace(group, logp=logp)
    (credit,) = agrpo.credit([group])
    units = [(step_view(group, 0, row, step, float(credit[row]), 1 / 2),) for row in range(3) for step in range(2)]
    states = build(units, [group], Law.DRAWN)
    logp_N = state_logp(theta, states)
    total, _ = agrpo.loss(PolicyScores(Scores(logp_N, torch.ones_like(logp_N))), states)
    (theirs,) = torch.autograd.grad(total / agrpo.wanted(0, group, credit, CONTEXT).divisor, theta)
    np.testing.assert_allclose(2 * np.std([0, 1, 1]) * slope, theirs, rtol=1e-5, atol=1e-9)

    merged = TraceRl(TraceRlConfig(shrink=2, beta=0))
    batch = build([(view,) for view in views_of(merged, group)], [group])
    loss, _ = merged.loss(scored(theta, batch, denoiser=STATE_TABLES), batch)
    (biased,) = torch.autograd.grad(4 * np.std([0, 1, 1]) * loss / 3, theta)
    assert np.linalg.norm(biased - theirs) > 0.3 * np.linalg.norm(theirs), "control: merged steps aren't"


def test_all_steps_in_one_view_are_one_step_likelihood_over_a_clean_prompt():
    (first, *_) = views_of(TraceRl(TraceRlConfig(shrink=2)), walk())
    assert first.hidden_C.all() and first.scored_n.tolist() == [0, 1, 2, 3] and first.hidden_P is None


# ---- layout and settings


def layout_groups():
    rng = np.random.default_rng(0)
    found = []
    for i in range(4):
        texts = [list(rng.integers(2, 9, rng.integers(1, 5))) for _ in range(4)]
        orders = [rng.permutation(C) // 2 for _ in range(4)]
        found.append(walked_group(texts, orders, steps=2, rewards=rng.integers(0, 3, 4) / 2, group_id=i))
    return found


@pytest.mark.parametrize(("ranks", "views_per_forward"), [(1, 1), (2, 5), (3, 5)])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward):
    objective = make_objective(TraceRlConfig(shrink=1, eos_scored=1, beta=0.05))
    assert_layout_changes_nothing(objective, layout_groups(), ranks, views_per_forward, STATE_TABLES)


def test_what_is_scored_and_refused():
    assert TraceRl(TraceRlConfig()).needs.old and not TraceRl(TraceRlConfig()).needs.reference
    sampler = SamplerSpec(24, 24, 8, "random", 1.0, threshold=0.9)
    assert TraceRlConfig().refuses(dataclasses.replace(sampler, threshold=None)) == []
    (problem,) = TraceRlConfig().refuses(sampler)
    assert "threshold (0.9)" in problem and "sample without one" in problem


# ---- recorded cases


MISTAKES: list[tuple[str, Callable]] = [
    ("k3", lambda logp, old: k3(old, logp)),
    ("clipped_terms", lambda *a, clip: clipped_terms(*a, clip=(1.0, 1e9))),
    ("clipped_terms", lambda ratio, a, clip: clipped_terms(ratio, -a, clip=clip)),
]


@pytest.mark.parametrize(("part", "mistake"), MISTAKES, ids=["k3 reversed", "no clip", "sign"])
def test_controls_a_mistake_in_the_loss_fails_the_recorded_case(monkeypatch, part, mistake):
    monkeypatch.setattr(trace_rl, part, mistake)
    found = tracerl.check(read_method_case(GOLDEN / "methods" / "tracerl", "07_llada_shrink3"), Meter("cpu", "float32"))
    assert {"loss", "gradient of the loss"} <= {m.quantity for m in found if not m.passed}
