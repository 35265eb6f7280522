"""Choices of positions: their law, replay parity between engine and learner, the loss, and the settings.

Shapes: K candidates, n positions a step, C completion positions.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores, score
from learner.likelihood.timesteps import step_table
from learner.likelihood.views import View, ViewBatch, build_batch, pad_view, step_view
from learner.objectives.agrpo import Agrpo
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import AgrpoConfig
from learner.settings.run import bias_warnings, load_config
from rewards.errors import ConfigError, TrajectoryError
from rewards.task import Problem
from rollout.adapters import adapter_parameters, digest, load_state, pack
from rollout.engines.torch import TorchEngine
from rollout.models.family import PolicyAdapter, policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.sampling import positions
from rollout.sampling.positions import choice_entropy, choice_logp
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.hand_made import acting_adapter, make_group

# ---- the law of a choice


def random_scores(K: int, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(1, K))) * spread


@pytest.mark.parametrize("spread", [1.0, 50.0, 3000.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_sets_sum_to_one_and_agree_with_drawing_one_after_the_other(n, spread):
    scores = random_scores(6, spread)
    sets = list(itertools.combinations(range(6), n))
    logp = choice_logp(scores.expand(len(sets), -1), torch.tensor(sets))
    assert logp.logsumexp(0).item() == pytest.approx(0, abs=1e-9)
    assert logp.isfinite().all()
    if spread == 1.0:
        w = scores[0].exp().tolist()
        for positions_, value in zip(sets, logp.exp().tolist(), strict=True):
            total = 0.0
            for order in itertools.permutations(positions_):
                left, product = sum(w), 1.0
                for i in order:
                    product, left = product * w[i] / left, left - w[i]
                total += product
            assert value == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("n", [5, 6])
def test_above_four_positions_orders_sum_to_one(n):
    orders = list(itertools.permutations(range(7), n))
    logp = choice_logp(random_scores(7).expand(len(orders), -1), torch.tensor(orders))
    assert logp.logsumexp(0).item() == pytest.approx(0, abs=1e-9)
    backwards = choice_logp(random_scores(7), torch.tensor([orders[0][::-1]]))
    assert abs(backwards - logp[0]) > 1e-3, "the order counts"
    four = [choice_logp(random_scores(7), torch.tensor([order])) for order in ((0, 1, 2, 3), (3, 1, 0, 2))]
    assert four[0].item() == pytest.approx(four[1].item(), abs=1e-12), "control: up to four it doesn't"


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_padding_changes_nothing_and_gradients_are_those_of_the_law(n):
    scores, chosen = random_scores(7).requires_grad_(), torch.tensor([list(range(1, n + 1))])
    padded = torch.cat([scores, torch.full((1, 3), -torch.inf)], dim=1)
    torch.testing.assert_close(choice_logp(padded, chosen), choice_logp(scores, chosen), atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(lambda s: choice_logp(s, chosen), (scores,))
    (gradient,) = torch.autograd.grad(choice_logp(padded, chosen).sum(), scores)
    assert gradient.isfinite().all()
    extreme = (random_scores(7, 1e4)).requires_grad_()
    (gradient,) = torch.autograd.grad(choice_logp(extreme, chosen).sum(), extreme)
    assert gradient.isfinite().all()


def test_expected_entropy_of_a_choice_is_that_of_the_ordered_law(monkeypatch):
    monkeypatch.setattr(positions, "SET_UP_TO", 1)
    orders = torch.tensor(list(itertools.permutations(range(5), 2)))
    scores = random_scores(5).expand(len(orders), -1)
    logp = choice_logp(scores, orders)
    entropy = choice_entropy(scores, orders)
    assert (logp.exp() * entropy).sum().item() == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-12)


# ---- engine and learner on a small model

LORA = LoraSpec(r=4, alpha=8.0)
STEPS_SHAPES = {"sets of 3": 8, "orders of 6": 4, "one by one": 24, "2 and 1 a step": 16}
TRUNCATIONS = {"whole": {}, "truncated": {"top_k": 20, "top_p": 0.95}}


@pytest.fixture(scope="module")
def engine(tiny_model) -> TorchEngine:
    engine = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=5, threads=1)
    state = acting_adapter(engine.model, scale=0.3)
    engine.load_adapter(3, state, digest(state))
    return engine


@pytest.fixture(scope="module")
def learner_model(tiny_model, engine) -> torch.nn.Module:
    model = attach_lora(load_model(tiny_model), policy_adapter(tiny_model), LORA)
    load_state(model, pack(adapter_parameters(engine.model)))
    return model.train()


def rollout(
    engine: TorchEngine, steps: int = 8, rule: str = "decoupled_confidence", **changes
) -> list[TrajectoryGroup]:
    """Prompts of three lengths, so that most rows are padded."""
    sampler = SamplerSpec(24, 12, steps, rule, temperature=0.7, position_temperature=0.5)
    specs = [GroupSpec(i, Problem(str(i), {}), 3, 50 + i) for i in range(3)]
    prompts = [list(range(10, 20 + 3 * i)) for i in range(3)]
    return engine.generate(specs, prompts, dataclasses.replace(sampler, **changes))


def views_of(groups: list[TrajectoryGroup]) -> list[View]:
    rng = np.random.default_rng(0)
    views = [
        step_view(group, g, row, int(step), float(rng.normal()), float(rng.random() + 0.5))
        for g, group in enumerate(groups)
        for row in range(group.size)
        for step in np.unique(group.unmask_step[row][group.drawn[row]])
    ]
    return [views[i] for i in rng.permutation(len(views))]


def forwards(groups: list[TrajectoryGroup], family: PolicyAdapter, size: int) -> Iterator[ViewBatch]:
    views = views_of(groups)
    for start in range(0, len(views), size):
        yield build_batch(views[start : start + size], groups, mask_id=family.mask_token_id, pad_id=family.pad_token_id)


def worst_difference(model, groups, family, change: Callable = lambda batch: batch) -> float:
    worst = 0.0
    for batch in forwards(groups, family, 7):
        with torch.no_grad():
            ours = score(model, change(batch), family=family).choice_logp_Z
        worst = max(worst, float(np.abs(ours.numpy() - batch.choices.logp).max()))
    return worst


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("steps", STEPS_SHAPES.values(), ids=STEPS_SHAPES)
def test_replay_parity_of_choices(engine, learner_model, steps, truncation):
    groups = rollout(engine, steps, **TRUNCATIONS[truncation])
    for group in groups:
        group.validate()
    parity = worst_difference(learner_model, groups, engine.family)
    print(f"largest |difference| {parity:.1e}")
    assert parity <= 1e-5

    def other_tau(batch):
        return dataclasses.replace(batch, choices=dataclasses.replace(batch.choices, temperature=0.52))

    assert worst_difference(learner_model, groups, engine.family, other_tau) > 1e-4, "control: another tau, another law"


def test_choices_cost_one_forward_and_the_head_on_candidates(engine, learner_model):
    groups = rollout(engine)
    head = learner_model.get_base_model().get_submodule("model.transformer.ff_out")
    seen: list[int] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    try:
        batches = list(forwards(groups, engine.family, 7))
        for batch in batches:
            score(learner_model, batch, family=engine.family)
    finally:
        hook.remove()
    assert seen == [batch.choices.candidate_rows.size for batch in batches]
    for batch in batches:
        masked = batch.input_ids == engine.family.mask_token_id
        assert masked.ravel()[batch.choices.candidate_rows].all()
        assert (batch.choices.candidate_rows[batch.choices.candidate_of_score] == batch.score_rows).all()
        expected = [12 - 3 * (view.step % 4) for view in batch.views]
        assert np.bincount(batch.choices.view_of_candidate).tolist() == expected


def gradient(model, groups, family, size: int, **config) -> tuple[torch.Tensor, dict[str, float]]:
    """Of the adapter, with the figures; scored ``size`` views at a time."""
    agrpo, parts = Agrpo(AgrpoConfig(**config)), []
    model.zero_grad()
    for batch in forwards(groups, family, size):
        scores = score(model, batch, family=family)
        reference, chosen = torch.from_numpy(batch.logp) + 0.2, torch.from_numpy(batch.choices.logp) - 0.1
        loss, figures = agrpo.loss(PolicyScores(scores, reference=Scores(reference, scores.mass_N, chosen)), batch)
        loss.backward()
        parts.append(figures)
    flat = torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])
    return flat.clone(), Statistics.merged(parts).values()


@pytest.mark.parametrize("steps", [8, 4])
def test_gradient_and_figures_do_not_depend_on_the_split(engine, learner_model, steps):
    groups = rollout(engine, steps, top_k=20)
    whole, figures = gradient(learner_model, groups, engine.family, 1000, beta=0.05)
    for size in (1, 5):
        ours, ours_figures = gradient(learner_model, groups, engine.family, size, beta=0.05)
        assert (ours - whole).norm() <= 2e-6 * whole.norm()
        assert ours_figures == pytest.approx(figures, rel=1e-4, abs=1e-5)
    free = sum(int((group.position_logp < 0).sum()) for group in groups)
    assert figures["scored_choices"] == free < sum(group.size * steps for group in groups)
    assert {
        "position_ratio/mean",
        "position_ratio/max",
        "position_clip_fraction/low",
        "position_log_ratio/rms",
        "position_kl",
    } <= figures.keys()
    plain, _ = gradient(learner_model, groups, engine.family, 1000, beta=0.0)
    assert (plain - whole).norm() > 1e-3 * whole.norm(), "control: the KL terms count"


def test_rollouts_repeat_and_do_not_depend_on_what_shares_their_batch(engine, tiny_model):
    first, again = rollout(engine), rollout(engine)
    few = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=2, threads=1)
    few.load_adapter(3, state := acting_adapter(few.model, scale=0.3), digest(state))
    for a, b, c in zip(first, again, rollout(few), strict=True):
        assert a.position_logp.tobytes() == b.position_logp.tobytes() and a.logp.tobytes() == b.logp.tobytes()
        assert (a.unmask_rank == c.unmask_rank).all() and (a.completion_ids == c.completion_ids).all()
        np.testing.assert_allclose(a.position_logp, c.position_logp, atol=1e-5)


def test_a_group_keeps_its_choices_on_disk_and_is_refused_without_them(engine, tmp_path):
    group = rollout(engine)[0]
    group.save(tmp_path / "group")
    back = TrajectoryGroup.load(tmp_path / "group")
    assert back.position_logp.tobytes() == group.position_logp.tobytes()
    assert back.position_entropy.tobytes() == group.position_entropy.tobytes() and back.sampler == group.sampler
    for name in ("position_logp", "position_entropy"):
        with pytest.raises(TrajectoryError, match=f"no {name}"):
            dataclasses.replace(group, **{name: None}).validate()
    with pytest.raises(TrajectoryError, match="position_logp above 0"):
        dataclasses.replace(group, position_logp=-group.position_logp).validate()


def test_other_rules_record_no_choice(engine):
    for rule in ("random", "left_to_right", "low_confidence", "entropy"):
        (group, *_) = rollout(engine, rule=rule)
        assert group.position_logp is None and group.position_entropy is None
        assert next(forwards([group], engine.family, 3)).choices is None


# ---- the loss


def decoupled(length: int, steps: int, block: int, tau: float = 0.5, **choices) -> dict:
    """Fields of a hand-made group whose positions were chosen by confidence; by default nothing was left to chance."""
    zeros = {name: np.zeros((1, steps), np.float32) for name in ("position_logp", "position_entropy")}
    sampler = SamplerSpec(length, block, steps, "decoupled_confidence", 1.0, position_temperature=tau)
    return {"sampler": sampler, **zeros, **choices}


def test_control_without_its_weight_a_step_with_a_sure_choice_is_never_scored():
    """Why entropy sampling adds the position entropy and needs a floor: where tokens are all but certain, the choice
    of positions still has a gradient."""
    group = make_group(
        [[5, 6]], [[0, 1]], steps=2, entropy=np.array([[1e-9, 1.0]]), rewards=[[0.0]], **decoupled(2, 2, 2)
    )
    free = dataclasses.replace(group, position_entropy=np.array([[0.6, 0.0]], np.float32))
    assert step_table(group, "all", (1,)).entropy_Gm[0, 0] < 1e-8
    assert step_table(free, "all", (1,)).entropy_Gm[0] == pytest.approx([0.6, 1.0])


def one_choice(log_ratio: float, advantage: float, **config) -> tuple[float, float, dict[str, float]]:
    """Loss of one choice of positions beside a token of ratio 1, its slope, and the figures."""
    recorded_logp = np.array([[-1.0, 0.0]], np.float32)
    group = make_group([[5, 6]], [[0, 1]], steps=2, rewards=[[0.0]], **decoupled(2, 2, 2, position_logp=recorded_logp))
    batch = build_batch([step_view(group, 0, 0, 0, advantage, 2.0)], [group], mask_id=99, pad_id=98)
    logp = torch.tensor([-1.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    token = torch.from_numpy(batch.logp).double()
    loss, figures = Agrpo(AgrpoConfig(**config)).loss(PolicyScores(Scores(token, token, logp)), batch)
    loss.backward()
    return loss.item() + 2 * advantage, logp.grad.item(), figures.values()


def test_choices_are_clipped_by_their_own_width():
    up = math.log(1.5)
    loss, slope, figures = one_choice(up, 1.0)
    assert (loss, slope) == (pytest.approx(-2.4), 0), "the tokens' width is the default"
    assert figures["position_clip_fraction/high"] == 1 and figures["clip_fraction/high"] == 0
    loss, slope, figures = one_choice(up, 1.0, position_clip_high=0.6)
    assert (loss, slope) == (pytest.approx(-3.0), pytest.approx(-3.0)) and figures[
        "position_ratio/max"
    ] == pytest.approx(1.5)
    loss, slope, _ = one_choice(-up, -1.0, position_clip_low=0.5)
    assert slope == pytest.approx(2 / 1.5)
    assert one_choice(-up, -1.0, position_clip_low=0.1)[1] == 0
    assert figures["log_ratio/abs_max"] == pytest.approx(up), "the check of un-updated weights sees choices too"


def test_scores_of_choices_may_not_be_forgotten():
    group = make_group([[5, 6]], [[0, 1]], steps=2, rewards=[[0.0]], **decoupled(2, 2, 2))
    batch = build_batch([step_view(group, 0, 0, 0, 1.0, 1.0)], [group], mask_id=99, pad_id=98)
    with pytest.raises(AssertionError, match="part of the policy"):
        logp_N = torch.from_numpy(batch.logp)
        Agrpo(AgrpoConfig()).loss(PolicyScores(Scores(logp_N, logp_N)), batch)


def test_kl_of_choices_is_the_current_policys_in_value_and_gradient():
    """The sum over sets of p_old * rho * k3 is KL(current || reference) of the set law, and so is its gradient."""
    sets = list(itertools.combinations(range(4), 2))
    old, reference = (choice_logp(random_scores(4, seed=s).expand(6, -1), torch.tensor(sets)) for s in (1, 2))
    theta = random_scores(4, seed=3).requires_grad_()
    unmask = np.array([[0 if i in chosen else 1 for i in range(4)] for chosen in sets])
    fields = decoupled(4, 2, 4) | {
        "position_logp": np.stack([old.numpy(), np.zeros(6)], axis=1).astype(np.float32),
        "position_entropy": np.ones((6, 2), np.float32),
    }
    group = make_group(np.full((6, 4), 5), unmask, steps=2, rewards=np.zeros((6, 1)), **fields)
    views = [step_view(group, 0, row, 0, 0.0, float(old[row].exp())) for row in range(6)]
    batch = build_batch(views, [group], mask_id=99, pad_id=98)
    tokens = torch.from_numpy(batch.logp).double()

    def law():
        return choice_logp(theta.expand(6, -1), torch.tensor(sets))

    scores = PolicyScores(Scores(tokens, tokens, law()), reference=Scores(tokens, tokens, reference))
    loss, figures = Agrpo(AgrpoConfig(beta=0.3)).loss(scores, batch)
    (ours,) = torch.autograd.grad(loss, theta)
    kl = (law().exp() * (law() - reference)).sum()
    (exact,) = torch.autograd.grad(kl, theta)
    assert loss.item() == pytest.approx(0.3 * kl.item(), rel=1e-6)
    np.testing.assert_allclose(ours, 0.3 * exact, rtol=1e-5, atol=1e-7)
    assert figures.values()["kl"] == 0 and figures.values()["position_kl"] > 0


def test_pads_and_forced_steps_add_nothing(engine, learner_model):
    groups = rollout(engine)
    family = engine.family
    last = max(int(step) for step in groups[0].unmask_step[0])
    for view in (pad_view(groups[0]), step_view(groups[0], 0, 0, last, 1.0, 1.0)):
        batch = build_batch([view], groups, mask_id=family.mask_token_id, pad_id=family.pad_token_id)
        scores = score(learner_model, batch, family=family)
        loss, figures = Agrpo(AgrpoConfig()).loss(PolicyScores(scores), batch)
        assert "scored_choices" not in figures.values()
        learner_model.zero_grad()
        loss.backward()
        if view.step is None:
            assert not any(p.grad.any() for p in adapter_parameters(learner_model).values())
        else:
            assert not batch.choices.free.any() and (scores.choice_logp_Z == 0).all()


# ---- settings

ON = ["rollout.sampler.position_rule=decoupled_confidence", "rollout.sampler.position_temperature=0.1"]


def test_settings_turn_it_on():
    config = load_config(["recipe=smoke", *ON])
    assert config.rollout.sampler.spec().scores_positions
    assert bias_warnings(config) == []


def test_entropy_sampling_of_steps_needs_a_floor():
    entropy = [*ON, "objective.timestep_sampling=entropy", "objective.weight_floor=0"]
    with pytest.raises(ConfigError, match=r"needs objective\.weight_floor above 0"):
        load_config(["recipe=smoke", *entropy])
    load_config(["recipe=smoke", *entropy, "objective.weight_floor=0.2"])
    load_config(["recipe=smoke", "objective.timestep_sampling=entropy", "objective.weight_floor=0"])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("rollout.sampler.position_temperature=-1", "at least 0"),
        ("rollout.sampler.position_temperature=.inf", "finite"),
        ("rollout.sampler.confidence_temperature=0", "above 0"),
        ("rollout.sampler.threshold=0.9", "isn't scored; sample without one"),
        ("objective.position_clip_low=0", "above 0"),
    ],
)
def test_settings_that_are_refused(argument, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(["recipe=smoke", *ON, argument])


@pytest.mark.parametrize(
    ("arguments", "biased"),
    [
        (["rollout.sampler.position_rule=random"], False),
        (["rollout.sampler.position_rule=left_to_right"], False),
        (["rollout.sampler.position_rule=low_confidence"], True),
        (["rollout.sampler.position_rule=entropy"], True),
        ([*ON, "rollout.sampler.position_temperature=0"], True),
    ],
)
def test_biased_rules_are_named(arguments, biased):
    warnings = bias_warnings(load_config(["recipe=smoke", *arguments]))
    assert bool(warnings) == biased and all("biased" in warning for warning in warnings)
