"""DiFFPO: its two states, the law of their boundary, its weights, its expected gradient and what it reduces to."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.objectives.advantages import group_advantages
from learner.objectives.base import UpdateContext
from learner.objectives.diffpo import Diffpo
from learner.objectives.diffu_grpo import DiffuGrpo
from learner.settings.methods.one_step import DiffuGrpoConfig
from learner.settings.methods.states import DiffpoConfig
from tests.support.hand_made import random_group
from tests.support.one_step_tables import EOS, MASK, C, P, V, build, planned_gradient, scored
from tests.support.state_tables import ROWS, STATE_TABLES, path_logp, state_table, walked_group

LENGTHS = (3, 4, 1)
CLEAN = DiffpoConfig(beta=0, prompt_mask=0.0)


def context(update_index: int = 0) -> UpdateContext:
    return UpdateContext(3, update_index, groups=1, eos_ids=(EOS,))


def three_texts():
    """One token a step, in orders of their own; texts of 3, 4 and 1 tokens, EOS included."""
    orders = [[2, 0, 3, 1], [3, 2, 1, 0], [0, 2, 1, 3]]
    return walked_group([[2, 3], [4, 5, 6, 7], []], orders, rewards=[0, 1, 0.25])


def with_boundary(monkeypatch, tau: int) -> None:
    monkeypatch.setattr(Diffpo, "draw", lambda self, group, context: np.full(group.size, tau))


def gradient(objective, theta: torch.Tensor, group) -> np.ndarray:
    wanted = objective.wanted(0, group, objective.credit([group])[0], context())
    batch = build(wanted.units, [group])
    loss, _ = objective.loss(scored(theta, batch, denoiser=STATE_TABLES), batch)
    return torch.autograd.grad(loss / wanted.divisor, theta)[0].numpy()


def test_views_are_the_masked_completion_and_the_state_before_the_drawn_step(monkeypatch):
    with_boundary(monkeypatch, 2)
    objective, group = Diffpo(DiffpoConfig()), three_texts()
    units = objective.wanted(0, group, np.array([1.0, -1.0, 0.5]), context()).units
    assert [(v.row, v.hidden_C.astype(int).tolist(), v.scored_n.tolist()) for (v,) in units] == [
        (0, [1, 1, 1, 1], [1]),  # position 3, drawn at step 1, lies behind the text
        (0, [1, 0, 1, 0], [0, 2]),
        (1, [1, 1, 1, 1], [2, 3]),
        (1, [1, 1, 0, 0], [0, 1]),
        (2, [1, 1, 1, 1], [0]),
    ]
    first, second = units[0][0], units[1][0]
    np.testing.assert_array_equal(first.hidden_P, second.hidden_P)
    assert {v.weight for (v,) in units} == {1 / 3, 1 / 4, 1.0}


def test_the_boundary_is_uniform_on_the_steps_between_and_drawn_anew_for_each_row_and_update():
    group, objective = random_group(0, size=3000, length=8, per_step=2), Diffpo(DiffpoConfig())
    tau_G = objective.draw(group, context())
    np.testing.assert_allclose(np.bincount(tau_G, minlength=5) / 3000, [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=0.03)
    np.testing.assert_array_equal(tau_G, objective.draw(group, context()))
    assert (tau_G != objective.draw(group, context(1))).any()


def two_states_gradient(theta: torch.Tensor, group, taus) -> np.ndarray:
    """Of - (1/G) sum over rows of A / length times the text's log-prob, averaged over the boundaries: tables alone."""
    value = torch.zeros((), dtype=torch.float64)
    for row, (length, advantage) in enumerate(zip(LENGTHS, group_advantages(group.rewards), strict=True)):
        steps_C, ids_C = group.unmask_step[row].astype(int), group.completion_ids[row].astype(int)
        for tau in taus:
            for j in range(length):
                before = 0 if steps_C[j] < tau else tau
                shown = [MASK if steps_C[i] >= before else int(ids_C[i]) for i in range(C)]
                state = 2**P * sum(token * (V + 1) ** i for i, token in enumerate(shown))
                logp = theta[state % ROWS, j].log_softmax(-1)[ids_C[j]]
                value = value - advantage / length * logp / len(taus) / 3
    return torch.autograd.grad(value, theta)[0].numpy()


