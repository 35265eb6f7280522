"""SPG: its recorded cases, its bounds against closed forms over all masks, its masks, and its reductions."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, Unit, ViewBatch, build_batch
from learner.objectives import make_objective, spg
from learner.objectives.base import UpdateContext
from learner.objectives.diffu_grpo import DiffuGrpo
from learner.objectives.spg import Mask, Spg, bound_unit, bounds, lengths
from learner.objectives.statistics import Statistics
from learner.ranks.plan import plan_update
from learner.settings.methods.bounds import SpgConfig
from learner.settings.methods.one_step import DiffuGrpoConfig
from learner.verification.measurement import Meter
from learner.verification.methods import spg as recorded
from learner.verification.methods.case import read_method_case
from rollout.trajectory import TrajectoryGroup
from tests.support.hand_made import GOLDEN, make_group, random_group

EOS, MASK, V = 1, 9, 9


def context(update_index: int = 0, run_seed: int = 3) -> UpdateContext:
    return UpdateContext(run_seed, update_index, groups=1, eos_ids=(EOS,))


def build(units: list[Unit], groups: list[TrajectoryGroup]) -> ViewBatch:
    views = [view for unit in units for view in unit]
    return build_batch(views, groups, mask_id=MASK, pad_id=0, law=Law.RAW, unit_sizes=[len(unit) for unit in units])


def scored(logp_N: torch.Tensor) -> PolicyScores:
    return PolicyScores(Scores(logp_N, torch.ones_like(logp_N)))


def text_group(*texts: list[int], C: int, block: int | None = None, rewards: list[float] | None = None):
    """Completions of C positions, filled with EOS."""
    ids = [text + [EOS] * (C - len(text)) for text in texts]
    rewards_GR = None if rewards is None else [[reward] for reward in rewards]
    return make_group(ids, [list(range(C))] * len(ids), steps=C, rewards=rewards_GR, block_length=block or C)


def masks_of(hidden_KC) -> list[Mask]:
    return [Mask(np.zeros(2, dtype=bool), np.array(hidden_C, dtype=bool)) for hidden_C in hidden_KC]


def table(C: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """A denoiser: free logits of every state, position and token, [2^C states of what is masked, C, V] float64."""
    logits = scale * np.random.default_rng(seed).normal(size=(2**C, C, V))
    return torch.tensor(logits, requires_grad=True)


def table_logp(theta: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    C = theta.shape[1]
    states_Z = (batch.input_ids[:, -C:] == MASK) @ 2 ** np.arange(C)
    return theta.log_softmax(-1)[states_Z[batch.view_of_score], batch.position, batch.targets]


def table_bounds(theta: torch.Tensor, unit: Unit, group: TrajectoryGroup, beta: float) -> tuple[float, float]:
    """ELBO and EUBO of one unit."""
    batch = build([unit], [group])
    elbo_U, eubo_U = bounds(table_logp(theta, batch), batch, beta=beta)
    return elbo_U.item(), eubo_U.item()


def gapped_group(rows: int, C: int, length: int) -> TrajectoryGroup:
    """Completions of C positions of which the first ``length`` exist."""
    there = np.tile(np.arange(C) < length, (rows, 1))
    return make_group(
        np.where(there, 5, 0),
        np.where(there, np.arange(C), -1),
        steps=C,
        drawn=there,
        places=np.where(there, 1 + np.arange(C), -1).astype(np.int32),
    )


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_masks_that_hide_nothing_of_a_text_with_gaps_leave_the_bound_right(samples):
    """Each of the text's 3 tokens has a log-prob of -1, and most of 12 positions don't exist."""
    objective, group = Spg(SpgConfig(masking="random", samples=samples)), gapped_group(400, 12, 3)
    masks = objective.draw(group, np.full(400, 12), context())
    batch = build([bound_unit(0, row, masks[row], 12, 1.0) for row in range(400)], [group])
    assert np.bincount(batch.view_of_score, minlength=batch.unit_of_view.size).min() == 0, "a view without scores"
    logp_N = torch.full((batch.targets.size,), -1.0, requires_grad=True)
    elbo_U, eubo_U = bounds(logp_N, batch, beta=1.0)
    bound_U = elbo_U.detach().numpy() * lengths(batch)
    assert abs(bound_U.mean() + 3.0) < 4 * bound_U.std() / 20
    scored_U = np.bincount(batch.unit_of_score, minlength=400) > 0
    assert set(np.round(elbo_U.detach().numpy(), 6)) == ({-1.0, 0.0} if not scored_U.all() else {-1.0})
    loss, _ = objective.loss(scored(logp_N), batch)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(eubo_U).all() and torch.isfinite(logp_N.grad).all()


# ---- recorded cases


def failed(name: str) -> set[str]:
    """Quantities of a recorded case that are out of bounds."""
    found = recorded.check(read_method_case(GOLDEN / "methods" / "spg", name), Meter("cpu", "float32"))
    return {measurement.quantity for measurement in found if not measurement.passed}


@pytest.mark.parametrize("name", ["01_mix_block_random", "03_eubo_block_random", "06_mix_all_k1", "09_zero_block_all"])
def test_recorded_cases_come_out_again(name):
    assert failed(name) == set()


def over_the_text(logp_N, batch, *, beta):
    elbo_U, eubo_U = bounds(logp_N, batch, beta=beta)
    masked_U = [len(set(batch.position[batch.unit_of_score == u])) for u in range(elbo_U.numel())]
    return elbo_U, eubo_U * torch.tensor(masked_U) / torch.tensor(lengths(batch))


def unweighted(logp_N, batch, *, beta):
    return bounds(logp_N, dataclasses.replace(batch, weight=np.ones_like(batch.weight)), beta=beta)


def same_for_all(batch):
    return np.full(int(batch.unit_of_view.max()) + 1, lengths(batch).mean())


def raised(self, elbo_U, eubo_U, credit_U):
    return elbo_U


@pytest.mark.parametrize(
    ("where", "name", "wrong", "quantities"),
    [
        (spg, "bounds", over_the_text, {"loss", "gradient of the loss"}),
        (recorded, "bounds", over_the_text, {"row values"}),
        (spg, "bounds", unweighted, {"loss", "gradient of the loss"}),
        (spg, "lengths", same_for_all, {"loss", "gradient of the loss"}),
        (Spg, "likelihood", raised, {"row values", "loss", "gradient of the loss"}),
    ],
)
def test_control_a_wrong_rule_does_not_come_out(monkeypatch, where, name, wrong, quantities):
    monkeypatch.setattr(where, name, wrong)
    assert quantities == failed("01_mix_block_random")


# ---- bounds

TWO = text_group([2, 2], C=2)
KNOWN, UNKNOWN = (0.9, 0.7), (0.4, 0.2)
"""Probability of each of two tokens when the other is shown, and when it is masked."""


def two_tokens(known=KNOWN, unknown=UNKNOWN) -> torch.Tensor:
    """The table denoiser of these probabilities; what is left goes to another token."""
    p = torch.full((4, 2, V), 1e-30, dtype=torch.float64)
    for position in (0, 1):
        for state, chance in ((1 << position, known[position]), (3, unknown[position])):
            p[state, position, 2], p[state, position, 3] = chance, 1 - chance
    return p.log().requires_grad_()


def all_masks(length: int) -> Unit:
    """Every mask of ``random`` masking, each as often as it is probable: as if there were infinitely many views."""
    hidden = []
    copies = math.lcm(*(length * math.comb(length, n) for n in range(1, length + 1)))
    for bits in itertools.product([False, True], repeat=length):
        if n := sum(bits):
            hidden += [bits] * (copies // (length * math.comb(length, n)))
    return bound_unit(0, 0, masks_of(hidden), length, -1.0)


@pytest.mark.parametrize(
    ("beta", "eubo", "mixture"),
    [(1.0, -0.61464531, -0.68079317), (1.5, -0.55923712, -0.65308905), (2.0, -0.51290796, -0.62992449)],
)
def test_two_tokens_over_all_masks(beta, eubo, mixture):
    """Values and slopes of the closed forms: ELBO = 1/4 log(a1 b1 a2 b2), EUBO = 1/2 sum_i 1/beta log((a^beta +
    b^beta) / 2)."""
    theta, unit = two_tokens(), all_masks(2)
    assert table_bounds(theta, unit, TWO, beta) == pytest.approx((-0.74694103, eubo), abs=1e-8)
    loss, figures = Spg(SpgConfig(eubo_beta=beta)).loss(
        scored(table_logp(theta, build([unit], [TWO]))), build([unit], [TWO])
    )
    assert loss.item() / 2 == pytest.approx(mixture, abs=3e-8)
    assert figures.values() == pytest.approx(
        {"bound/elbo": -0.74694103, "bound/eubo": eubo, "scored_completions": 1.0}, abs=1e-8
    )

    logp = torch.tensor(np.log([*KNOWN, *UNKNOWN]), requires_grad=True)
    power = (beta * logp).exp()
    closed = (logp.sum() / 4 + ((power[:2] + power[2:]) / 2).log().sum() / 2 / beta) / 2
    (wanted,) = torch.autograd.grad(closed, logp)
    batch = build([unit], [TWO])
    rows = {(1, 0): 0, (2, 1): 1, (3, 0): 2, (3, 1): 3}  # by what is masked, and position
    states_Z = (batch.input_ids[:, -2:] == MASK) @ np.array([1, 2])
    at_N = torch.tensor([rows[states_Z[z], j] for z, j in zip(batch.view_of_score, batch.position, strict=True)])
    loss, _ = Spg(SpgConfig(eubo_beta=beta)).loss(scored(logp[at_N]), batch)
    (slope,) = torch.autograd.grad(loss / 2, logp)
    np.testing.assert_allclose(slope, wanted, rtol=1e-12)


def test_control_masks_out_of_proportion_give_other_bounds():
    unit = bound_unit(0, 0, masks_of([[1, 0], [0, 1], [1, 1]]), 2, -1.0)
    elbo, eubo = table_bounds(two_tokens(), unit, TWO, 1.5)
    assert abs(elbo + 0.74694103) > 0.05 and abs(eubo + 0.55923712) > 0.02


def random_order_logp(theta: torch.Tensor, ids: np.ndarray) -> float:
    """Log-probability that one token a step in random order writes ``ids``."""
    law, C = theta.log_softmax(-1), len(ids)
    total = []
    for order in itertools.permutations(range(C)):
        state, logp = 2**C - 1, 0.0
        for j in order:
            logp += law[state, j, int(ids[j])].item()
            state -= 1 << j
        total.append(logp)
    return float(np.logaddexp.reduce(total) - math.log(math.factorial(C)))


def test_the_bounds_are_ordered_over_all_masks_and_hold_the_likelihood_between_them():
    group, unit = text_group([2, 3, 4], C=3), all_masks(3)
    for seed in range(20):
        theta = table(3, seed)
        elbo = table_bounds(theta, unit, group, 1.0)[0]
        eubo = [table_bounds(theta, unit, group, beta)[1] for beta in (1.0, 1.5, 2.0, 3.0, 6.0)]
        assert elbo < eubo[0] and all(low < high for low, high in itertools.pairwise(eubo))
        likelihood = random_order_logp(theta, group.completion_ids[0]) / 3
        assert elbo < likelihood < eubo[3], "an upper bound from beta = 3 tokens on"
    opposed = two_tokens(known=(0.9, 0.1), unknown=(0.1, 0.9))
    likelihood = random_order_logp(opposed, np.array([2, 2])) / 2
    assert table_bounds(opposed, all_masks(2), TWO, 1.0)[1] < likelihood, "below that, not of every denoiser"


def test_control_the_upper_bound_of_two_views_may_lie_below_the_lower_one():
    unit = bound_unit(0, 0, masks_of([[1, 1], [0, 1]]), 2, -1.0)
    elbo, eubo = table_bounds(two_tokens(known=(0.6, 0.6), unknown=(0.6, 0.6)), unit, TWO, 1.5)
    assert elbo == pytest.approx(math.log(0.6))
    assert eubo - elbo == pytest.approx((math.log(1 / 2) + math.log(3 / 2)) / 2 / 1.5)
    assert eubo < elbo


def test_one_view_of_all_of_the_text_makes_the_bounds_equal():
    group = text_group([2, 3, 4, EOS], C=6)
    unit = bound_unit(0, 0, masks_of([[1] * 6]), 4, -1.0)
    elbo, eubo = table_bounds(table(6), unit, group, 1.7)
    assert eubo == pytest.approx(elbo, rel=1e-12)
    part = bound_unit(0, 0, masks_of([[1, 0, 0, 1, 1, 1]]), 4, -1.0)
    elbo, eubo = table_bounds(table(6), part, group, 1.7)
    assert eubo - elbo == pytest.approx(math.log(2) / 1.7), "control: of a part of it, by -log(t) / beta"


def test_a_token_that_is_all_but_impossible_keeps_its_gradient():
    batch = build([bound_unit(0, 0, masks_of([[1, 1], [1, 1]]), 2, -1.0)], [TWO])
    logp = torch.tensor([-800.0, -1.0, -800.0, -2.0], dtype=torch.float64, requires_grad=True)
    _, eubo_U = bounds(logp, batch, beta=2.0)
    (slope,) = torch.autograd.grad(eubo_U.sum(), logp)
    assert slope[0] == slope[2] == pytest.approx(0.25) and eubo_U.item() < -400
    assert not (2 * logp).exp()[0], "control: the power itself underflows, and the token would be missing"


# ---- loss


def two_rows(negative: str = "mixture", **settings):
    """Loss over the divisor, and its gradient by a table, of texts of 1 and 3 tokens and rewards 1 and 0."""
    group = text_group([EOS], [2, 3, EOS], C=4, block=2, rewards=[1.0, 0.0])
    objective = Spg(SpgConfig(negative=negative, **settings))
    (credit_G,) = objective.credit([group])
    wanted = objective.wanted(0, group, credit_G, context())
    batch, theta = build(list(wanted.units), [group]), table(4)
    loss = objective.loss(scored(table_logp(theta, batch)), batch)[0] / wanted.divisor
    return loss.item(), torch.autograd.grad(loss, theta)[0].numpy(), batch, theta, wanted


def test_rows_weigh_their_tokens():
    """- sum of A ell len / sum of len, with A = 1/2 of one token and -1/2 of three."""
    loss, _, batch, theta, wanted = two_rows(eubo_beta=2.0, mixture_weight=0.25)
    elbo_U, eubo_U = (x.tolist() for x in bounds(table_logp(theta, batch), batch, beta=2.0))
    lowered = 0.25 * eubo_U[1] + 0.75 * elbo_U[1]
    assert wanted.divisor == 4 and [view.credit for view in batch.first_views] == [0.5, -0.5]
    assert loss == pytest.approx((-0.5 * elbo_U[0] * 1 + 0.5 * lowered * 3) / 4, rel=1e-12)
    assert loss != pytest.approx((-0.5 * elbo_U[0] + 0.5 * lowered) / 2, rel=0.05), "control: the mean over rows"


def test_without_the_upper_bound_both_signs_are_reinforce_on_the_lower_one():
    loss, gradient, batch, theta, _ = two_rows(mixture_weight=0.0)
    other, other_gradient, *_ = two_rows("elbo")
    assert loss == other and (gradient == other_gradient).all()
    logp_N = table_logp(theta, batch)
    total = torch.zeros((), dtype=torch.float64)
    for u, (credit, length) in enumerate(((0.5, 1), (-0.5, 3))):
        views = np.flatnonzero(batch.unit_of_view == u)
        means = [logp_N[torch.from_numpy(batch.view_of_score == z)].mean() for z in views]
        total = total - credit * length * sum(means) / len(means) / 4
    (reinforce,) = torch.autograd.grad(total, theta)
    np.testing.assert_allclose(gradient, reinforce, rtol=1e-12)
    assert loss == pytest.approx(total.item(), rel=1e-12)
    for control in ("mixture", "eubo", "zero"):
        assert two_rows(control)[0] != pytest.approx(loss, rel=1e-3), control


def test_all_masked_and_on_the_lower_bound_it_is_diffu_grpo_over_tokens():
    """Before the policy has moved, on a clean prompt: - sum of A log p of every token / tokens."""
    group = text_group([2, 3, EOS], [4], [5, 6, 7, 8], C=4, rewards=[1, 0, 0.5])
    ours = SpgConfig(masking="all", samples=1, negative="elbo", context_mask=0.0)
    found = []
    for objective in (Spg(ours), DiffuGrpo(DiffuGrpoConfig(prompt_mask=0.0, beta=0.0, average="token"))):
        (credit_G,) = objective.credit([group])
        wanted = objective.wanted(0, group, credit_G, context())
        batch, theta = build(list(wanted.units), [group]), table(4)
        scores = scored(table_logp(theta, batch))
        loss, _ = objective.loss(scores._replace(old=scores.policy.detached()), batch)
        found.append(torch.autograd.grad(loss / wanted.divisor, theta)[0].numpy())
    np.testing.assert_allclose(*found, rtol=1e-12)
    assert found[0].any()


@pytest.mark.parametrize(("negative", "rows"), [("mixture", [0, 2, 3]), ("elbo", [0, 2, 3]), ("zero", [0, 3])])
def test_rows_without_gradient_are_left_out_and_stay_in_the_divisor(negative, rows):
    group = text_group([2, 3], [2, 3, 4], [5], [6, 7], C=4, block=2)
    objective, some = Spg(SpgConfig(negative=negative)), np.array([1.0, 0.0, -1.0, 0.5])
    wanted = objective.wanted(0, group, some, context())
    assert [unit[0].row for unit in wanted.units] == rows and wanted.divisor == 3 + 4 + 2 + 3
    everything = objective.wanted(0, group, np.ones(4), context()).units
    for unit in wanted.units:  # the draws don't depend on which rows are left out
        for view, other in zip(unit, everything[unit[0].row], strict=True):
            np.testing.assert_array_equal(view.hidden_C, other.hidden_C)
    silent = objective.wanted(0, group, np.zeros(4), context())
    assert not silent.units and silent.divisor == 12


def test_a_completion_without_advantage_adds_nothing_whichever_bound_it_takes():
    theta, unit = two_tokens(), all_masks(2)
    batch = build([tuple(view._replace(credit=0.0) for view in unit)], [TWO])
    loss, _ = Spg(SpgConfig()).loss(scored(table_logp(theta, batch)), batch)
    assert loss.item() == 0 and not torch.autograd.grad(loss, theta)[0].any()


# ---- masks

ROWS = 3000


def drawn(masking: str, length: int, *, C: int = 12, block: int = 4, **settings) -> tuple[np.ndarray, np.ndarray]:
    """[ROWS, K, P] and [ROWS, K, C], masks of that many texts of this length."""
    text = [2] * (length - 1) + [EOS] if length < C else [2] * C
    group = text_group(*[text] * ROWS, C=C, block=block, rewards=[0.0] * ROWS)
    objective = Spg(SpgConfig(masking=masking, **settings))
    masks = objective.draw(group, np.full(ROWS, length), context())
    hidden_P, hidden_C = (np.array([[mask[part] for mask in row] for row in masks]) for part in (0, 1))
    assert hidden_C[:, :, length:].all(), "what follows the text is masked always"
    return hidden_P, hidden_C


def near(found: np.ndarray | float, chance: float, count: int) -> bool:
    """Whether shares of ``count`` draws are the chance, within five standard deviations."""
    return bool((np.abs(found - chance) < 5 * math.sqrt(chance * (1 - chance) / count) + 1e-12).all())


def blocks_of(hidden_RKC: np.ndarray, block: int) -> np.ndarray:
    """[R, K], the drawn block of masks whose earlier blocks are shown: the first that has a mask."""
    return hidden_RKC.argmax(axis=2) // block


def test_the_block_is_one_of_the_text_by_permutation_and_modulo():
    """Three blocks, two of them text: of the permutations of 0, 1, 2 modulo 2, that is of 0, 1, 0."""
    _, hidden = drawn("block_all", 6, context_mask=0.0)
    blocks = blocks_of(hidden, 4)
    assert near((blocks == 0).mean(axis=0), 2 / 3, ROWS)
    assert near((blocks[:, 0] == blocks[:, 1]).mean(), 1 / 3, ROWS), "views may share a block"
    assert not near((blocks == 0).mean(axis=0), 1 / 2, ROWS), "control: not each block alike"
    _, hidden = drawn("block_all", 12, context_mask=0.0)
    blocks = blocks_of(hidden, 4)
    assert near(np.array([(blocks == b).mean(axis=0) for b in range(3)]), 1 / 3, ROWS)
    assert (blocks[:, 0] != blocks[:, 1]).all()
    _, hidden = drawn("block_all", 3, context_mask=0.0)
    assert (blocks_of(hidden, 4) == 0).all()


def test_block_random_masks_a_uniform_count_of_the_block_and_all_behind_it():
    _, hidden = drawn("block_random", 10, context_mask=0.0, samples=1)
    first, end = blocks_of(hidden, 4)[:, 0] * 4, None
    for block, v in ((0, 4), (1, 4), (2, 2)):
        part = hidden[first == 4 * block, 0]
        start, end = 4 * block, 4 * block + v
        assert not part[:, :start].any() and part[:, start + 4 :].all() and part[:, end:].all()
        counts = part[:, start:end].sum(axis=1)
        assert near(np.bincount(counts, minlength=v + 1)[1:] / len(part), 1 / v, len(part)) and counts.min() == 1
        assert near(part[:, start:end].mean(axis=0), (v + 1) / 2 / v, len(part)), "every position alike"


@pytest.mark.parametrize(("masking", "own"), [("block_all", 1.0), ("block_random", 5 / 8)])
def test_prompt_and_earlier_blocks_are_masked_by_chance(masking, own):
    """Three views, one of each block: a position is of the drawn block once, and else of a later or an earlier one."""
    prompt, hidden = drawn(masking, 12, context_mask=0.3, samples=3)
    assert near(prompt.mean(axis=0), 0.3, ROWS)
    assert near((prompt[:, 0] & prompt[:, 1]).mean(), 0.09, ROWS), "anew for each view"
    for block, chance in enumerate(((own + 0.3 + 0.3) / 3, (1 + own + 0.3) / 3, (1 + 1 + own) / 3)):
        assert near(hidden[:, :, 4 * block : 4 * block + 4].mean(axis=(0, 1)), chance, 3 * ROWS)


def test_random_masks_a_uniform_count_of_the_text():
    prompt, hidden = drawn("random", 5, samples=3)
    assert near(prompt.mean(axis=(0, 1)), 0.15, 3 * ROWS)
    counts = hidden[:, :, :5].sum(axis=2)
    assert near(np.array([(counts == n).mean(axis=0) for n in range(1, 6)]), 1 / 5, ROWS) and counts.min() == 1
    assert near(hidden[:, :, :5].mean(axis=0), 3 / 5, ROWS)
    pairs = hidden[counts == 2][:, :5] @ 2 ** np.arange(5)
    assert near(np.unique(pairs, return_counts=True)[1] / len(pairs), 1 / 10, len(pairs)), "every set alike"


def test_all_masks_the_completion():
    prompt, hidden = drawn("all", 5, samples=1)
    assert hidden.all() and near(prompt.mean(axis=0), 0.15, ROWS)


@pytest.mark.parametrize(("length", "counts"), [(12, {3, 4, 5, 6, 7, 8, 9}), (5, {1, 2, 3}), (1, {1})])
def test_counts_stay_within_the_shares(length, counts):
    """max(floor(v / 4), 1) to floor(3 v / 4), and one at least where that is none."""
    _, hidden = drawn("random", length, min_masked=0.25, max_masked=0.75)
    assert set(np.unique(hidden[:, :, :length].sum(axis=2))) == counts


def test_draws_are_named_by_run_group_and_update_and_touch_no_global_generator():
    group, objective = text_group([2] * 12, [3] * 7, C=12, block=4), Spg(SpgConfig())

    def draw(group, context):
        masks = objective.draw(group, np.array([12, 8]), context)
        return [hidden.tolist() for row in masks for mask in row for hidden in mask]

    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    ours = draw(group, context())
    assert draw(group, context()) == ours
    others = [draw(group, context(1)), draw(group, context(run_seed=4))]
    others.append(draw(dataclasses.replace(group, group_id=1), context()))
    assert all(other != ours for other in others), "fresh for another update, run or group"
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_settings_that_contradict_each_other_are_refused():
    sampler = text_group([2] * 12, C=12, block=6).sampler
    assert not SpgConfig().refuses(sampler) and not SpgConfig(samples=3, masking="random").refuses(sampler)
    (problem,) = SpgConfig(samples=3).refuses(sampler)
    assert "block_length=6 gives 2" in problem
    (problem,) = SpgConfig(masking="all").refuses(sampler)
    assert "objective.samples=2 to 1" in problem
    (problem,) = SpgConfig(min_masked=0.5, max_masked=0.25).refuses(sampler)
    assert "min_masked=0.5 is above" in problem


# ---- layout


def plan_gradient(groups, *, ranks: int, views_per_forward: int, shuffle: bool = False, per_forward: bool = False):
    """Gradient of a table that stands in for the model, summed over ranks, with the merged figures."""
    objective = make_objective(SpgConfig())
    plan = plan_update(
        groups,
        objective=objective,
        run_seed=1,
        update_index=1,
        eos_ids=(EOS,),
        ranks=ranks,
        views_per_forward=views_per_forward,
    )
    theta, figures = table(8, scale=0.5), []
    for forward in (forward for rank in plan.forwards for forward in rank):
        if forward.is_pad:
            continue
        units = list(forward.units)
        batch = build(units[::-1] if shuffle else units, groups)
        loss, part = objective.loss(scored(table_logp(theta, batch)), batch)
        (loss / (len(units) if per_forward else plan.normaliser)).backward()
        figures.append(part)
    return theta.grad.numpy(), Statistics.merged(figures).values()


def blocked_groups() -> list[TrajectoryGroup]:
    groups = [random_group(i, prompt=3 + i) for i in range(4)]
    return [
        dataclasses.replace(group, sampler=dataclasses.replace(group.sampler, block_length=4, steps=4))
        for group in groups
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("views_per_forward", [1, 7])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward):
    groups = blocked_groups()
    whole, figures = plan_gradient(groups, ranks=1, views_per_forward=1000)
    for shuffle in (False, True):
        ours, ours_figures = plan_gradient(groups, ranks=ranks, views_per_forward=views_per_forward, shuffle=shuffle)
        assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
        assert ours_figures == pytest.approx(figures)
    assert figures["scored_completions"] > 8


def test_control_a_divisor_per_forward_depends_on_the_layout():
    groups = blocked_groups()
    whole, _ = plan_gradient(groups, ranks=1, views_per_forward=1000, per_forward=True)
    ours, _ = plan_gradient(groups, ranks=2, views_per_forward=7, per_forward=True)
    assert np.linalg.norm(ours - whole) > 1e-2 * np.linalg.norm(whole)
