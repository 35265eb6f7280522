"""DTM: its minimiser against the tilted posterior, its states and draws, its target's edges, and the recorded cases."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, View, build_batch
from learner.objectives.base import UpdateContext
from learner.objectives.dtm import Dtm
from learner.ranks.plan import plan_update
from learner.settings.methods.matching import DtmConfig
from learner.settings.run import load_config
from learner.verification.measurement import Meter
from learner.verification.methods import dtm as recorded_dtm
from learner.verification.methods.case import read_method_case
from rewards.errors import ConfigError, DataError
from tests.support.hand_made import GOLDEN, make_group

FOLDER = GOLDEN / "methods" / "dtm"
EOS, MASK = 1, 9


def group_of(rewards, C: int = 8, seed: int = 0, group_id: int = 0, vocabulary: int = 8):
    ids = np.random.default_rng([seed, group_id]).integers(0, vocabulary, (len(rewards), C))
    parts = np.array(rewards, np.float32)[:, None]
    return make_group(ids, np.zeros_like(ids), steps=1, rewards=parts, group_id=group_id)


def context(update_index: int = 0, phase: int = 0, groups: int = 1) -> UpdateContext:
    return UpdateContext(1, update_index, groups, (EOS,), phase)


def scored(policy_NV: torch.Tensor, teacher_NV: torch.Tensor, targets: np.ndarray) -> PolicyScores:
    """Scores of laws given as log-probs."""

    def scores(law_NV: torch.Tensor) -> Scores:
        logp_N = law_NV.gather(1, torch.from_numpy(targets).unsqueeze(1)).squeeze(1)
        return Scores(logp_N, torch.ones_like(logp_N), law_NV=law_NV)

    return PolicyScores(scores(policy_NV), teacher=scores(teacher_NV))


def built(views, groups):
    return build_batch(views, groups, mask_id=MASK, pad_id=0, law=Law.RAW)


# ---- the minimiser


def expected_targets(c: float, h: float, *, teacher_error: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The normalised mean target at every state of three positions with two tokens, the teacher being the law's own
    posterior; and the posterior of the tilted law. Both [states, 3, 2], NaN where a position shows."""
    C, V = 3, 2
    rng = np.random.default_rng(0)
    texts = np.array(list(itertools.product(range(V), repeat=C)))
    law, reward = rng.dirichlet(np.ones(len(texts))), rng.random(len(texts)).round(2)
    groups = [
        make_group([text], [[0] * C], steps=1, rewards=[[r]], group_id=g)
        for g, (text, r) in enumerate(zip(texts, reward, strict=True))
    ]
    tilted = law * np.exp(h * reward)
    objective = Dtm(DtmConfig(control_variate=c, tilt_step=h))
    states = [np.array(bits) for bits in itertools.product([False, True], repeat=C)][1:]
    shown = {tuple(np.where(state, -1, text)) for state in states for text in texts}
    found, expected = [], []
    for key in sorted(shown):
        hidden_C = np.array(key) == -1
        of = [g for g, text in enumerate(texts) if (np.where(hidden_C, -1, text) == key).all()]
        scored_n = np.flatnonzero(hidden_C)
        views = [View(g, 0, hidden_C, scored_n, h * reward[g], weight=float(law[g])) for g in of]
        batch = built(views, groups)

        def posterior(weights: np.ndarray, of=of) -> np.ndarray:
            return np.array(
                [[weights[of][texts[of, i] == v].sum() / weights[of].sum() for v in range(V)] for i in range(C)]
            )

        own = posterior(law)
        own[0] = (1 - teacher_error) * own[0] + teacher_error / V
        teacher_NV = torch.from_numpy(np.log(own[batch.position]))
        policy_NV = torch.zeros_like(teacher_NV, requires_grad=True)
        objective.loss(scored(policy_NV, teacher_NV, batch.targets), batch)[0].backward()
        target_CV = np.full((C, V), np.nan)
        for i in scored_n:
            mean_V = -policy_NV.grad.numpy()[batch.position == i].sum(axis=0)
            target_CV[i] = mean_V / mean_V.sum()
        found.append(target_CV)
        expected.append(np.where(hidden_C[:, None], posterior(tilted), np.nan))
    return np.stack(found), np.stack(expected)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_the_minimiser_is_the_tilted_posterior_whatever_the_control_variate(c):
    found, expected = expected_targets(c, h=2.0)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.nanmax(np.abs(expected_targets(c, h=1.0)[0] - expected)) > 0.01, "control: another tilt"