def test_the_expected_gradient_is_that_of_the_mean_over_boundaries(monkeypatch):
    theta, group, objective, found = state_table(), three_texts(), Diffpo(CLEAN), []
    for tau in (1, 2, 3):
        with_boundary(monkeypatch, tau)
        found.append(gradient(objective, theta, group))
    exact = two_states_gradient(theta, group, (1, 2, 3))
    np.testing.assert_allclose(np.mean(found, axis=0), exact, atol=1e-14)
    assert abs(np.mean(found[:2], axis=0) - exact).max() > 1e-3, "control: not of all boundaries"


def test_with_the_boundary_at_the_end_it_is_the_one_step_method_to_the_last_bit(monkeypatch):
    group, theta = three_texts(), state_table()
    settings = {"prompt_mask": 0.3, "beta": 0.0}
    with_boundary(monkeypatch, C)
    ours = gradient(Diffpo(DiffpoConfig(**settings)), theta, group)
    theirs = gradient(DiffuGrpo(DiffuGrpoConfig(**settings)), theta, group)
    np.testing.assert_array_equal(ours, theirs)
    with_boundary(monkeypatch, 2)
    assert (gradient(Diffpo(DiffpoConfig(**settings)), theta, group) != theirs).any(), "control"


# ---- importance weights


def test_weights_of_completions_make_the_expected_gradient_that_of_the_likelihoods_own_law(monkeypatch):
    """Four completions of two free tokens, drawn step by step by another table, in groups of two, all 4^2 of them: the
    expected gradient is (G-1)/G times that of the mean reward under the two-state law; without weights, or with those
    of tokens, it isn't."""
    order, rewards = [2, 0, 3, 1], np.array([0.3, 1.7, -0.4, 0.9])
    allowed = ((2, 3), (4,), (5, 6), (7,))
    law = torch.full((C, V), -torch.inf, dtype=torch.float64)
    for position, tokens in enumerate(allowed):
        law[position, list(tokens)] = 0.0
    theta, sampler = state_table(), state_table(1, gradient=False)
    texts = [list(text) for text in itertools.product(*allowed)]
    whole = walked_group(texts, [order] * 4, rewards=list(rewards))
    drawn_4C = torch.stack([path_logp(sampler + law, whole, row) for row in range(4)]).numpy()
    chances = np.exp(drawn_4C.sum(1))
    assert chances.sum() == pytest.approx(1)

    def likelihood(row: int, tau: int) -> torch.Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for j in range(C):
            before = 0 if order[j] < tau else tau
            shown = [MASK if order[i] >= before else texts[row][i] for i in range(C)]
            state = 2**P * sum(token * (V + 1) ** i for i, token in enumerate(shown))
            value = value + (theta + law)[state % ROWS, j].log_softmax(-1)[texts[row][j]]
        return value

    def expected(importance: str) -> np.ndarray:
        objective = Diffpo(DiffpoConfig(beta=0, prompt_mask=0.0, importance=importance, importance_cap=1e9))
        total = np.zeros((ROWS, C, V))
        for pair in itertools.product(range(4), repeat=2):
            group = walked_group([texts[i] for i in pair], [order] * 2, rewards=list(rewards[list(pair)]))
            group = dataclasses.replace(group, logp=drawn_4C[list(pair)])
            wanted = objective.wanted(0, group, objective.credit([group])[0], context())
            if wanted.units:
                batch = build(wanted.units, [group])
                loss, _ = objective.loss(scored(theta + law, batch, denoiser=STATE_TABLES), batch)
                total += np.prod(chances[list(pair)]) * torch.autograd.grad(loss / wanted.divisor, theta)[0].numpy()
        return total

    for tau in (1, 3):
        with_boundary(monkeypatch, tau)
        mean = sum(likelihood(row, tau).exp() * rewards[row] for row in range(4))
        due = -torch.autograd.grad(mean, theta)[0].numpy() / 2 / C
        np.testing.assert_allclose(expected("completion"), due, atol=1e-13)
        for control in ("none", "token"):
            assert np.linalg.norm(expected(control) - due) > 0.1 * np.linalg.norm(due), control


