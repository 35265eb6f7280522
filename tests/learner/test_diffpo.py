"""DiFFPO: its two states, the law of their boundary, its expected gradient and what it reduces to."""

import dataclasses

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
from tests.support.state_tables import ROWS, STATE_TABLES, state_table, walked_group

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


def test_layout_changes_nothing():
    groups = [three_texts(), dataclasses.replace(three_texts(), group_id=1)]
    objective = Diffpo(DiffpoConfig())
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
    assert "isn't scored" in DiffpoConfig().refuses(dataclasses.replace(sampler, threshold=0.9))[0]