def test_control_a_teacher_that_is_not_the_law_s_posterior_moves_the_minimiser_unless_c_is_0():
    for c, moved in ((0.0, False), (1.0, True)):
        found, expected = expected_targets(c, h=2.0, teacher_error=0.5)
        assert (np.nanmax(np.abs(found - expected)) > 0.01) == moved


@pytest.mark.parametrize(("h", "c", "still"), [(0.0, 1.0, True), (2.0, 1.0, False), (0.0, 0.5, False)])
def test_without_tilt_the_teacher_itself_has_no_gradient(h, c, still):
    """At c = 1: below that a part of the target is the sampled token."""
    rng = np.random.default_rng(0)
    group = group_of([1.0, 0.5], C=4)
    batch = built([View(0, g, np.ones(4, bool), np.arange(4), h * r, 0.25) for g, r in ((0, 1.0), (1, 0.5))], [group])
    logits_NV = torch.tensor(rng.normal(size=(8, 8)), requires_grad=True)
    teacher_NV = logits_NV.detach().log_softmax(1)
    objective = Dtm(DtmConfig(control_variate=c))
    loss, figures = objective.loss(scored(logits_NV.log_softmax(1), teacher_NV, batch.targets), batch)
    loss.backward()
    assert (float(logits_NV.grad.abs().max()) < 1e-12) == still
    assert figures.values()["teacher/kl"] == pytest.approx(0.0, abs=1e-12)


def test_the_mask_token_is_nobody_s_target():
    group = group_of([1.0], C=2)
    batch = built([View(0, 0, np.ones(2, bool), np.arange(2), 1.0, 0.5)], [group])
    logits_NV = torch.randn(2, 10, dtype=torch.float64)
    logits_NV[:, MASK] = -torch.inf
    logits_NV.requires_grad_()
    loss, _ = Dtm(DtmConfig()).loss(scored(logits_NV.log_softmax(1), logits_NV.log_softmax(1), batch.targets), batch)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits_NV.grad).all()
    assert not logits_NV.grad[:, MASK].any()


# ---- states and draws


def test_every_count_is_equally_likely_and_the_active_block_is_never_empty():
    C, B, size = 12, 4, 4000
    objective = Dtm(DtmConfig(block_length=B, completions=size))
    group = group_of([0.0] * size, C=C)
    units = objective.wanted(0, group, np.zeros(size), context()).units
    counts = np.array([unit[0].hidden_C.sum() for unit in units])
    assert abs(np.bincount(counts, minlength=C + 1)[1:] / size - 1 / C).max() < 0.015
    for (view,) in units:
        blocks = view.hidden_C.reshape(-1, B)
        partly = int(view.scored_n[0]) // B
        assert not blocks[:partly].any() and blocks[partly + 1 :].all()
        np.testing.assert_array_equal(view.scored_n, partly * B + np.flatnonzero(blocks[partly]))
        assert view.weight == 1 / view.scored_n.size
    scored_at = np.bincount(np.concatenate([unit[0].scored_n % B for unit in units]), minlength=B)
    assert abs(scored_at / scored_at.sum() - 1 / B).max() < 0.01, "positions of a block are alike"