def test_weights_are_capped_and_reported_and_are_1_where_the_two_laws_are_one(monkeypatch):
    with_boundary(monkeypatch, 2)
    theta, group = state_table(), three_texts()
    found = {}
    for importance in ("none", "token", "completion"):
        objective = Diffpo(DiffpoConfig(beta=0, prompt_mask=0.0, importance=importance, importance_cap=2.0))
        units = objective.wanted(0, group, np.array([1.0, -1.0, 0.5]), context()).units
        assert {len(unit) for unit in units} == ({1, 2} if importance == "completion" else {1})
        batch = build(units, [group])
        logp_N = scored(theta, batch, denoiser=STATE_TABLES).policy.logp_N.detach().numpy()
        row_N = np.array([view.row for view in batch.views])[batch.view_of_score]
        logp_GC = np.zeros((3, C))
        # Row 0 was drawn by the likelihood; row 1's tokens were three times as likely there, row 2's a tenth as likely.
        logp_GC[row_N, batch.position] = logp_N - np.log([1, 1 / 3, 10])[row_N]
        own = dataclasses.replace(group, logp=logp_GC)
        batch = build(units, [own])
        np.testing.assert_allclose(batch.drawn_logp, logp_GC[row_N, batch.position])
        loss, figures = objective.loss(scored(theta, batch, denoiser=STATE_TABLES), batch)
        found[importance] = loss.item(), figures.values()
    assert found["none"][0] == pytest.approx(-(1 - 1 + 0.5))
    assert found["token"][0] == pytest.approx(-(1 - 1 / 3 + 2 * 0.5))
    assert found["completion"][0] == pytest.approx(-(1 - 3.0**-4 + 2 * 0.5))
    assert found["token"][1]["importance/capped"] == pytest.approx(1 / 8)
    assert found["token"][1]["importance/mean"] == pytest.approx((3 + 4 / 3 + 2) / 8)
    assert "importance/mean" not in found["none"][1]


@pytest.mark.parametrize("importance", ["none", "token", "completion"])
def test_layout_changes_nothing(importance):
    groups = [three_texts(), dataclasses.replace(three_texts(), group_id=1)]
    objective = Diffpo(DiffpoConfig(importance=importance))
    expected, figures = planned_gradient(objective, groups, ranks=1, views_per_forward=64)
    for ranks, views in ((1, 1), (2, 3), (3, 2)):
        found, again = planned_gradient(objective, groups, ranks=ranks, views_per_forward=views, backwards=True)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
        assert again == pytest.approx(figures)
    wrong, _ = planned_gradient(objective, groups, ranks=2, views_per_forward=3, per_forward=True)
    assert abs(wrong - expected).max() > 1e-3, "control: divided by what is in a forward"


def test_rows_without_gradient_stay_in_the_divisor_and_one_step_is_refused():
    wanted = Diffpo(CLEAN).wanted(0, three_texts(), np.zeros(3), context())
    assert not wanted.units and wanted.divisor == 3
    sampler = three_texts().sampler
    assert not DiffpoConfig().refuses(sampler)
    (problem,) = DiffpoConfig().refuses(dataclasses.replace(sampler, steps=1))
    assert "take 2 or more" in problem
    assert not DiffpoConfig().refuses(dataclasses.replace(sampler, steps=1, threshold=0.9))
