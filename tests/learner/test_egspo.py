"""EGSPO and EGSPO-SA: steps, credit and views, the loss by hand, the stated gradient by enumeration, what it reduces
to, and mistakes that the recorded cases find."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, build_batch
from learner.objectives import egspo
from learner.objectives.advantages import leave_one_out_advantages
from learner.objectives.egspo import Egspo, whole_kl
from learner.objectives.ratio import clipped_terms, k3
from learner.settings.methods.branches import EgspoConfig
from learner.verification.enumeration import (
    BLOCKS,
    EOS,
    RANDOM_ORDER,
    RETIRING,
    SMALLEST,
    TWO_TOKENS_A_STEP,
    Toy,
    exact_gradient,
    relative_error,
)
from learner.verification.measurement import Meter
from learner.verification.methods import egspo as recorded
from learner.verification.methods.case import read_method_case
from rewards.errors import DataError
from rollout.sampling.branches import highest_entropy_steps
from rollout.trajectory import GreedyBranches, SamplerSpec
from tests.support.branched_tables import CONTEXT, by_entropy, mean_gradient, with_branches
from tests.support.hand_made import GOLDEN, random_group
from tests.support.one_step_tables import EOS as EOS_C
from tests.support.one_step_tables import planned_gradient
from tests.support.state_tables import STATE_TABLES, walked_group

# ---- steps, credit and views


def test_only_sa_branches() -> None:
    sampler = SamplerSpec(8, 8, 4, "random", 1.0)
    assert EgspoConfig(k=3, lam=0).branches(sampler) is None
    assert EgspoConfig(k=3).branches(sampler) == GreedyBranches(3)
    assert EgspoConfig(k=3, step_range="until_last_token").branches(sampler) == GreedyBranches(3, True)
    assert not EgspoConfig(k=4).refuses(sampler)
    (problem,) = EgspoConfig(k=5).refuses(sampler)
    assert "objective.k=5" in problem and "rollout.sampler.steps=4" in problem


def test_egspo_takes_the_steps_that_sa_branches() -> None:
    group = random_group(3, size=5, length=8, per_step=2)
    plain = Egspo(EgspoConfig(k=3, lam=0, beta=0))
    steps_GS = plain.steps(group, (EOS,))
    last_G = np.full(5, 3)
    expected = highest_entropy_steps(group.unmask_step, group.drawn, group.entropy, states=3, last_G=last_G)
    assert (steps_GS == expected).all()
    branched = with_branches(group, steps_GS, np.zeros((5, 3)))
    assert (Egspo(EgspoConfig(k=3)).steps(branched, (EOS,)) == steps_GS).all()
    (credit_G,) = plain.credit([group])
    wanted = plain.wanted(0, group, credit_G, CONTEXT)
    live = [row for row in range(5) if credit_G[row]]
    found = [(view.row, view.step, view.credit, view.weight) for (view,) in wanted.units]
    assert found == [(row, int(step), credit_G[row], 1.0) for row in live for step in steps_GS[row]]
    assert wanted.divisor == 5 * 3 * 2, "completions, steps, tokens of a step"
    assert Egspo(EgspoConfig(k=3, lam=0, aggregate="mean")).wanted(0, group, credit_G, CONTEXT).divisor == 5 * 3
    assert len(Egspo(EgspoConfig(k=3, lam=0)).wanted(0, group, credit_G, CONTEXT).units) == 15, "a KL holds for all"


def test_advantages_are_centred_at_equal_rank() -> None:
    group = with_branches(random_group(0, size=3), [[0, 2], [1, 3], [3, -1]], [[1.0, 0.5], [0.0, 2.0], [0.5, 9.0]])
    group = dataclasses.replace(group, rewards=np.array([[1, 0], [2, 1], [0.5, 0]], np.float32))
    R = np.array([1.0, 3.0, 0.5])
    for lam, divisor, normalise in ((0.5, 1.5, True), (0.5, 1.0, False), (2.0, 3.0, True)):
        (credit_GS,) = Egspo(EgspoConfig(k=2, lam=lam, normalise=normalise)).credit([group])
        first = (R + lam * (R - [1.0, 0.0, 0.5])) / divisor
        second = (R[:2] + lam * (R[:2] - [0.5, 2.0])) / divisor
        np.testing.assert_allclose(credit_GS[:, 0], first - first.mean(), atol=1e-12)
        np.testing.assert_allclose(credit_GS[:2, 1], second - second.mean(), atol=1e-12)
        assert credit_GS[2, 1] == 0, "no step of that rank"
    (credit_GS,) = Egspo(EgspoConfig(k=2, centre="reward")).credit([group])
    np.testing.assert_allclose(credit_GS[:, 0], (R - R.mean() + 0.5 * (R - [1.0, 0.0, 0.5])) / 1.5, atol=1e-12)
    (alone,) = Egspo(EgspoConfig(k=2, step_reward=group.reward_names[1])).credit([group])
    returns = (R + 0.5 * R) / 1.5
    np.testing.assert_allclose(alone[:, 0], returns - returns.mean(), atol=1e-12)
    wanted = Egspo(EgspoConfig(k=2)).wanted(0, group, credit_GS, CONTEXT)
    assert wanted.statistics.totals["missing_steps"] == 1 and len(wanted.units) == 5
    with pytest.raises(DataError, match=r"objective\.step_reward=odd .* part0, part1"):
        Egspo(EgspoConfig(k=2, step_reward="odd")).credit([group])


def test_a_group_without_signal_has_none() -> None:
    group = random_group(0, size=3)
    group = dataclasses.replace(group, rewards=np.full((3, 2), 0.1, np.float32))
    group = with_branches(group, [[0, 1]] * 3, np.full((3, 2), 0.3))
    (credit_GS,) = Egspo(EgspoConfig(k=2, beta=0)).credit([group])
    assert (credit_GS == 0).all(), "not even by rounding"
    assert not Egspo(EgspoConfig(k=2, beta=0)).wanted(0, group, credit_GS, CONTEXT).units


# ---- the loss by hand


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_loss_and_slopes_of_a_batch_by_hand(aggregate: Any, kl: Any) -> None:
    group = random_group(5, size=3, length=6, per_step=2)
    objective = Egspo(EgspoConfig(k=2, lam=0, beta=0.3, kl=kl, aggregate=aggregate, clip_low=0.1, clip_high=0.15))
    units = objective.wanted(0, group, np.array([1.5, -1.0, 0.5]), CONTEXT).units
    views = [view for unit in units for view in unit]
    batch = build_batch(views, [group], mask_id=9, pad_id=0, law=Law.RAW)
    rng, N, V = np.random.default_rng(2), batch.targets.size, 10
    assert batch.logp is not None and batch.logp.tolist() == [
        float(group.logp_raw[view.row, position]) for view in views for position in view.scored_n
    ]
    batch = dataclasses.replace(batch, logp=rng.normal(size=N).astype(np.float32) * 0.1 - 2.2)
    logits, ref_logits = torch.tensor(rng.normal(size=(N, V)) * 0.3, requires_grad=True), torch.zeros(N, V).double()
    law, ref_law = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    at = torch.arange(N), torch.from_numpy(batch.targets)
    ones = torch.ones(N)
    scores = PolicyScores(Scores(law[at], ones, law_NV=law), reference=Scores(ref_law[at], ones, law_NV=ref_law))
    loss, figures = objective.loss(scores, batch)
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for z, view in enumerate(views):
        of = [n for n in range(N) if batch.view_of_score[n] == z]
        assert len(of) == 2
        scale = 1.0 if aggregate == "sum" else 0.5
        new, old = (scale * sum(values[n] for n in of) for values in (law[at], torch.from_numpy(batch.logp).double()))
        rho, a = (new - old).exp(), view.credit
        d = scale * sum(ref_law[at][n] for n in of) - new
        k3 = d.exp() - d - 1
        whole = sum((law[n].exp() * (law[n] - ref_law[n])).sum() for n in of) * (1.0 if aggregate == "sum" else 0.5 / V)
        expected = expected - torch.min(rho * a, rho.clamp(0.9, 1.15) * a) + 0.3 * (k3 if kl == "k3" else whole)
        clipped += int((rho < 0.9 and a < 0) or (rho > 1.15 and a > 0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and clipped > 0
    np.testing.assert_allclose(
        torch.autograd.grad(loss, logits, retain_graph=True)[0], torch.autograd.grad(expected, logits)[0], atol=1e-12
    )
    assert figures.values()["scored_steps"] == len(views) == 6


def test_a_token_that_cannot_be_drawn_adds_nothing_to_the_whole_kl() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    barred = logits.index_fill(1, torch.tensor([2]), -torch.inf).log_softmax(-1)
    reference = torch.zeros(4, 6).double().index_fill(1, torch.tensor([2]), -torch.inf).log_softmax(-1)
    kl_N = whole_kl(barred, reference)
    p = barred.exp()
    np.testing.assert_allclose(kl_N.detach(), np.log(5) + (p * barred.clamp(min=-99)).sum(1).detach(), atol=1e-12)
    (slope,) = torch.autograd.grad(kl_N.sum(), logits)
    assert torch.isfinite(slope).all() and (slope[:, 2] == 0).all() and slope.abs().max() > 0.01


# ---- the gradient that the method states


def expected_gradient(toy: Toy, config: EgspoConfig) -> np.ndarray:
    return mean_gradient(toy, Egspo(config), by_entropy(toy))


@pytest.mark.parametrize("toy", [SMALLEST, RANDOM_ORDER, RETIRING, BLOCKS, TWO_TOKENS_A_STEP], ids=str)
@pytest.mark.slow
def test_all_steps_of_egspo_have_the_gradient_of_expected_reward(toy: Toy) -> None:
    config = EgspoConfig(k=toy.steps, lam=0, beta=0)
    exact = exact_gradient(toy) / toy.per_step  # 1/steps times (G-1)/G times the gradient of expected reward
    assert relative_error(expected_gradient(toy, config), exact) < 1e-6
    fewer = config.model_copy(update={"k": toy.steps - 1})
    assert relative_error(expected_gradient(toy, fewer), exact) > 0.05, "control: without the step of least entropy"


@pytest.mark.parametrize("toy", [SMALLEST, BLOCKS, TWO_TOKENS_A_STEP], ids=str)
@pytest.mark.slow
def test_what_a_step_gained_changes_no_expectation_but_the_mean_at_equal_rank_does(toy: Toy) -> None:
    exact, lam = exact_gradient(toy) / toy.per_step, 0.5
    settings: dict[str, Any] = {"k": toy.steps, "lam": lam, "beta": 0}
    unbiased = expected_gradient(toy, EgspoConfig(centre="reward", **settings))
    assert relative_error(unbiased, exact * 2 * (0.5 + lam) / (1 + lam)) < 1e-6
    scaled = expected_gradient(toy, EgspoConfig(centre="reward", normalise=False, **settings))
    np.testing.assert_allclose(scaled, unbiased * (1 + lam), atol=1e-12)
    published = expected_gradient(toy, EgspoConfig(**settings))
    assert 0.05 < relative_error(published, exact) < 0.4, "a step's rank depends on what it drew"


def test_with_fills_of_equal_reward_sa_is_egspo() -> None:
    group = random_group(1, size=4)
    branched = with_branches(group, [[0, 1, 2]] * 4, np.full((4, 3), 0.7))
    plain, sa = (Egspo(EgspoConfig(k=3, lam=lam)).credit([branched])[0] for lam in (0.0, 0.5))
    np.testing.assert_allclose(sa, np.repeat(plain[:, None], 3, axis=1), atol=1e-7)
    odd = with_branches(group, [[0, 1, 2]] * 4, np.arange(12).reshape(4, 3))
    assert abs(Egspo(EgspoConfig(k=3)).credit([odd])[0] - sa).max() > 0.1, "control"


# ---- layout, and the recorded cases


def test_the_gradient_does_not_depend_on_ranks_and_forwards() -> None:
    texts, orders = [[2, 3], [4, 5, 6, 7], [EOS_C], [8, 2, 3]], [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    groups = [
        with_branches(
            walked_group(texts, orders, steps=2, rewards=[0, 1, 0.5, 2], group_id=i, entropy=np.eye(4)),
            [[0, 1], [1, 0], [0, 1], [0, -1]],
            np.arange(8).reshape(4, 2) / 4,
        )
        for i in range(3)
    ]
    objective = Egspo(EgspoConfig(k=2, beta=0.3))
    whole, figures = planned_gradient(objective, groups, ranks=1, views_per_forward=99, denoiser=STATE_TABLES)
    assert np.linalg.norm(whole) > 0.01 and figures["scored_steps"] == 21
    for ranks, views, backwards in ((1, 1, False), (2, 3, True), (3, 2, False)):
        layout: dict[str, Any] = {"ranks": ranks, "views_per_forward": views, "backwards": backwards}
        cut, same = planned_gradient(objective, groups, denoiser=STATE_TABLES, **layout)
        np.testing.assert_allclose(cut, whole, atol=1e-12)
        assert same == pytest.approx(figures)
    wrong, _ = planned_gradient(
        objective, groups, ranks=2, views_per_forward=3, per_forward=True, denoiser=STATE_TABLES
    )
    assert abs(wrong - whole).max() > 1e-3, "control: divided by what is in a forward"


MISTAKES: list[tuple[str, Any, str, Any]] = [
    ("01_egspo_lambda0_onpolicy_k3", egspo, "k3", lambda logp, reference: k3(reference, logp)),
    ("01_egspo_lambda0_onpolicy_k3", Egspo, "per_step", lambda self, group: 1.0),
    ("03_egspo_sa_unnorm_exactkl_sum_correctonly", egspo, "whole_kl", lambda law, ref: whole_kl(ref, law)),
    ("03_egspo_sa_unnorm_exactkl_sum_correctonly", egspo, "group_advantages", leave_one_out_advantages),
    (
        "03_egspo_sa_unnorm_exactkl_sum_correctonly",
        egspo,
        "clipped_terms",
        lambda d, a, clip: clipped_terms(-d, a, clip=clip),
    ),
    (
        "05_egspo_standard_returns_nokl_dynlambda",
        Egspo,
        "of_steps",
        lambda self, value, steps: value[: steps.size_Z.numel()],
    ),
    ("05_egspo_standard_returns_nokl_dynlambda", Egspo, "fill_rewards", lambda self, group: 0 * group.branch_step),
    ("06_egspo_K1_old_ignored", Egspo, "fill_rewards", lambda self, group: 1 + 0 * group.branch_step),
]


@pytest.mark.parametrize(("name", "place", "part", "mistake"), MISTAKES, ids=[f"{m[0][:2]} {m[2]}" for m in MISTAKES])
def test_a_mistake_is_found_by_the_recorded_cases(name, place, part, mistake, monkeypatch) -> None:
    case, meter = read_method_case(GOLDEN / "methods" / "egspo", name), Meter("cpu", "float32")
    monkeypatch.setattr(place, part, mistake)
    assert any(not found.passed for found in recorded.check(case, meter))