def test_all_masked_positions_may_be_scored():
    objective = Dtm(DtmConfig(block_length=2, scored="all"))
    (view,) = objective.unit(0, 0, 8, 5, np.array([0.9, 0.1]), 0.0)
    assert view.scored_n.tolist() == [3, 4, 5, 6, 7] and view.hidden_C.sum() == 5
    (view,) = Dtm(DtmConfig(block_length=2)).unit(0, 0, 8, 5, np.array([0.9, 0.1]), 0.0)
    assert view.scored_n.tolist() == [3] and view.hidden_C.sum() == 5


def drawn(objective: Dtm, groups, update: int, phase: int = 0) -> list[tuple[int, int]]:
    at = context(update, phase, len(groups))
    credit = objective.credit(groups)
    return [
        (unit[0].group, unit[0].row)
        for index, group in enumerate(groups)
        for unit in objective.wanted(index, group, credit[index], at).units
    ]


def test_an_update_draws_completions_from_the_whole_buffer_without_repeating_one():
    groups = [group_of([0.0] * 5, group_id=g) for g in range(4)]
    objective = Dtm(DtmConfig(completions=7))
    first = drawn(objective, groups, 0)
    assert len(first) == len(set(first)) == 7 and first == drawn(objective, groups, 0)
    assert first != drawn(objective, groups, 1) != drawn(objective, groups, 1, phase=1)
    often = np.zeros((4, 5))
    for update in range(600):
        for at in drawn(objective, groups, update):
            often[at] += 1
    assert abs(often / often.sum() - 1 / 20).max() < 0.01
    assert len(drawn(Dtm(DtmConfig(completions=64)), groups, 0)) == 20, "all of a smaller buffer"


def test_the_states_of_a_completion_do_not_depend_on_which_others_are_drawn():
    group = group_of([0.0] * 6)

    def states(completions: int) -> dict[int, bytes]:
        units = Dtm(DtmConfig(completions=completions)).wanted(0, group, np.zeros(6), context()).units
        return {unit[0].row: unit[0].hidden_C.tobytes() for unit in units}

    few, all_ = states(3), states(6)
    assert len(few) == 3 and few.items() <= all_.items()
    before = np.random.get_state()[1].copy()
    states(6)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_the_tilt_of_a_phase_and_what_a_negative_reward_counts_as():
    objective = Dtm(DtmConfig(tilt_step=2.0, tilt_end=5.0))
    assert [objective.config.step_of(phase) for phase in range(5)] == [2.0, 2.0, 1.0, 0.0, 0.0]
    group = group_of([-1.0, 0.0, 2.0])
    (credit_G,) = objective.credit([group])
    assert credit_G.tolist() == [0.0, 0.0, 2.0]
    for phase, tilt in ((0, 4.0), (2, 2.0), (3, 0.0)):
        wanted = objective.wanted(0, group, credit_G, context(phase=phase))
        assert [unit[0].credit for unit in wanted.units] == [0.0, 0.0, tilt]
        assert wanted.statistics.values()["tilt/target_mass"] == pytest.approx((2 + np.exp(tilt)) / 3)


def test_a_weight_that_no_gradient_holds_is_refused_by_name():
    group, objective = group_of([4.0, 0.0]), Dtm(DtmConfig(tilt_step=25.0))
    with pytest.raises(DataError, match=r"tilt_step=25 and a reward of 4 .*exp\(100\).* lower tilt_step"):
        objective.wanted(0, group, objective.credit([group])[0], context())
    almost = Dtm(DtmConfig(tilt_step=20.0))
    (view,) = almost.wanted(0, group, almost.credit([group])[0], context()).units[0]
    assert np.isfinite(np.float32(np.exp(view.credit))), "control"


# ---- layout


