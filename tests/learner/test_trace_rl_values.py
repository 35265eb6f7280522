"""TraceRL's values: the advantages that they make, their loss by hand, and what they leave of the expected gradient."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import View
from learner.objectives.advantages import backed_up
from learner.objectives.base import UpdateContext, Valued
from learner.objectives.trace_rl import TraceRl
from learner.settings.methods.states import TraceRlConfig
from rollout.trajectory import SamplerSpec
from tests.support.hand_made import GOLDEN, make_group
from tests.support.one_step_tables import EOS, C, build
from tests.support.state_tables import path_logp, state_logp, state_table, walked_group

CONTEXT = UpdateContext(3, 0, groups=1, eos_ids=(EOS,))


def values_of(**settings) -> TraceRl:
    return TraceRl(TraceRlConfig(shrink=1, value_lr=1e-3, **settings))


def walk(**fields):
    """Two tokens at each of two steps; the texts fill all positions."""
    texts, orders = [[2, 3, 4, 4], [4, 5, 6, 7], [8, 2, 2, 3]], [[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    return walked_group(texts, orders, steps=2, rewards=[0, 1, 1], **fields)


def with_values(batch, theta, old_theta, value_N, old_value_N) -> PolicyScores:
    policy, old = (
        Scores(logp_N, torch.ones_like(logp_N), value_N=values)
        for logp_N, values in (
            (state_logp(theta, batch), value_N),
            (state_logp(old_theta, batch).detach(), old_value_N),
        )
    )
    return PolicyScores(policy, old)


# ---- advantages


def test_backed_up_rewards_in_closed_form():
    values = np.array([0.3, -0.2, 0.5, 0.1])
    np.testing.assert_allclose(backed_up(2.0, values, discount=1, lam=1), 2.0)
    np.testing.assert_allclose(backed_up(2.0, values, discount=0.5, lam=1), [0.25, 0.5, 1, 2])
    np.testing.assert_allclose(backed_up(2.0, values, discount=1, lam=0), [-0.2, 0.5, 0.1, 2])
    gamma, lam = 0.9, 0.7
    ahead = np.append(values[1:], 0.0)
    delta = np.array([0, 0, 0, 2.0]) - values + gamma * ahead
    sums = [sum((gamma * lam) ** k * delta[s + k] for k in range(4 - s)) for s in range(4)]
    np.testing.assert_allclose(backed_up(2.0, values, discount=gamma, lam=lam) - values, sums)
    np.testing.assert_allclose(backed_up(2.0, np.zeros(3), discount=1, lam=0.4), [0.32, 0.8, 2.0])
    assert backed_up(1.0, np.zeros(0), discount=1, lam=0).size == 0


def test_each_view_is_credited_with_what_lies_behind_it_and_its_value_is_to_be_the_discounted_reward():
    group, plain = walk(), values_of(value_discount=0.5)
    (credit,) = plain.credit([group])
    assert plain.valued(0, group, CONTEXT) == [] and isinstance(plain, Valued)
    views = [unit[0] for unit in plain.wanted(0, group, credit, CONTEXT).units]
    assert [view.credit for view in views] == [view.value for view in views]
    np.testing.assert_allclose([v.value for v in views], np.stack([credit / 2, credit], axis=1).ravel())

    ahead = values_of(value_discount=0.5, value_lambda=0.0)
    read = ahead.valued(0, group, CONTEXT)
    assert [(v.row, v.scored_n.tolist()) for v in read] == [(v.row, v.scored_n.tolist()) for v in views]
    values_M = np.arange(6) / 10
    final = ahead.credit_by_values(0, group, credit, values_M, CONTEXT)
    np.testing.assert_allclose(final, np.stack([values_M[1::2] / 2, credit], axis=1))
    units = ahead.wanted(0, group, final, CONTEXT).units
    np.testing.assert_allclose([v.credit for (v,) in units], final.ravel())
    np.testing.assert_allclose([v.value for (v,) in units], [v.value for v in views])


def test_a_completion_of_fewer_views_is_credited_to_its_own_last_one():
    group = walked_group([[], [4, 5, 6, 7]], [[0, 1, 2, 3], [0, 1, 2, 3]], rewards=[0, 1])
    objective = values_of(value_lambda=0.5, eos_scored=1)
    (credit,) = objective.credit([group])
    values_M = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    final = objective.credit_by_values(0, group, credit, values_M, CONTEXT)
    np.testing.assert_allclose(final[0], [-1, 0, 0, 0])
    np.testing.assert_allclose(final[1], backed_up(1.0, values_M[1:], discount=1, lam=0.5))
    units = objective.wanted(0, group, final, CONTEXT).units
    assert [v.value for (v,) in units] == [-1, 1, 1, 1, 1]


def test_all_completions_are_scored_those_without_signal_too():
    group = dataclasses.replace(walk(), rewards=np.ones((3, 1), np.float32))
    for objective, count in ((values_of(beta=0), 6), (TraceRl(TraceRlConfig(shrink=1, beta=0)), 0)):
        wanted = objective.wanted(0, group, objective.credit([group])[0], CONTEXT)
        assert len(wanted.units) == count and wanted.divisor == 6


# ---- loss


def test_values_of_0_leave_the_plain_gradient():
    group, theta, slopes = walk(), state_table(), []
    old = state_table(1, gradient=False)
    for objective in (values_of(), TraceRl(TraceRlConfig(shrink=1))):
        wanted = objective.wanted(0, group, objective.credit([group])[0], CONTEXT)
        batch = build(wanted.units, [group])
        zeros_N = torch.zeros(len(batch.targets), dtype=torch.float64)
        loss, _ = objective.loss(with_values(batch, theta, old, zeros_N, zeros_N), batch)
        slopes.append(torch.autograd.grad(loss / wanted.divisor, theta)[0])
    assert torch.equal(*slopes)


@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_loss_and_slopes_by_hand(lam):
    """Advantages from the recursion of the module's text, tokens one by one; and the value's error, clipped."""
    gamma, clip = 0.8, 0.2
    group, theta, old = walk(), state_table(), state_table(1, gradient=False)
    objective = values_of(beta=0.0, value_discount=gamma, value_lambda=lam, value_clip=clip)
    (credit,) = objective.credit([group])
    rng = np.random.default_rng(0)
    old_GC = rng.normal(size=(3, C))
    value_GC = torch.tensor(old_GC + rng.normal(scale=0.3, size=(3, C)), requires_grad=True)
    steps_GC = group.unmask_step
    stars = np.array([[old_GC[row][steps_GC[row] == s].mean() for s in (0, 1)] for row in range(3)])
    final = credit if lam == 1 else objective.credit_by_values(0, group, credit, stars.ravel(), CONTEXT)
    wanted = objective.wanted(0, group, final, CONTEXT)
    batch = build(wanted.units, [group])
    at = (np.array([v.row for v in batch.views])[batch.view_of_score], batch.position)
    scores = with_values(batch, theta, old, value_GC[at], torch.from_numpy(old_GC[at]))
    loss, figures = objective.loss(scores, batch)
    ours = torch.autograd.grad(loss / wanted.divisor, [theta, value_GC])

    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for row, reward in enumerate(credit):
        rho_C = (path_logp(theta, group, row) - path_logp(old, group, row)).exp()
        last = reward - stars[row, 1]
        for j in range(C):
            if steps_GC[row, j] == 1:
                advantage, due = reward - old_GC[row, j], reward
            else:
                advantage = -old_GC[row, j] + gamma * stars[row, 1] + gamma * lam * last
                due = gamma * reward
            surrogate = -torch.min(rho_C[j] * advantage, rho_C[j].clamp(0.8, 1.2) * advantage)
            moved = (value_GC[row, j] - old_GC[row, j]).clamp(-clip, clip)
            errors = (value_GC[row, j] - due) ** 2, (old_GC[row, j] + moved - due) ** 2
            clipped += int(errors[1] > errors[0])
            expected = expected + (surrogate + torch.max(*errors) / 2) / 2
    theirs = torch.autograd.grad(expected / 6, [theta, value_GC])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and wanted.divisor == 6
    for found, due in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, due, rtol=1e-9, atol=1e-14)
    assert 0 < clipped < 12, "both sides of the clip are there"
    assert figures.values()["value"] == pytest.approx(value_GC.mean().item())


def test_a_value_of_the_state_leaves_the_expected_gradient_and_one_of_the_drawn_token_does_not():
    """Two tokens at three of the positions, groups of two, all 8^2 pairs of completions: the expected gradient with any
    function of state and position as the value is that without; with one that has seen the token it isn't."""
    objective, order = values_of(beta=0.0), np.array([[1, 0, 1, 0]] * 2)
    allowed = ((2, 3), (2, 3), (2, 3), (4,))
    law = torch.full((C, 9), -torch.inf, dtype=torch.float64)
    for position, tokens in enumerate(allowed):
        law[position, list(tokens)] = 0.0
    theta = state_table()
    texts = [list(text) for text in itertools.product(*allowed)]
    rewards = np.random.default_rng(5).normal(size=len(texts))
    blind = state_table(2, gradient=False)  # of (state, position); its first token's entry

    pairs = []
    for pair in itertools.product(range(len(texts)), repeat=2):
        group = walked_group([texts[i] for i in pair], order, steps=2, rewards=rewards[list(pair)])
        wanted = objective.wanted(0, group, objective.credit([group])[0], CONTEXT)
        assert wanted.divisor == 4
        batch = build(wanted.units, [group])
        pairs.append((batch, state_logp(theta + law, batch)))

    def expected(values) -> np.ndarray:
        total = torch.zeros((), dtype=torch.float64)
        for batch, logp_N in pairs:
            scores = Scores(logp_N, torch.ones_like(logp_N), value_N=values(batch))
            loss, _ = objective.loss(PolicyScores(scores, scores.detached()), batch)
            total = total + logp_N.detach().sum().exp() * loss / 4
        return torch.autograd.grad(total, theta, retain_graph=True)[0].numpy()

    def of_state(batch) -> torch.Tensor:
        return state_logp_of(blind, batch, np.full_like(batch.targets, 2))

    def of_token(batch) -> torch.Tensor:
        return state_logp_of(blind, batch, batch.targets)

    def state_logp_of(table, batch, targets) -> torch.Tensor:
        return state_logp(table, dataclasses.replace(batch, targets=targets))

    plain = expected(lambda batch: torch.zeros(len(batch.targets), dtype=torch.float64))
    np.testing.assert_allclose(expected(of_state), plain, atol=1e-13)
    assert np.linalg.norm(expected(of_token) - plain) > 0.1 * np.linalg.norm(plain), "control"


