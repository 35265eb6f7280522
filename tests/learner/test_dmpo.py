"""DMPO: its weights against closed forms, its copies, its loss and gradient, and the target that it is drawn to."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.objectives.base import Remeasured, RowSums, UpdateContext, Weighed
from learner.objectives.copies import copies
from learner.objectives.dmpo import Dmpo, effective_share
from learner.settings.methods.bounds import DmpoConfig
from learner.verification.cases import Arrays
from learner.verification.measurement import Meter
from learner.verification.methods import dmpo as recorded_dmpo
from learner.verification.methods.case import MethodCase, read_method_case, recorded_policy
from tests.support.hand_made import GOLDEN, make_group
from tests.support.one_step_tables import EOS, build

FP32 = Meter("cpu", "float32")
FOLDER = GOLDEN / "methods" / "dmpo"
CONTEXT = UpdateContext(1, 0, 1, (EOS,))


def weights(difference, reward, **config):
    return Dmpo(DmpoConfig(**config)).weights(np.array(difference, float), np.array(reward, float))


# ---- weights


def test_two_completions_by_hand():
    found = weights([0, 0], [1, 0], alpha=1.0)
    assert found.plus_G == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert found.final_G == pytest.approx([0.462117, -0.462117], abs=1e-6)


def test_weights_sum_to_zero_and_don_t_see_a_constant_in_the_reward():
    rng = np.random.default_rng(0)
    d, r = rng.normal(size=6), rng.normal(size=6)
    found = weights(d, r, alpha=0.3)
    assert found.final_G.sum() == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(weights(d, r + 7, alpha=0.3).final_G, found.final_G, atol=1e-12)
    assert weights(d, r, alpha=0.3, centering_strength=0.5).final_G.sum() == pytest.approx(0.5)
    assert weights(d, r, alpha=0.3, centering="mean").final_G.sum() == pytest.approx(0, abs=1e-15)


def test_equal_rewards_have_no_gradient_whatever_policy_and_base_say():
    d = np.random.default_rng(0).normal(size=5)
    assert not weights(d, [0.1] * 5).final_G.any()
    assert weights(d, [0.1] * 5, centering="mean").final_G.any(), "the mean is another centre: the target is the base"


def test_a_warm_target_has_no_gradient_and_a_cold_one_picks_the_best():
    r = [0.2, 1.0, 0.4]
    assert abs(weights([0.3, 0, 0], r, alpha=1e9).final_G).max() < 1e-8
    assert weights([0.3, 0, 0], r, alpha=1e-3).final_G == pytest.approx([-1, 1, 0])
    assert weights([9, 0, 0], r, alpha=0).final_G == pytest.approx(weights([0, 0, 0], r, alpha=1.0).final_G), "no d"


def test_the_effective_sample_size_is_kept_at_its_target():
    reward = np.array([0.0, 0.1, 0.5, 1.0])
    peaked, flat = weights(np.zeros(4), reward), weights(np.zeros(4), reward, ess_target=0.7)
    assert peaked.ess == pytest.approx(0.25, abs=1e-3)
    assert flat.ess == pytest.approx(0.7, abs=1e-6)
    assert weights(np.zeros(4), reward, alpha=100.0, ess_target=0.7).ess > 0.99, "weights that are flat are left alone"
    assert effective_share(np.full(8, 1 / 8)) == pytest.approx(1.0)


# ---- measuring, drawing


def group_of(rewards, C: int = 6, seed: int = 0):
    ids = np.random.default_rng(seed).integers(2, 9, (len(rewards), C))
    return make_group(ids, np.zeros_like(ids), steps=1, rewards=np.array(rewards, np.float32)[:, None])


def test_it_measures_once_per_batch_and_logs_the_effective_sample_size():
    objective = Dmpo(DmpoConfig(alpha=0.5))
    assert isinstance(objective, Weighed) and not objective.measures_each_update
    groups = [group_of([0.0, 1.0, 0.5]), dataclasses.replace(group_of([1.0, 1.0], seed=1), group_id=1)]
    sums = RowSums((np.array([-3.0, -4.0, -5.0]), np.array([-1.0, -2.0])), (np.array([-3.5, -4.0, -4.0]), np.zeros(2)))
    final = objective.weigh(groups, objective.credit(groups), sums)
    expected = objective.weights(np.array([-0.5, 0.0, 1.0]), np.array([0.0, 1.0, 0.5]))
    np.testing.assert_allclose(final.by_group[0], expected.final_G)
    assert not final.by_group[1].any()
    shares = [expected.ess, objective.weights(np.array([1.0, 2.0]), np.ones(2)).ess]
    assert final.statistics.values()["ess"] == pytest.approx(np.mean(shares))
    assert not np.allclose(final.by_group[0], objective.credit(groups)[0], atol=1e-3), "control: d matters"


@pytest.mark.parametrize("antithetic", [True, False])
def test_laws_of_the_masks(antithetic):
    """Rates are uniform on [low, 1]; each of a pair covers what the other leaves."""
    objective = Dmpo(DmpoConfig(antithetic=antithetic, rate_low=0.2))
    group = group_of([0.0] * 400, C=20)
    context = CONTEXT
    before = np.random.get_state()[1].copy()
    mask_GRC = objective.draw(group, 4, context, "masks")
    np.testing.assert_array_equal(before, np.random.get_state()[1])
    assert mask_GRC.shape == (400, 4, 20)
    first = mask_GRC[:, : 2 if antithetic else 4]
    share = first.mean(axis=2)
    assert share.mean() == pytest.approx(0.6, abs=0.03)
    assert (share < 0.1).mean() < 0.1 and (share > 0.9).mean() > 0.08
    assert (mask_GRC[:, :2] == ~mask_GRC[:, 2:]).all() == antithetic
    np.testing.assert_array_equal(mask_GRC, objective.draw(group, 4, context, "masks"))
    later = dataclasses.replace(context, update_index=1)
    for other in ((4, later, "masks"), (4, context, "measured masks")):
        assert (objective.draw(group, *other) != mask_GRC).any()


def test_a_rows_measured_sum_is_its_bound_and_unmasked_copies_score_nothing():
    objective = Dmpo(DmpoConfig())
    group = group_of([0.0, 1.0])
    units = objective.measured(0, group, CONTEXT)
    assert [{view.row for view in unit} for unit in units] == [{0}, {1}]
    for unit in units:
        assert sum(view.weight * view.scored_n.size for view in unit) == pytest.approx(6 * len(unit) / 4)
    assert not copies(0, 0, np.zeros((2, 6), bool), 1.0, 1.0)


# ---- loss


def test_the_gradient_is_that_of_the_weighted_cross_entropy_over_all_masks():
    """All masks of two positions, weighed alike, against finite differences of the stated loss."""
    group = group_of([0.0, 1.0, 0.3], C=2)
    objective = Dmpo(DmpoConfig(alpha=0.5))
    (credit,) = objective.credit([group])
    rng = np.random.default_rng(3)
    table = rng.normal(size=(4, 2, 10))  # by what is masked, position, token
    masks = [np.array(mask, bool) for mask in itertools.product([False, True], repeat=2) if any(mask)]

    def stated(theta: np.ndarray, share: bool = True) -> float:
        logp = theta - np.log(np.exp(theta).sum(axis=-1, keepdims=True))
        total = 0.0
        for row, mask in itertools.product(range(3), masks):
            state = int(mask @ [1, 2])
            for position in np.flatnonzero(mask):
                total -= (
                    credit[row]
                    / (mask.sum() if share else 1)
                    * logp[state, position, group.completion_ids[row, position]]
                    / 4
                )
        return total

    views = [view for row in range(3) for view in copies(0, row, np.array(masks), float(credit[row]), 1 / 4)]
    batch = build([(view,) for view in views], [group])
    states_N = np.array([int(view.hidden_C @ [1, 2]) for view in views])[batch.view_of_score]
    theta = torch.tensor(table, requires_grad=True)
    logp_N = theta.log_softmax(-1)[states_N, batch.position, batch.targets]
    loss, figures = objective.loss(PolicyScores(Scores(logp_N, logp_N)), batch)
    loss.backward()
    assert loss.item() == pytest.approx(stated(table), rel=1e-12)
    direction = rng.normal(size=table.shape)
    slope, wrong = (
        (stated(table + 1e-6 * direction, share) - stated(table - 1e-6 * direction, share)) / 2e-6
        for share in (True, False)
    )
    assert float((theta.grad.numpy() * direction).sum()) == pytest.approx(slope, rel=1e-6)
    assert figures.values()["scored_tokens"] == 12
    assert abs(wrong - slope) > 0.05 * abs(slope), "control: without each mask's size the gradient is another"


def test_its_own_completions_weighted_draw_the_policy_to_the_target():
    """With every completion of a group as often as the policy writes it, w+ is the target's probability over the
    policy's: the weighted likelihood is stationary at p_base exp(r / alpha) and nowhere else."""
    rng = np.random.default_rng(5)
    base, reward, alpha = rng.dirichlet(np.ones(4)), rng.random(4), 0.5
    target = base * np.exp(reward / alpha)
    target /= target.sum()
    group = np.repeat(np.arange(4), [5, 2, 2, 1])  # completions of a policy with these shares
    policy = np.bincount(group) / group.size
    found = weights(np.log(base / policy)[group], reward[group], alpha=alpha, centering_strength=0.0)
    mass = np.bincount(group, found.plus_G)
    np.testing.assert_allclose(mass, target, rtol=1e-12)
    blind = weights(np.zeros(group.size), reward[group], alpha=alpha, centering_strength=0.0)
    assert abs(np.bincount(group, blind.plus_G) - target).max() > 0.02, "control: without d the target is another"


