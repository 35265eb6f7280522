"""TraFL: its residuals against closed forms, its gradient by enumeration, its normalisers, draws and limits."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.objectives.advantages import z_scores
from learner.objectives.rspo import Rspo
from learner.objectives.trafl import Trafl
from learner.settings.methods.bounds import RspoConfig, TraflConfig
from tests.support.hand_made import make_group
from tests.support.unit_scores import build, context, measured_sums, plan_gradient, scored, state_table, table_logp

C = 4


def profiled(**config) -> TraflConfig:
    return TraflConfig(normaliser="profiled", **config)


def group_of(rewards, group_id: int = 0, length: int = C):
    ids = np.random.default_rng(group_id).integers(1, 9, (len(rewards), length))
    rewards_GR = np.array(rewards, np.float32)[:, None]
    return make_group(ids, np.zeros_like(ids), steps=1, rewards=rewards_GR, group_id=group_id)


GROUPS = [group_of([0.0, 1.0, 0.3, 0.2]), group_of([1.0, 0.0, 0.0], group_id=1), group_of([0.5] * 3, group_id=2)]


def batch_of(objective: Trafl, groups, update_index: int = 0):
    units = []
    for index, (group, credit_G) in enumerate(zip(groups, objective.credit(groups), strict=True)):
        units += objective.wanted(index, group, credit_G, context(update_index)).units
    return build(units, groups)


def loss_of(objective: Trafl, groups, theta: torch.Tensor, reference: torch.Tensor, update_index: int = 0):
    batch = batch_of(objective, groups, update_index)
    reference_N = table_logp(reference, batch).detach()
    return objective.loss(scored(table_logp(theta, batch), reference_N=reference_N), batch)


def distances(objective: Trafl, groups, theta, reference) -> list[torch.Tensor]:
    """Of each group [G, K], each mask's s_policy - s_base, one view at a time."""
    found = []
    for index, (group, credit_G) in enumerate(zip(groups, objective.credit(groups), strict=True)):
        views = [view for unit in objective.wanted(index, group, credit_G, context()).units for view in unit]
        each = []
        for view in views:
            batch = build([(view,)], groups)
            each.append((table_logp(theta, batch) - table_logp(reference, batch).detach()).mean())
        found.append(torch.stack(each).reshape(group.size, -1))
    return found


# ---- the residual


def smallest_square(objective: Trafl, groups, theta, reference) -> torch.Tensor:
    """Per group, the least squares in z of the stated residuals."""
    total = torch.zeros((), dtype=torch.float64)
    for group, d_GK in zip(groups, distances(objective, groups, theta, reference), strict=True):
        rewards_G = torch.from_numpy(group.rewards[:, 0].astype(float))
        rest_G = d_GK.mean(1) - objective.config.b * rewards_G
        total = total + rest_G.var(correction=0) * group.size
    return total


@pytest.mark.parametrize("masks", ["paired", "independent"])
def test_loss_and_gradient_are_those_of_the_least_squares_in_the_normaliser(masks):
    objective, theta, reference = Trafl(profiled(b=0.7, masks=masks)), state_table(C), state_table(C, seed=1)
    loss, _ = loss_of(objective, GROUPS, theta, reference)
    exact = smallest_square(objective, GROUPS, theta, reference)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
    (found,), (expected,) = (torch.autograd.grad(value, theta) for value in (loss, exact))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    other = Trafl(profiled(b=0.8, masks=masks))
    assert abs(torch.autograd.grad(loss_of(other, GROUPS, theta, reference)[0], theta)[0] - found).max() > 1e-3, (
        "control"
    )


def test_a_constant_in_every_score_of_the_base_or_in_the_reward_changes_nothing():
    objective, theta, reference = Trafl(profiled()), state_table(C), state_table(C, seed=1)
    batch = batch_of(objective, GROUPS)
    logp_N, reference_N = table_logp(theta, batch), table_logp(reference, batch).detach()
    plain, moved = (objective.loss(scored(logp_N, reference_N=reference_N + by), batch)[0].item() for by in (0.0, 5.0))
    assert moved == pytest.approx(plain, rel=1e-12)
    richer = [dataclasses.replace(group, rewards=group.rewards + 2) for group in GROUPS]
    assert loss_of(objective, richer, theta, reference)[0].item() == pytest.approx(plain, rel=1e-6)
    first_N = torch.from_numpy(batch.view_of_score < 4) * 5.0
    assert abs(objective.loss(scored(logp_N, reference_N=reference_N + first_N), batch)[0].item() - plain) > 1, (
        "control"
    )