# ---- a recording


class Recording:
    """What the code's value model made of 4 completions: 45 tokens of 13 views, which are a block model's and so score
    several steps at once. Its discount and lambda are 1."""

    P, C = 8, 14

    def __init__(self) -> None:
        with np.load(GOLDEN / "methods" / "tracerl" / "value_gae_1_1.npz") as file:
            self.arrays = {name: file[name] for name in file.files}
        self.row_Z, self.scored_ZC = self.arrays["seq_ids"], self.arrays["ex_p_mask"][:, self.P :]
        first_R = np.unique(self.row_Z, return_index=True)[1]
        self.group = make_group(
            self.arrays["ex_input_ids"][first_R, self.P : self.P + self.C],
            self.arrays["step_map_all"] - 1,
            steps=self.C,
            drawn=np.stack([self.scored_ZC[self.row_Z == row].any(axis=0) for row in range(4)]),
        )

    def by_token(self, name: str) -> np.ndarray:
        """[4, C] float64, 0 where nothing is scored."""
        found_RC = np.zeros((4, self.C))
        np.add.at(found_RC, self.row_Z, np.where(self.scored_ZC, self.arrays[name][:, self.P :], 0.0))
        return found_RC

    def credited(self, objective: TraceRl) -> tuple[np.ndarray, np.ndarray]:
        """[4, C] each: every token's advantage, and what its value is to be."""
        old_RC, group = self.by_token("old_values"), self.group
        read = itertools.chain(*objective.views(0, group, np.zeros(4), CONTEXT.eos_ids))
        values_M = np.array([old_RC[view.row, view.scored_n].mean() for view in read])
        credit_GS = objective.credit_by_values(0, group, self.arrays["rewards"].astype(float), values_M, CONTEXT)
        advantage_RC, due_RC = np.zeros((2, 4, self.C))
        for (view,) in objective.wanted(0, group, credit_GS, CONTEXT).units:
            at = (view.row, view.scored_n)
            advantage_RC[at], due_RC[at] = view.credit - old_RC[at], view.value
        return advantage_RC, due_RC

    def losses(self, objective: TraceRl) -> list[float]:
        """Of each micro-batch of two views: a sum over tokens, over the padded length and the views."""
        found = []
        for row, scored_C, *values_NC in zip(
            self.row_Z, self.scored_ZC, self.arrays["old_values"], self.arrays["new_values"], strict=True
        ):
            at = np.flatnonzero(scored_C)
            view = View(0, int(row), scored_C, at, 0.0, 1.0, value=float(self.arrays["rewards"][row]))
            old_N, new_N = (torch.from_numpy(values_C[self.P :][at].astype(float)) for values_C in values_NC)
            batch = dataclasses.replace(
                build([(view,)], [self.group]), credit=old_N.numpy()
            )  # no advantage: values alone
            zeros_N = torch.zeros(at.size, dtype=torch.float64)
            new, old = (Scores(zeros_N, torch.ones_like(zeros_N), value_N=values_N) for values_N in (new_N, old_N))
            found.append(float(objective.loss(PolicyScores(new, old), batch)[0]) * at.size / self.C)
        return [float(np.mean(found[start : start + 2])) for start in range(0, len(found), 2)]