def test_unbiased_centering_leaves_the_gradient_of_a_policy_that_has_moved():
    """With every completion as often as the old policy writes it, u is the present policy's probability over the old
    one's, and what it takes off adds up to 0; what a mean takes off doesn't."""
    rng = np.random.default_rng(6)
    base, reward, logits = rng.dirichlet(np.ones(4)), rng.random(4), rng.normal(size=4)
    present = np.exp(logits) / np.exp(logits).sum()
    group = np.repeat(np.arange(4), [5, 2, 2, 1])
    old = np.bincount(group) / group.size
    score_G4 = np.eye(4)[group] - present  # the slope of each completion's log-prob by the logits
    slopes = {}
    for centering, strength in (("mean", 0.0), ("unbiased", 1.0), ("mean", 1.0)):
        objective = Dmpo(DmpoConfig(alpha=0.5, centering=centering, centering_strength=strength))
        d_G, moved_G = np.log(base / old)[group], np.log(present / old)[group]
        found = objective.weights(d_G, reward[group], moved_G=moved_G)
        slopes[centering, strength] = -found.final_G @ score_G4
    target = base * np.exp(reward / 0.5)
    np.testing.assert_allclose(slopes["mean", 0.0], present - target / target.sum(), atol=1e-12)
    np.testing.assert_allclose(slopes["unbiased", 1.0], slopes["mean", 0.0], atol=1e-12)
    assert abs(slopes["mean", 1.0] - slopes["mean", 0.0]).max() > 0.1, "control"