def enumerated(objective: Trafl, length: int, tokens: int):
    """Every completion of a few tokens as one group, with rewards, and a batch of it."""
    ids = np.array(list(itertools.product(range(2, 2 + tokens), repeat=length)))
    rewards = np.random.default_rng(7).random(len(ids)).astype(np.float32)
    group = make_group(ids, np.zeros_like(ids), steps=1, rewards=rewards[:, None])
    return rewards.astype(float), batch_of(objective, [group])


def exact_scores(batch, logp_S: np.ndarray, length: int) -> torch.Tensor:
    """Scores with which every mask's mean is the completion's own log-likelihood over its length."""
    row_N = np.array([view.row for view in batch.views])[batch.view_of_score]
    return torch.from_numpy(logp_S[row_N] / length)


def test_with_exact_scores_the_residual_is_0_for_every_completion_of_the_tilted_law():
    length, tokens = 2, 3
    objective = Trafl(profiled(b=0.6))
    rewards, batch = enumerated(objective, length, tokens)
    base = np.random.default_rng(1).dirichlet(np.ones(len(rewards)))
    tilted = base * np.exp(objective.config.b * length * rewards)
    tilted /= tilted.sum()
    reference_N = exact_scores(batch, np.log(base), length)
    loss, figures = objective.loss(scored(exact_scores(batch, np.log(tilted), length), reference_N=reference_N), batch)
    assert loss.item() < 1e-24 and figures.values()["reward_weight/completion"] == pytest.approx(1.2)
    half = base * np.exp(objective.config.b * rewards)
    half /= half.sum()
    wrong, _ = objective.loss(scored(exact_scores(batch, np.log(half), length), reference_N=reference_N), batch)
    assert wrong.item() > 1e-3, "control: a tilt by b in place of b times the length"


@pytest.mark.parametrize("length", [1, 2])
def test_on_its_own_completions_the_expected_gradient_is_the_kl_minus_the_reward_but_for_the_groups_means(length):
    """(2 / C^2) times the gradient of KL - b C E r, by exact scores. Groups of two, each completion drawn from the
    policy: all pairs with their probabilities."""
    tokens, b = 3, 0.6
    every = np.array(list(itertools.product(range(2, 2 + tokens), repeat=length)))
    logits = torch.tensor(np.random.default_rng(2).normal(size=len(every)), requires_grad=True)
    base = np.random.default_rng(1).dirichlet(np.ones(len(every)))
    rewards = np.random.default_rng(7).random(len(every))
    objective = Trafl(profiled(b=b, masks="independent", samples=1))
    pi = logits.detach().softmax(-1).numpy()
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(len(every)), repeat=2):
        ids = every[list(pair)]
        group = make_group(ids, np.zeros_like(ids), steps=1, rewards=rewards[list(pair)][:, None])
        batch = batch_of(objective, [group])
        of_N = np.array(pair)[np.array([view.row for view in batch.views])[batch.view_of_score]]
        logp_N, base_N = logits.log_softmax(-1)[of_N] / length, torch.from_numpy(np.log(base[of_N])) / length
        loss, _ = objective.loss(scored(logp_N, reference_N=base_N), batch)
        total = total + float(np.prod(pi[list(pair)])) * loss / 2
    law = logits.softmax(-1)
    kl = (law * (law.log() - torch.from_numpy(np.log(base)))).sum()
    reward = (law * torch.from_numpy(rewards)).sum()
    found, exact, untilted, per_token = (
        torch.autograd.grad(value, logits, retain_graph=True)[0].numpy()
        for value in (total, kl - b * length * reward, kl, kl - b * reward)
    )
    factor = 2 / length**2
    np.testing.assert_allclose(found, factor * exact * (1 - 1 / 2), rtol=1e-6)
    assert abs(found - factor * exact).max() > 1e-3, "control: without the factor (G-1)/G"
    assert abs(found - factor * untilted * (1 - 1 / 2)).max() > 1e-3, "control: without the reward"
    if length > 1:
        assert abs(found - factor * per_token * (1 - 1 / 2)).max() > 1e-3, "control: b in place of b C"


# ---- the learned normaliser


def learned_loss(batch, logp_N: torch.Tensor, reference_N: torch.Tensor, value_Z: torch.Tensor, **config):
    scores = scored(logp_N, reference_N=reference_N)
    scores = scores._replace(policy=dataclasses.replace(scores.policy, value_Z=value_Z))
    return Trafl(TraflConfig(**config)).loss(scores, batch)