def test_recorded_values_make_the_recorded_advantages_returns_and_losses():
    record, objective = Recording(), values_of(value_clip=0.2)
    advantage_RC, due_RC = record.credited(objective)
    np.testing.assert_allclose(advantage_RC, record.by_token("advantages"), atol=1e-6)
    np.testing.assert_allclose(due_RC, record.by_token("returns"), atol=0)
    recorded = record.arrays["loss_per_micro_batch"]
    np.testing.assert_allclose(record.losses(objective), recorded, atol=1e-7)

    for wrong in (values_of(value_lambda=0.9), values_of(value_discount=0.9)):
        assert abs(record.credited(wrong)[0] - record.by_token("advantages")).max() > 0.05, "control"
    assert abs(np.subtract(record.losses(values_of(value_clip=0.01)), recorded)).max() > 1e-3, "control: the clip"


# ---- settings


def test_what_values_cost_and_which_head_they_ask_for():
    sampler = SamplerSpec(24, 24, 8, "random", 1.0)
    off, on, ahead = (
        TraceRlConfig(shrink=3, **changes) for changes in ({}, {"value_lr": 0.1}, {"value_lr": 0.1, "value_lambda": 0})
    )
    assert [config.cost(sampler).valued for config in (off, on, ahead)] == [0, 0, 3]
    assert TraceRl(off).needs.head is None
    head = TraceRl(on).needs.head
    assert head is not None and (head.lr, head.width, head.of) == (0.1, 64, "tokens")