def table_gradient(ranks: int, views_per_forward: int, *, per_forward: bool = False) -> np.ndarray:
    groups = [group_of([0.0, 1.0, 0.5], group_id=g) for g in range(3)]
    objective = Dtm(DtmConfig(completions=7, tilt_step=1.0))
    plan = plan_update(
        groups,
        objective=objective,
        run_seed=1,
        update_index=0,
        eos_ids=(EOS,),
        ranks=ranks,
        views_per_forward=views_per_forward,
    )
    rng = np.random.default_rng(3)
    theta, teacher = (torch.tensor(rng.normal(size=(8, 8))) for _ in range(2))
    theta.requires_grad_()
    for forward in (forward for rank in plan.forwards for forward in rank if not forward.is_pad):
        batch = built(forward.views, groups)
        scores = scored(theta.log_softmax(1)[batch.position], teacher.log_softmax(1)[batch.position], batch.targets)
        divisor = len(forward.units) if per_forward else plan.normaliser
        (objective.loss(scores, batch)[0] / divisor).backward()
    return theta.grad.numpy()


def test_the_gradient_does_not_depend_on_ranks_and_forwards():
    whole = table_gradient(1, 16)
    for layout in ((1, 1), (2, 3), (3, 2)):
        np.testing.assert_allclose(table_gradient(*layout), whole, atol=1e-12)
    assert np.abs(table_gradient(2, 3, per_forward=True) - whole).max() > 1e-3, "control: a mean over each forward"


# ---- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["rollout.max_staleness=1"], ["max_staleness=1", "needs 0"]),
        (["objective.buffer_prompts=2"], ["buffer_prompts=2", "can't hold"]),
        (["rollout.buffer_groups=8"], ["buffer_groups=8", "begins"]),
        (["objective.block_length=7"], ["block_length=7", "divide"]),
        (["rollout.sampler.threshold=[0.7, 0.9]"], ["threshold=[0.7, 0.9]", "nobody learns"]),
    ],
)
def test_settings_that_can_not_work_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        load_config(["recipe=sudoku_dtm", *settings])
    assert all(word in str(error.value) for word in words)


def test_completions_may_be_drawn_greedily_and_one_by_one():
    config = load_config(["recipe=sudoku_dtm", "rollout.group_size=1", "rollout.sampler.temperature=0"])
    assert config.rollout.group_size == 1


# ---- recordings


def cases() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.npz"))


@pytest.mark.parametrize("name", cases())
def test_recorded_cases(name):
    found = recorded_dtm.check(read_method_case(FOLDER, name), Meter("cpu", "float32"))
    assert found and not [each for each in found if not each.passed]


@pytest.mark.parametrize("mistake", ["wrong target", "no copy of the mean", "moments kept"])
def test_control_mistakes_are_seen(monkeypatch, mistake):
    if mistake == "wrong target":
        name = "03_c05_allmasked_itpl16"
        monkeypatch.setattr(np, "expm1", np.exp)
    else:
        name = "05_training_loop_phases"
        if mistake == "no copy of the mean":
            monkeypatch.setattr(recorded_dtm.TrainedWeights, "set", lambda self, weights: None)
        else:
            monkeypatch.setattr(
                recorded_dtm, "FiniteAdamW", type("Kept", (recorded_dtm.FiniteAdamW,), {"state": _Stubborn()})
            )
    found = recorded_dtm.check(read_method_case(FOLDER, name), Meter("cpu", "float32"))
    assert any(not each.passed for each in found)


class _Stubborn:
    """An optimizer's state that can't be cleared."""

    def __get__(self, optimizer, owner=None):
        return optimizer.__dict__["_stubborn"]

    def __set__(self, optimizer, state):
        class Kept(type(state)):
            def clear(self) -> None:
                return

        kept = Kept(state.default_factory) if hasattr(state, "default_factory") else Kept(state)
        optimizer.__dict__["_stubborn"] = kept


def test_a_case_with_another_state_than_its_draws_is_seen():
    case = read_method_case(FOLDER, cases()[0])
    arrays = dict(case.arrays.by_name)
    arrays["block_scores"] = arrays["block_scores"][:, ::-1]
    changed = dataclasses.replace(case, arrays=dataclasses.replace(case.arrays, by_name=arrays))
    found = recorded_dtm.check(changed, Meter("cpu", "float32"))
    assert any(not each.passed and each.quantity == "masks" for each in found)