def test_unbiased_centering_measures_the_copies_of_the_loss_before_every_update():
    objective, group = Dmpo(DmpoConfig(centering="unbiased", alpha=0.5)), group_of([0.0, 1.0, 0.5])
    assert isinstance(objective, Remeasured) and not Dmpo(DmpoConfig()).remeasured(0, group, CONTEXT)
    for update in range(2):
        context = dataclasses.replace(CONTEXT, update_index=update)
        units = objective.remeasured(0, group, context)
        scored = [view for unit in objective.wanted(0, group, np.ones(3), context).units for view in unit]
        measured = [view for unit in units for view in unit]
        assert [(v.row, v.hidden_C.tolist()) for v in measured] == [(v.row, v.hidden_C.tolist()) for v in scored]
        assert sum(v.weight * v.scored_n.size for v in units[0]) == pytest.approx(6 * len(units[0]) / 4)

    begun, base, present = np.array([-3.0, -4.0, -5.0]), np.array([-3.5, -4.0, -4.0]), np.array([-3.2, -3.0, -5.5])
    sums = RowSums((begun,), (base,), (present,))
    (final_G,) = objective.weigh([group], objective.credit([group]), sums).by_group
    plus_G = objective.weights(base - begun, np.array([0.0, 1.0, 0.5])).plus_G
    u_G = np.exp(present - begun) / np.exp(present - begun).sum()
    np.testing.assert_allclose(final_G, plus_G - u_G, rtol=1e-12)
    np.testing.assert_allclose(objective.credit([group])[0].sum(), 0, atol=1e-12)
    assert abs(final_G - (plus_G - 1 / 3)).max() > 0.1, "control: the mean is another"


def test_what_unbiased_centering_costs():
    sampler = group_of([0.0]).sampler
    plain, unbiased = (DmpoConfig(samples=6, centering=c).cost(sampler) for c in ("negative", "unbiased"))
    assert unbiased == dataclasses.replace(plain, remeasured=6)


def test_settings_that_can_t_work_are_refused():
    sampler = group_of([0.0]).sampler
    assert DmpoConfig(samples=3).refuses(sampler) == ["objective.samples=3 is odd, and antithetic copies are pairs"]
    assert not DmpoConfig(samples=3, antithetic=False).refuses(sampler)


# ---- recordings