def test_a_learned_normaliser_is_added_to_every_residual_and_its_slope_is_twice_their_sum():
    objective, theta, reference = Trafl(TraflConfig(b=0.7)), state_table(C), state_table(C, seed=1)
    assert objective.needs.head is not None and Trafl(profiled()).needs.head is None
    batch = batch_of(objective, GROUPS)
    assert [int((batch.unit_of_view == unit).sum()) for unit in range(3)] == [4, 4, 4], "a completion is a unit"
    z_Q = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    groups_Z = torch.tensor([view.group for view in batch.views])
    reference_N = table_logp(reference, batch).detach()
    loss, figures = learned_loss(batch, table_logp(theta, batch), reference_N, z_Q[groups_Z], b=0.7)
    pairs = zip(distances(objective, GROUPS, theta, reference), objective.credit(GROUPS), strict=True)
    residuals = [d_GK.mean(1) - torch.from_numpy(credit_G) for d_GK, credit_G in pairs]
    stated = sum((rest_G + z).square().sum() for rest_G, z in zip(residuals, z_Q, strict=True))
    assert loss.item() == pytest.approx(stated.item(), rel=1e-6)
    for found, expected in zip(*(torch.autograd.grad(value, [theta, z_Q]) for value in (loss, stated)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert figures.values()["normaliser"] == pytest.approx((4 * 0.3 - 3 * 0.2 + 3 * 0.1) / 10)


def test_with_exact_scores_and_the_laws_own_normaliser_the_residual_is_0_for_every_completion():
    length, b = 2, 0.6
    rewards, batch = enumerated(Trafl(TraflConfig(b=b)), length, tokens=3)
    base = np.random.default_rng(1).dirichlet(np.ones(len(rewards)))
    mass = base * np.exp(b * length * rewards)
    logp_N, reference_N = (exact_scores(batch, np.log(law), length) for law in (mass / mass.sum(), base))
    z = np.log(mass.sum()) / length - b * rewards.mean()  # the reward comes without its group's mean
    for value, fits in ((z, True), (0.0, False)):
        value_Z = torch.full((len(batch.views),), value, dtype=torch.float64)
        assert (learned_loss(batch, logp_N, reference_N, value_Z, b=b)[0].item() < 1e-20) == fits


@pytest.mark.parametrize("z", [0.0, 0.8])
def test_on_its_own_completions_the_policys_expected_gradient_does_not_depend_on_the_normaliser(z):
    """One completion at a time, weighted by its probability, with the reward as it is."""
    tokens, b = 3, 0.6
    logits = torch.tensor(np.random.default_rng(2).normal(size=tokens), requires_grad=True)
    base = np.random.default_rng(1).dirichlet(np.ones(tokens))
    settings = {"b": b, "masks": "independent", "samples": 1}
    rewards, batch = enumerated(Trafl(TraflConfig(**settings)), 1, tokens)
    logp_N = logits.log_softmax(-1)
    weight = logits.detach().softmax(-1)
    slopes = []
    for row in range(tokens):
        only = build([(view,) for view in batch.views if view.row == row], [one_token_group(rewards, tokens)])
        found = learned_loss(
            only, logp_N[row : row + 1], torch.from_numpy(np.log(base[row : row + 1])), torch.tensor([z]), **settings
        )[0]
        slopes.append(weight[row] * torch.autograd.grad(found, logits, retain_graph=True)[0])
    law = logits.softmax(-1)
    stated = (law * (law.log() - torch.from_numpy(np.log(base) + b * rewards))).sum()
    (exact,) = torch.autograd.grad(stated, logits)
    torch.testing.assert_close(sum(slopes), 2 * exact, rtol=1e-6, atol=1e-9)


def one_token_group(rewards: np.ndarray, tokens: int):
    ids = np.arange(2, 2 + tokens)[:, None]
    return make_group(ids, np.zeros_like(ids), steps=1, rewards=rewards[:, None])


# ---- several masks


def test_products_of_different_masks_have_no_variance_of_the_masks_in_their_mean():
    """All pairs of masks of two positions, with their probabilities, for both masks of each of two completions."""
    group = group_of([0.0, 1.0], length=2)
    theta, reference = state_table(2), state_table(2, seed=1)
    masks = [(np.array([True, False]), 1 / 4), (np.array([False, True]), 1 / 4), (np.array([True, True]), 1 / 2)]

    def mean_loss(unbiased: bool) -> tuple[float, float]:
        objective = Trafl(profiled(b=0.7, masks="independent", samples=2, unbiased=unbiased))
        (credit_G,) = objective.credit([group])
        total, mean_d_G = 0.0, np.zeros(2)
        for draws in itertools.product(masks, repeat=4):
            mask_GKC = np.array([mask for mask, _ in draws]).reshape(2, 2, 2)
            probability = float(np.prod([p for _, p in draws]))
            objective.draw = lambda *_, mask_GKC=mask_GKC: mask_GKC
            batch = build(objective.wanted(0, group, credit_G, context()).units, [group])
            difference_N = table_logp(theta, batch) - table_logp(reference, batch)
            rows_N = np.array([view.row for view in batch.views])[batch.view_of_score]
            mean_d_G += probability * np.bincount(rows_N, batch.weight * difference_N.detach().numpy())
            total += probability * loss_of(objective, [group], theta, reference)[0].item()
        rest_G = mean_d_G - credit_G
        return total, float(np.square(rest_G - rest_G.mean()).sum())

    found, exact = mean_loss(unbiased=True)
    assert found == pytest.approx(exact, rel=1e-10)
    biased, exact = mean_loss(unbiased=False)
    assert biased > exact + 0.01, "control: the square of a mean has the masks' variance on top"


# ---- reductions, draws, figures


def test_of_one_group_it_is_the_other_method_with_b_one_over_lam():
    """Squared residuals around the group's mean, and the other's weights around the update's: one group, rewards that
    are z-scores already."""
    lam = 0.25
    group = group_of(z_scores(np.array([0.0, 1.0, 0.3, 0.2])) * (1 - 1e-4))
    theta, reference = state_table(C), state_table(C, seed=1)
    squares = Trafl(profiled(b=1 / lam, masks="independent"))
    other = Rspo(RspoConfig(lam=lam))
    final = other.weigh([group], other.credit([group]), measured_sums(other, [group], theta, reference))
    batch = build(other.wanted(0, group, final.by_group[0], context()).units, [group])
    (theirs,) = torch.autograd.grad(other.loss(scored(table_logp(theta, batch)), batch)[0], theta)
    (ours,) = torch.autograd.grad(loss_of(squares, [group], theta, reference)[0], theta)
    torch.testing.assert_close(ours * lam / 2, theirs, rtol=1e-3, atol=1e-6)


def test_layout_changes_nothing_and_groups_stay_whole():
    objective = Trafl(profiled())
    expected, figures = plan_gradient(objective, GROUPS, ranks=1, views_per_forward=64)
    for ranks, views in ((1, 1), (2, 16), (3, 5)):
        found, again = plan_gradient(objective, GROUPS, ranks=ranks, views_per_forward=views, reverse=True)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
        assert again == pytest.approx(figures)
    wanted = objective.wanted(2, GROUPS[2], objective.credit(GROUPS)[2], context())
    assert [len(unit) for unit in wanted.units] == [12], "equal rewards: the distance from the base is still squared"
    assert wanted.divisor == 3


def test_draws_are_of_the_update_and_pairs_cover_each_position_once():
    objective = Trafl(profiled())
    mask_GKC = objective.draw(GROUPS[0], context())
    np.testing.assert_array_equal(mask_GKC.sum(axis=1), 2)
    np.testing.assert_array_equal(mask_GKC, objective.draw(GROUPS[0], context()))
    assert (mask_GKC != objective.draw(GROUPS[0], context(update_index=1))).any()
    independent = Trafl(profiled(masks="independent", samples=3)).draw(GROUPS[0], context())
    assert independent.shape == (4, 3, C) and independent.any(axis=2).all()


def test_figures_are_those_of_the_residuals():
    objective, theta, reference = Trafl(profiled()), state_table(C), state_table(C, seed=1)
    loss, figures = loss_of(objective, GROUPS, theta, reference)
    values = figures.values()
    d_SK = torch.cat(distances(objective, GROUPS, theta, reference))
    assert values["residual"] == pytest.approx(np.sqrt(loss.item() / 10))
    assert values["log_ratio/reference"] == pytest.approx(d_SK.mean().item())
    assert values["normaliser"] == pytest.approx(-d_SK.mean().item())
    assert values["residual/target"] == pytest.approx(np.sqrt(np.mean(np.concatenate(objective.credit(GROUPS)) ** 2)))
    assert values["residual/between_masks"] > 0 and values["scored_completions"] == 10


def test_settings_that_can_t_work_are_refused():
    sampler = GROUPS[0].sampler
    for config, words in (
        (profiled(samples=3), "samples=3 is odd"),
        (profiled(unbiased=True), "take objective.masks=independent"),
        (profiled(masks="independent", samples=1, unbiased=True), "and more samples"),
    ):
        (problem,) = config.refuses(sampler)
        assert words in problem
    single = dataclasses.replace(sampler, completion_length=1, block_length=1, steps=1)
    assert "single token" in profiled().refuses(single)[0]
    assert not profiled().refuses(sampler)
    assert not profiled(masks="independent", samples=3, unbiased=True).refuses(sampler)
