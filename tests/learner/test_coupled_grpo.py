"""coupled-GRPO: its recorded cases, its views and draws, its loss and gradient against closed forms."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, Unit, ViewBatch, build_batch
from learner.objectives import coupled_grpo, make_objective
from learner.objectives.base import UpdateContext
from learner.objectives.coupled_grpo import CoupledGrpo, coupled_unit
from learner.objectives.diffu_grpo import DiffuGrpo
from learner.objectives.one_step import one_step_unit
from learner.objectives.ratio import clipped_terms, k3
from learner.objectives.statistics import Statistics
from learner.ranks.plan import plan_update
from learner.settings.methods.one_step import CoupledGrpoConfig, DiffuGrpoConfig
from learner.verification.cases import Arrays
from learner.verification.measurement import Meter
from learner.verification.methods import coupled
from learner.verification.methods.case import MethodCase, read_method_case, recorded_policy
from rollout.trajectory import TrajectoryGroup
from tests.support.hand_made import GOLDEN, make_group, random_group

EOS, MASK, V, C = 1, 9, 9, 4


def context(update_index: int = 0, run_seed: int = 3) -> UpdateContext:
    return UpdateContext(run_seed, update_index, groups=1, eos_ids=(EOS,))


def build(units: list[Unit], groups: list[TrajectoryGroup]) -> ViewBatch:
    views = [view for unit in units for view in unit]
    return build_batch(views, groups, mask_id=MASK, pad_id=0, law=Law.RAW, unit_sizes=[len(unit) for unit in units])


def scored(logp_N: torch.Tensor, old_N: torch.Tensor | None = None, reference_N: torch.Tensor | None = None):
    parts = (logp_N, logp_N.detach() if old_N is None else old_N, reference_N)
    return PolicyScores(*(None if part is None else Scores(part, torch.ones_like(part)) for part in parts))


def text_group(*texts: list[int], rewards: list[float] | None = None) -> TrajectoryGroup:
    """Completions of C positions, filled with EOS."""
    ids = [text + [EOS] * (C - len(text)) for text in texts]
    return make_group(
        ids, [list(range(C))] * len(ids), steps=C, rewards=None if rewards is None else [[r] for r in rewards]
    )


# ---- recorded cases


def failed(name: str, change=lambda case: case) -> set[str]:
    """Quantities of a recorded case, perhaps changed, that are out of bounds."""
    case = change(read_method_case(GOLDEN / "methods" / "coupled", name))
    return {found.quantity for found in coupled.check(case, Meter("cpu", "float32")) if not found.passed}


@pytest.mark.parametrize("name", ["01_onpolicy_mu1", "02_ga2_mu2_kl_offpolicy"])
def test_recorded_cases_come_out_again(name):
    assert failed(name) == set()


def by_share(index, row, mask_C, rate, length, credit):
    return coupled_unit(index, row, mask_C, float(mask_C.mean()), length, credit)


def unclipped(log_ratio_T, advantage_T, *, clip):
    return clipped_terms(log_ratio_T, advantage_T, clip=(1.0, 1e9))


def mean_of_rows(config):
    return CoupledGrpo(config.model_copy(update={"average": "sequence"}))


@pytest.mark.parametrize(
    ("where", "name", "wrong", "quantities"),
    [
        (coupled_grpo, "k3", lambda logp, reference: k3(reference, logp), {"loss", "row values"}),
        (coupled_grpo, "clipped_terms", unclipped, {"loss", "row values", "clip fraction"}),
        (coupled, "coupled_unit", by_share, {"token log-probs", "ratios", "loss", "gradient of the loss"}),
        (coupled, "CoupledGrpo", mean_of_rows, {"loss", "row values", "gradient of the loss"}),
    ],
)
def test_control_a_wrong_rule_does_not_come_out(monkeypatch, where, name, wrong, quantities):
    monkeypatch.setattr(where, name, wrong)
    assert quantities <= failed("02_ga2_mu2_kl_offpolicy")


def as_raw(case: MethodCase) -> MethodCase:
    """The case as the official code computes it from unshifted outputs: it reads token j at position j - 1."""
    arrays, P = dict(case.arrays.by_name), case.settings.P
    ids, m = torch.from_numpy(case.completion_ids), torch.from_numpy(arrays["mask_m"][0]).bool()
    text, t = torch.from_numpy(case.completion_mask), float(arrays["mask_ratio"][0])
    with recorded_policy(case, Meter("cpu", "float32")) as policy:
        logits = torch.stack([policy.model(input_ids=torch.from_numpy(x)).logits for x in arrays["noised_ids"][0]])
        law = logits[:, :, P - 1 : -1].log_softmax(-1)
        full, masked, complement = law.gather(-1, ids.expand(3, -1, -1)[..., None])[..., 0]
        new = (full + torch.where(m, masked / t, complement / (1 - t))) / 2
        advantages = torch.from_numpy(arrays["advantages"])[:, None]
        gradient = policy.gradient(-(advantages * new)[text].sum() / text.sum())
    arrays |= {f"grad/{name}": value for name, value in gradient.items()}
    arrays["view_logps"] = torch.stack([full, masked, complement])[None].detach().numpy()
    arrays["new_logps"] = new[None].detach().numpy()
    return dataclasses.replace(case, raw={**case.raw, "model_outputs": "raw"}, arrays=Arrays(arrays))


def test_a_model_of_raw_outputs_is_read_one_position_lower():
    assert failed("01_onpolicy_mu1", as_raw) == set()

    def unsaid(case):
        return dataclasses.replace(as_raw(case), raw=case.raw)

    assert failed("01_onpolicy_mu1", unsaid) == {"token log-probs", "gradient of the loss"}, "control"


# ---- views


def test_every_token_of_the_text_is_scored_once_by_the_pair_and_once_all_masked():
    group = random_group(0, size=6, length=12)
    objective = CoupledGrpo(CoupledGrpoConfig())
    wanted = objective.wanted(0, group, np.ones(6), context())
    rate, mask_GC = objective.draw(group, context())
    ends = [list(row).index(EOS) + 1 if EOS in row else 12 for row in group.completion_ids.tolist()]
    assert len(set(ends)) > 1, "control: texts of several lengths"
    for row, unit in enumerate(wanted.units):
        full, *pair = unit
        assert full.hidden_C.all() and full.weight == 0.5 and full.scored_n.tolist() == list(range(ends[row]))
        assert sorted(np.concatenate([view.scored_n for view in pair])) == list(range(ends[row]))
        for view in pair:
            drawn = (view.hidden_C == mask_GC[row]).all()
            assert drawn or (view.hidden_C == ~mask_GC[row]).all()
            assert view.weight == pytest.approx(0.5 / (rate if drawn else 1 - rate)), "the drawn rate, not its share"
            assert view.hidden_C[view.scored_n].all() and view.hidden_P is None


def test_a_view_that_scores_nothing_is_left_out():
    assert [view.weight for view in coupled_unit(0, 0, np.array([True, False]), 0.25, 1, 1.0)] == [0.5, 2.0]


def test_rows_without_gradient_are_left_out_and_stay_in_the_divisor():
    group = text_group([2, 3], [2, 3, 4], [5], [6, 7], rewards=[1, 1, 1, 1])
    silent = np.zeros(4)
    for average, divisor in (("sequence", 4.0), ("token", 3 + 4 + 2 + 3)):
        for beta, units in ((0.0, 0), (0.1, 4)):
            wanted = CoupledGrpo(CoupledGrpoConfig(average=average, beta=beta)).wanted(0, group, silent, context())
            assert len(wanted.units) == units and wanted.divisor == divisor
    some = np.array([0.0, 1.0, 0.0, -1.0])
    objective = CoupledGrpo(CoupledGrpoConfig(beta=0))
    few, all_ = (objective.wanted(0, group, credit, context()).units for credit in (some, np.ones(4)))
    for unit in few:  # the draws don't depend on which rows are left out
        for view, other in zip(unit, all_[unit[0].row], strict=True):
            np.testing.assert_array_equal(view.hidden_C, other.hidden_C)


def test_credit_is_leave_one_out():
    group = text_group([2], [3], [4], rewards=[1, 0, 0.5])
    (credit,) = CoupledGrpo(CoupledGrpoConfig()).credit([group])
    np.testing.assert_allclose(credit, [0.75, -0.75, 0.0])
    (scaled,) = CoupledGrpo(CoupledGrpoConfig(scale_advantages=True)).credit([group])
    np.testing.assert_allclose(scaled, np.array([0.75, -0.75, 0.0]) / (0.5 + 1e-4))


# ---- draws


def test_draws_have_the_stated_laws():
    group, config = random_group(0, size=4, length=64, per_step=4), CoupledGrpoConfig(mask_low=0.3, mask_high=0.6)
    objective, rates, error, marked = CoupledGrpo(config), [], [], np.zeros((4, 64))
    for seed in range(1500):
        rate, mask_GC = objective.draw(group, context(run_seed=seed))
        rates.append(rate)
        error.append((mask_GC.sum() - 256 * rate) / np.sqrt(256 * rate * (1 - rate)))
        marked += mask_GC
    assert 0.3 <= min(rates) < 0.302 and 0.598 < max(rates) <= 0.6
    assert np.mean(rates) == pytest.approx(0.45, abs=4 * 0.3 / np.sqrt(12 * 1500))
    assert np.mean(error) == pytest.approx(0, abs=4 / np.sqrt(1500)), "counts are binomial at the rate"
    assert np.var(error) == pytest.approx(1, abs=4 * np.sqrt(2 / 1500))
    assert abs(marked / 1500 - 0.45).max() < 4.5 * np.sqrt(0.25 / 1500), "every row and position alike"


def test_draws_are_named_by_run_group_and_update_and_touch_no_global_generator():
    group, objective = random_group(0), CoupledGrpo(CoupledGrpoConfig())
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    rate, mask_GC = objective.draw(group, context())
    again, mask_again_GC = objective.draw(group, context())
    assert rate == again and (mask_GC == mask_again_GC).all()
    others = [objective.draw(group, context(1)), objective.draw(group, context(run_seed=4))]
    others += [objective.draw(dataclasses.replace(group, group_id=1), context())]
    assert len({rate, *(other for other, _ in others)}) == 4, "fresh for another update, run or group"
    assert not any((mask_GC == mask).all() for _, mask in others)
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_rates_the_wrong_way_round_are_refused():
    sampler = random_group(0).sampler
    (problem,) = CoupledGrpoConfig(mask_low=0.8, mask_high=0.2).refuses(sampler)
    assert "mask_low=0.8 is above" in problem and not CoupledGrpoConfig().refuses(sampler)


# ---- loss and gradient


def test_loss_and_slopes_of_a_batch_by_hand():
    """Two completions of lengths 1 and 3: ratios, clip, KL and both averages from the formulas of the method."""
    group, rate = text_group([EOS], [2, 3, EOS]), 0.25
    masks = np.array([[True, False, False, False], [False, True, False, True]])
    units = [coupled_unit(0, row, masks[row], rate, length, a) for row, length, a in ((0, 1, 2.0), (1, 3, -1.0))]
    batch = build(units, [group])
    assert batch.position.tolist() == [0, 0, 0, 1, 2, 1, 0, 2]
    rng = np.random.default_rng(0)
    logp, old, reference = (torch.tensor(-1 + 0.3 * rng.normal(size=8), requires_grad=i == 0) for i in range(3))
    weights = [1 / 2, 1 / 2 / rate]  # a token of m; for others 1 - t
    pairs = [(0, 1, weights[1]), (2, 6, 1 / 2 / 0.75), (3, 5, weights[1]), (4, 7, 1 / 2 / 0.75)]
    for average, divisors in (("sequence", (1, 3, 3, 3)), ("token", (1, 1, 1, 1))):
        config = CoupledGrpoConfig(average=average, clip_low=0.1, clip_high=0.15, beta=0.3)
        loss, figures = CoupledGrpo(config).loss(scored(logp, old, reference), batch)
        (slope,) = torch.autograd.grad(loss, logp)
        expected, low, high = 0.0, 0, 0
        for (full, paired, w), divisor, advantage in zip(pairs, divisors, (2.0, -1.0, -1.0, -1.0), strict=True):
            new, before, ref = (0.5 * x[full] + w * x[paired] for x in (logp, old, reference))
            rho, d = (new - before).exp(), ref - new
            surrogate = torch.min(rho * advantage, rho.clamp(0.9, 1.15) * advantage)
            expected = expected + (-surrogate + 0.3 * (d.exp() - d - 1)) / divisor
            low, high = low + int(rho < 0.9 and advantage < 0), high + int(rho > 1.15 and advantage > 0)
        (wanted,) = torch.autograd.grad(expected, logp)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(slope, wanted, rtol=1e-10)
        named = figures.values()
        assert named["scored_tokens"] == 4 and named["kl"] > 0 and low + high > 0, "control: some tokens are clipped"
        assert (named["clip_fraction/low"], named["clip_fraction/high"]) == (low / 4, high / 4)


def table(seed: int = 0) -> torch.Tensor:
    """A denoiser: free logits of every state, position and token, [2^C states of what is masked, C, V] float64. The
    states of one completion differ in what is masked only."""
    return torch.tensor(np.random.default_rng(seed).normal(size=(2**C, C, V)), requires_grad=True)


def table_logp(theta: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    states_Z = (batch.input_ids[:, -C:] == MASK) @ 2 ** np.arange(C)
    return theta.log_softmax(-1)[states_Z[batch.view_of_score], batch.position, batch.targets]


def expected_gradient(weigh, theta: torch.Tensor, group: TrajectoryGroup, rate: float, credit: float) -> np.ndarray:
    """Of the loss of one completion, over all masks by their probabilities; ``weigh`` may change a unit."""
    total = np.zeros(tuple(theta.shape))
    for bits in itertools.product([False, True], repeat=C):
        mask = np.array(bits)
        batch = build([weigh(coupled_unit(0, 0, mask, rate, 3, credit), mask)], [group])
        loss, _ = CoupledGrpo(CoupledGrpoConfig(beta=0)).loss(scored(table_logp(theta, batch)), batch)
        (gradient,) = torch.autograd.grad(loss, theta)
        total += rate ** mask.sum() * (1 - rate) ** (C - mask.sum()) * gradient.numpy()
    return total


def test_the_expected_gradient_over_all_masks_is_that_of_three_mean_log_probs():
    """Before the policy has moved: - (A/len) sum over tokens of (1/2) grad (log p all masked + mean log p at rate t +
    mean log p at rate 1 - t), each mean over what else is masked, the token being so."""
    theta, group, rate, credit = table(), text_group([2, 3, EOS]), 0.3, 1.5
    logp = theta.log_softmax(-1)
    value = torch.zeros((), dtype=torch.float64)
    for j in range(3):
        token = int(group.completion_ids[0, j])
        value = value + logp[2**C - 1, j, token] / 2
        others = [i for i in range(C) if i != j]
        for bits in itertools.product([0, 1], repeat=C - 1):
            state = 2**j + sum(2**i for i, bit in zip(others, bits, strict=True) if bit)
            for r in (rate, 1 - rate):
                value = value + r ** sum(bits) * (1 - r) ** (C - 1 - sum(bits)) * logp[state, j, token] / 2
    (exact,) = torch.autograd.grad(-credit / 3 * value, theta)
    ours = expected_gradient(lambda unit, mask: unit, theta, group, rate, credit)
    assert np.linalg.norm(ours - exact.numpy()) < 1e-12 * np.linalg.norm(exact)

    def by_share(unit: Unit, mask: np.ndarray) -> Unit:
        return tuple(v if i == 0 else v._replace(weight=0.5 / v.hidden_C.mean()) for i, v in enumerate(unit))

    def uncoupled(unit: Unit, mask: np.ndarray) -> Unit:
        return tuple(v for i, v in enumerate(unit) if i == 0 or (v.hidden_C == mask).all())

    for control in (by_share, uncoupled):
        wrong = expected_gradient(control, theta, group, rate, credit)
        assert np.linalg.norm(wrong - exact.numpy()) > 0.02 * np.linalg.norm(exact), control.__name__


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_a_mask_of_everything_makes_it_diffu_grpo(average):
    """At rate 1 the pair is the all-masked view again: a token's log-prob is that view's, as it is in diffu-GRPO with a
    clean prompt."""
    group, settings = text_group([2, 3, EOS], [4]), {"average": average, "beta": 0.1, "clip_low": 0.5, "clip_high": 0.5}
    clean_P = np.zeros(group.prompt_ids.size, dtype=bool)
    weights = (1 / 3, 1 / 2) if average == "sequence" else (1.0, 1.0)
    rows = ((0, 3, -1.0, weights[0]), (1, 2, 1.0, weights[1]))
    almost = 1 - 1e-15
    pairs = [coupled_unit(0, row, np.ones(C, bool), almost, length, credit) for row, length, credit, _ in rows]
    single = [one_step_unit(group, 0, row, clean_P, length, credit, w) for row, length, credit, w in rows]
    assert [len(unit) for unit in pairs] == [2, 2]
    found = []
    for objective, units in (
        (CoupledGrpo(CoupledGrpoConfig(**settings)), pairs),
        (DiffuGrpo(DiffuGrpoConfig(**settings)), single),
    ):
        batch, theta = build(units, [group]), table()
        loss, figures = objective.loss(scored(*(table_logp(t, batch) for t in (theta, table(1), table(2)))), batch)
        found.append((loss.item(), torch.autograd.grad(loss, theta)[0].numpy(), figures.values()))
    (ours, gradient, figures), (other, other_gradient, other_figures) = found
    assert ours == pytest.approx(other, rel=1e-12) and figures == pytest.approx(other_figures)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-10)
    assert figures["clip_fraction/low"] > 0 or figures["clip_fraction/high"] > 0


# ---- layout


def plan_gradient(
    groups,
    *,
    ranks: int,
    views_per_forward: int,
    average: str = "sequence",
    shuffle: bool = False,
    per_forward: bool = False,
):
    """Gradient of a table that stands in for the model, summed over ranks, with the merged figures; what is old and
    the reference are tables too."""
    objective = make_objective(CoupledGrpoConfig(average=average, beta=0.05, clip_low=0.1, clip_high=0.1))
    plan = plan_update(
        groups,
        objective=objective,
        run_seed=1,
        update_index=1,
        eos_ids=(EOS,),
        ranks=ranks,
        views_per_forward=views_per_forward,
    )
    rng = np.random.default_rng(0)
    theta, old, reference = (torch.tensor(rng.normal(size=(2, 8, 10)), requires_grad=i == 0) for i in range(3))
    figures = []
    for forward in (forward for rank in plan.forwards for forward in rank):
        if forward.is_pad:
            continue
        units = list(forward.units)
        batch = build(units[::-1] if shuffle else units, groups)
        all_masked_N = (batch.input_ids[:, -8:] == MASK).all(axis=1).astype(int)[batch.view_of_score]
        loss, part = objective.loss(
            scored(*(t.log_softmax(-1)[all_masked_N, batch.position, batch.targets] for t in (theta, old, reference))),
            batch,
        )
        (loss / (len(units) if per_forward else plan.normaliser)).backward()
        figures.append(part)
    return theta.grad.numpy(), Statistics.merged(figures).values()


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("views_per_forward", [1, 7])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward, average):
    groups = [random_group(i, prompt=3 + i) for i in range(4)]
    whole, figures = plan_gradient(groups, ranks=1, views_per_forward=1000, average=average)
    layout = {"ranks": ranks, "views_per_forward": views_per_forward, "average": average}
    for shuffle in (False, True):
        ours, ours_figures = plan_gradient(groups, **layout, shuffle=shuffle)
        assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
        assert ours_figures == pytest.approx(figures)
    assert figures["clip_fraction/high"] > 0 and figures["kl"] > 0


def test_control_a_divisor_per_forward_depends_on_the_layout():
    groups = [random_group(i) for i in range(4)]
    whole, _ = plan_gradient(groups, ranks=1, views_per_forward=1000, per_forward=True)
    ours, _ = plan_gradient(groups, ranks=2, views_per_forward=7, per_forward=True)
    assert np.linalg.norm(ours - whole) > 1e-2 * np.linalg.norm(whole)


def test_the_settings_reach_the_method():
    assert isinstance(make_objective(CoupledGrpoConfig()), CoupledGrpo)
    assert CoupledGrpo(CoupledGrpoConfig()).needs.old and CoupledGrpo(CoupledGrpoConfig()).needs.reference
    assert not CoupledGrpo(CoupledGrpoConfig(beta=0)).needs.reference