def recording(**centering) -> MethodCase:
    """The recording of two processes as if this centering had been on: unbiased, a softmax over a process' rows of the
    bound of the loss' own scores less that of the rollout, by the code's formulas in float64; or none at all. Its
    gradient is by plain autograd. (The code's own recordings of these aren't here.)"""
    case = read_method_case(FOLDER, "03_wdce_group_spans_two_ranks")
    raw = {**case.raw["config"], "centering_strength": 0.7, **centering}
    arrays, P, C, Q, B, K = dict(case.arrays.by_name), case.settings.P, case.settings.C, 2, 4, 4
    m_QKB = arrays["loss_m"].astype(float).reshape(Q, K, B)
    ce_QKB = arrays["token_ce"].astype(float).reshape(Q, K, B, C).sum(-1)
    theta_QB = -(C / m_QKB * ce_QKB).mean(1)
    powers_QB = np.exp(theta_QB - arrays["elbo_cur"].astype(float).reshape(Q, B))
    centre_QB = powers_QB / powers_QB.sum(1, keepdims=True)
    strength = 0.7 if raw["advantage_centering"] else 0.0
    weight_QB = arrays["w_plus"].astype(float).reshape(Q, B) - strength * centre_QB
    arrays |= {
        "elbo_theta": theta_QB[None],
        "centering_factor": np.tile(centre_QB, K)[None],
        "row_weight": np.tile(weight_QB, K)[None],
        "losses": (ce_QKB / m_QKB * weight_QB[:, None]).sum((1, 2))[None] / K,
    }
    inputs = torch.from_numpy(arrays["loss_inputs"]).reshape(Q * K * B, P + C)
    ids = torch.from_numpy(arrays["completion_ids"]).reshape(Q, 1, B, C).expand(Q, K, B, C).reshape(-1, C, 1)
    share = torch.from_numpy(
        (weight_QB[:, None] / m_QKB / K).reshape(-1, 1) * (arrays["loss_inputs"][0, ..., P:] == 2).reshape(-1, C)
    )
    with recorded_policy(case, FP32) as policy:
        policy.use("cur")
        logp = policy.model(input_ids=inputs).logits[:, P:].log_softmax(-1).gather(2, ids)[..., 0]
        arrays |= {f"grad/{name}": g for name, g in policy.gradient(-(share * logp).sum()).items()}
    if not strength:
        del arrays["centering_factor"], arrays["elbo_theta"]
    return dataclasses.replace(case, raw={**case.raw, "config": raw}, arrays=Arrays(arrays))


def test_unbiased_centering_as_the_code_has_it(monkeypatch):
    case = recording(advantage_centering_unbias=True)
    found = recorded_dmpo.check(case, FP32)
    assert all(measurement.passed for measurement in found)
    assert any(measurement.where.startswith("elbo_theta") for measurement in found)
    assert np.ptp(case.arrays.by_name["centering_factor"]) > 0.5, "far from the mean"
    for wrong in (
        lambda self, d, r, c=None, moved_G=None: RIGHT(self, d, r, c),
        lambda self, d, r, c=None, moved_G=None: RIGHT(self, d, r, c, None if moved_G is None else -moved_G),
    ):
        monkeypatch.setattr(Dmpo, "weights", wrong)
        assert {m.quantity for m in recorded_dmpo.check(case, FP32) if not m.passed} == {"weights"}, "control"


def test_no_centering_as_the_code_has_it(monkeypatch):
    case = recording(advantage_centering=False)
    assert all(measurement.passed for measurement in recorded_dmpo.check(case, FP32))
    monkeypatch.setattr(Dmpo, "weights", lambda self, d, r, c=None: dataclasses_weights(self, d, r, c, strength=0.7))
    assert {m.quantity for m in recorded_dmpo.check(case, FP32) if not m.passed} == {"weights"}, "control"


WRONG = {
    "no centre": lambda self, d, r, c=None: dataclasses_weights(self, d, r, c, strength=0.0),
    "d with another sign": lambda self, d, r, c=None: RIGHT(self, -d, r, c),
    "alpha as a factor": lambda self, d, r, c=None: RIGHT(self, d, r * self.config.alpha**2, c),
}
RIGHT = Dmpo.weights


def dataclasses_weights(self, d, r, c, strength):
    changed = Dmpo(self.config.model_copy(update={"centering_strength": strength}))
    return RIGHT(changed, d, r, c)


@pytest.mark.parametrize("wrong", WRONG)
def test_control_wrong_weights_are_found(monkeypatch, wrong):
    monkeypatch.setattr(Dmpo, "weights", WRONG[wrong])
    found = recorded_dmpo.check(read_method_case(FOLDER, "01_wdce_default_onpolicy"), FP32)
    assert "weights" in {measurement.quantity for measurement in found if not measurement.passed}


def test_control_a_loss_without_the_masks_share_is_found(monkeypatch):
    monkeypatch.setattr(
        recorded_dmpo, "copies", lambda index, row, mask_RC, credit, weight: tuple(
            view._replace(weight=weight) for view in copies(index, row, mask_RC, credit, weight)
        )
    )  # fmt: skip
    found = recorded_dmpo.check(read_method_case(FOLDER, "05_wdce_plain_iid_adacoeff_alpha0"), FP32)
    failing = {measurement.quantity for measurement in found if not measurement.passed}
    assert {"ELBO", "ELBO loss", "gradient of the ELBO loss"} <= failing
