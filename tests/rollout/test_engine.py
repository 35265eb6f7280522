"""The torch engine on a small random LLaDA: the contract it fills, the weights it holds, the work it does not do.

Shapes: G completions of a group, C completion positions.
"""

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from rewards.errors import ConfigError, WeightMismatch
from rewards.task import Problem
from rollout.adapters import PackedTensor, adapter_parameters, digest, pack
from rollout.engines.torch import TorchEngine
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.sampling.denoise import POSITION_RULES
from rollout.sampling.schedule import tokens_per_step
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.hand_made import acting_adapter

LORA = LoraSpec(r=4, alpha=8.0)
C, BLOCK, STEPS = 24, 12, 8
LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
BLOCK_MAPS = {f"model.transformer.blocks.{block}.{name}" for block in range(2) for name in LINEAR_MAPS}
HEAD = "model.transformer.ff_out"
TRUNCATIONS = {
    "whole": {},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.95},
    "both": {"top_k": 20, "top_p": 0.95},
}


@pytest.fixture(scope="module")
def engine(tiny_model) -> TorchEngine:
    return TorchEngine(model_path=tiny_model, lora=LORA, max_rows=16, threads=1)


@pytest.fixture
def published(engine) -> Iterator[dict[str, PackedTensor]]:
    """An adapter that acts; afterwards the engine is the base again."""
    yield acting_adapter(engine.model)
    engine.without_adapter()


def sampler(rule: str = "random", **changes) -> SamplerSpec:
    return dataclasses.replace(SamplerSpec(C, BLOCK, STEPS, rule, temperature=0.8), **changes)


def draw(engine: TorchEngine, spec: SamplerSpec, *, seed: int = 5, sizes=(4, 2, 3), **options) -> list[TrajectoryGroup]:
    """Groups of several sizes, with prompts of several lengths."""
    specs = [GroupSpec(10 + i, Problem(f"p{i}", {}), size, seed + i) for i, size in enumerate(sizes)]
    return engine.generate(specs, [list(range(20, 25 + 3 * i)) for i in range(len(sizes))], spec, **options)


def same_bits(a: list[TrajectoryGroup], b: list[TrajectoryGroup]) -> bool:
    """Whether all arrays are equal, bit for bit."""

    def arrays(groups):
        values = [getattr(group, field.name) for group in groups for field in dataclasses.fields(group)]
        return [(v.dtype, v.shape, v.tobytes()) for v in values if isinstance(v, np.ndarray)]

    return arrays(a) == arrays(b)


def base_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(10, 40).unsqueeze(0)).logits


# ---- generation


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("rule", POSITION_RULES)
def test_generation_fills_the_contract(engine, rule, truncation):
    spec = sampler(rule, **TRUNCATIONS[truncation])
    groups = draw(engine, spec)
    schedule = tokens_per_step(C, BLOCK, STEPS)
    assert [group.size for group in groups] == [4, 2, 3]
    for i, group in enumerate(groups):
        group.validate()
        assert (group.group_id, group.problem_id, group.seed) == (10 + i, f"p{i}", 5 + i)
        assert (group.policy_version, group.adapter_digest, group.sampler) == (-1, "", spec)
        assert group.prompt_ids.tolist() == list(range(20, 25 + 3 * i))
        assert group.rewards.shape == (group.size, 0) and not group.correct.any()
        assert group.drawn.all() and (group.nfe == STEPS).all()
        assert not (group.completion_ids == engine.family.mask_token_id).any()
        assert (group.logp[group.drawn] < 0).any() and (group.entropy > 0).any()
        for row in range(group.size):
            assert np.bincount(group.unmask_step[row], minlength=STEPS).tolist() == schedule
            assert (group.unmask_step[row] // (STEPS // 2) == np.arange(C) // BLOCK).all(), "blocks from left to right"
        if rule == "left_to_right":
            assert (group.unmask_step == np.repeat(np.arange(STEPS), 3)).all()
        if spec.truncates:
            widths = np.diff(group.support_indptr)
            assert widths.max() <= (spec.top_k or 200) and widths.min() >= 1
            row, position = 1, 7
            assert group.completion_ids[row, position] in group.support(row, position)
            assert (np.diff(group.support(row, position)) > 0).all()
        else:
            assert group.support_ids is None
            np.testing.assert_array_less(group.logp_raw, 0)


def test_generation_repeats_bit_for_bit(engine, tiny_model):
    spec = sampler("low_confidence", top_p=0.95)
    first = draw(engine, spec)
    assert same_bits(first, draw(engine, spec))
    another = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=16, threads=1)
    assert same_bits(first, draw(another, spec)), "nor does it depend on the engine"
    assert not same_bits(first, draw(engine, spec, seed=6)), "control: another seed, other completions"


def test_rows_that_wait_for_a_place_come_out_the_same(engine, tiny_model):
    few = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=2, threads=1)
    for ours, theirs in zip(draw(engine, sampler()), draw(few, sampler()), strict=True):
        assert (ours.completion_ids == theirs.completion_ids).all() and (ours.unmask_step == theirs.unmask_step).all()
        np.testing.assert_allclose(ours.logp, theirs.logp, atol=1e-5)


def test_completions_are_reported_as_soon_as_they_are_finished(tiny_model):
    engine = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=2, threads=1)
    reported: dict[tuple[int, int], np.ndarray] = {}
    forwards_before: list[int] = []
    with head_rows(engine) as seen:

        def note(group: int, row: int, ids_FC: np.ndarray, place_C: np.ndarray | None) -> None:
            assert place_C is None
            assert (group, row) not in reported
            (reported[group, row],) = ids_FC.copy()
            forwards_before.append(len(seen))

        groups = draw(engine, sampler(), on_completion=note)
    assert set(reported) == {(g, row) for g, group in enumerate(groups) for row in range(group.size)}
    assert all((groups[g].completion_ids[row] == ids).all() for (g, row), ids in reported.items())
    assert forwards_before == sorted([STEPS * pair for pair in (1, 2, 3, 4) for _ in range(2)] + [STEPS * 5])


def test_completions_that_end_early_fill_the_contract(engine):
    eos = engine.family.eos_token_id

    def eos_likely(module, args, logits):
        return logits.index_add(-1, torch.tensor([eos]), torch.full((*logits.shape[:-1], 1), 3.8))

    hook = engine.model.get_base_model().get_submodule(HEAD).register_forward_hook(eos_likely)
    try:
        groups = draw(engine, sampler("random", top_k=20, top_p=0.95), sizes=(8, 8))
    finally:
        hook.remove()
    ended = 0
    for group in groups:
        group.validate()
        for row in np.flatnonzero(~group.drawn.all(axis=1)):
            ended += 1
            assert group.drawn[row].tolist() == [True] * BLOCK + [False] * BLOCK
            assert (group.completion_ids[row] == eos).all()
            assert group.nfe[row] == STEPS // 2
            assert (group.unmask_step[row, BLOCK:] == STEPS // 2).all()
            assert all(group.support(row, position).size == 0 for position in range(BLOCK, C))
    assert 0 < ended < 16


def test_threshold_decoding_fills_the_contract_in_as_many_steps_as_it_takes(engine):
    for threshold, steps in ((1.0, C), (0.0, C // BLOCK)):
        for group in draw(engine, sampler(threshold=threshold), sizes=(2, 1)):
            group.validate()
            assert (group.nfe == steps).all() and group.unmask_step.max() == steps - 1


def test_temperature_0_is_greedy(engine):
    greedy = sampler("low_confidence", temperature=0.0, top_k=20)
    first, other_seed = draw(engine, greedy), draw(engine, greedy, seed=99)
    for a, b in zip(first, other_seed, strict=True):
        a.validate()
        assert (a.completion_ids == b.completion_ids).all() and (a.completion_ids == a.completion_ids[0]).all()
        assert a.support_ids is None


# ---- weights


def test_a_fresh_adapter_acts_as_the_base(engine, tiny_model):
    torch.testing.assert_close(base_logits(engine.model), base_logits(load_model(tiny_model)), atol=0, rtol=0)
    bare = TorchEngine(model_path=tiny_model, lora=None, max_rows=16, threads=1)
    assert same_bits(draw(engine, sampler()), draw(bare, sampler()))
    assert engine.describe()["lora"] and not bare.describe()["lora"]


def test_a_loaded_adapter_acts_and_names_what_it_draws(engine, published, tiny_model):
    as_base = draw(engine, sampler())
    engine.load_adapter(7, published, digest(published))
    assert (engine.policy_version, engine.adapter_digest) == (7, digest(published))
    assert engine.describe()["policy_version"] == 7
    assert digest(pack(adapter_parameters(engine.model))) == digest(published)
    drawn = draw(engine, sampler())
    assert all((group.policy_version, group.adapter_digest) == (7, digest(published)) for group in drawn)
    assert not same_bits(drawn, as_base)
    engine.without_adapter()
    assert (engine.policy_version, engine.adapter_digest) == (-1, "")
    assert same_bits(draw(engine, sampler()), as_base)


def altered(state: dict[str, PackedTensor], name: str, **changes) -> dict[str, PackedTensor]:
    return {**state, name: dataclasses.replace(state[name], **changes)}


def flipped(tensor: PackedTensor) -> np.ndarray:
    data = tensor.data.copy()
    data[0] ^= 1
    return data


# What an actor may be given instead of what was published under the digest.
WRONG_ADAPTERS = {
    "one bit": (lambda s, n: altered(s, n, data=flipped(s[n])), "published with digest"),
    "a parameter missing": (lambda s, n: {k: v for k, v in s.items() if k != n}, "disagree about parameters: {name}"),
    "a parameter too many": (lambda s, n: {**s, HEAD + ".lora_A.weight": s[n]}, "disagree about parameters: " + HEAD),
    "another rank": (lambda s, n: altered(s, n, shape=(2, 128)), r"{name} is float32 \(2, 128\)"),
    "another dtype": (lambda s, n: altered(s, n, dtype="int32"), r"{name} is int32"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS.keys())
def test_other_weights_than_published_are_refused_and_no_version_is_held(engine, published, change, message):
    name = sorted(published)[0]
    assert published[name].shape == (4, 64)
    engine.load_adapter(7, published, digest(published))
    with pytest.raises(WeightMismatch, match=message.format(name=name)):
        engine.load_adapter(8, change(published, name), digest(published))
    assert (engine.policy_version, engine.adapter_digest) == (-1, "")
    assert draw(engine, sampler(), sizes=(1,))[0].policy_version == -1
    engine.load_adapter(9, published, digest(published))
    assert engine.policy_version == 9, "it recovers with the next good version"


# ---- LoRA on exactly named modules


def adapted(model: torch.nn.Module) -> set[str]:
    """Names of the modules with an adapter, without peft's prefix."""
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def test_lora_sits_on_the_linear_maps_of_the_blocks_and_not_on_the_head(engine):
    assert adapted(engine.model) == BLOCK_MAPS
    names = {name.rsplit(".lora_", 1)[0] for name in adapter_parameters(engine.model)}
    assert names == BLOCK_MAPS
    trained = {name for name, p in engine.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(BLOCK_MAPS) and all(".lora_" in name for name in trained)


def test_the_head_is_adapted_when_asked_for(tiny_model):
    spec = dataclasses.replace(LORA, include_head=True)
    model = attach_lora(load_model(tiny_model), policy_adapter(tiny_model), spec)
    assert adapted(model) == BLOCK_MAPS | {HEAD}


def test_control_a_suffix_match_would_have_hit_the_head(tiny_model):
    model = get_peft_model(load_model(tiny_model), LoraConfig(r=4, target_modules=list(LINEAR_MAPS)))
    assert adapted(model) == BLOCK_MAPS | {HEAD}


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_that_exist(tiny_model):
    family = dataclasses.replace(policy_adapter(tiny_model), lora_regex=r"model\.layers\.\d+\.q_proj")
    with pytest.raises(ConfigError, match=r"layers.*attn_out.*v_proj"):
        attach_lora(load_model(tiny_model), family, LORA)


def test_an_adapters_first_values_are_named_by_its_seed(tiny_model):
    def fresh(seed: int) -> str:
        spec = dataclasses.replace(LORA, init_seed=seed)
        model = attach_lora(load_model(tiny_model), policy_adapter(tiny_model), spec)
        return digest(pack(adapter_parameters(model)))

    assert fresh(1) == fresh(1) != fresh(2)


# ---- private randomness


@contextmanager
def global_randomness_untouched() -> Iterator[None]:
    def states():
        return torch.random.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    before = states()
    yield
    names = ("torch", "numpy", "random")
    moved = [name for name, a, b in zip(names, before, states(), strict=True) if a != b]
    assert not moved, f"global generators were used: {moved}"


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_generating_leaves_the_global_generators_alone(engine, rule):
    with global_randomness_untouched():
        draw(engine, sampler(rule, top_p=0.95))


def test_attaching_and_loading_an_adapter_leave_the_global_generators_alone(tiny_model, engine, published):
    model, family = load_model(tiny_model), policy_adapter(tiny_model)
    with global_randomness_untouched():
        attach_lora(model, family, LORA)
        engine.load_adapter(0, published, digest(published))


def test_generation_does_not_depend_on_the_global_generators(engine):
    first = draw(engine, sampler())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert same_bits(first, draw(engine, sampler()))


@pytest.mark.parametrize("use", [lambda: torch.rand(1), lambda: np.random.rand(), random.random])
def test_control_use_of_a_global_generator_is_noticed(use):
    with pytest.raises(AssertionError, match="global generators were used"), global_randomness_untouched():
        use()


# ---- the head runs on few rows


@contextmanager
def head_rows(engine: TorchEngine) -> Iterator[list[int]]:
    """Rows that the LM head is given, call by call."""
    seen: list[int] = []
    head = engine.model.get_base_model().get_submodule(HEAD)
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_the_head_sees_only_positions_that_can_be_revealed(engine, rule):
    rows = 9
    with head_rows(engine) as seen:
        draw(engine, sampler(rule))
    if rule in ("random", "left_to_right"):
        expected = [rows * 3] * STEPS  # the positions are known before the forward
    else:
        expected = [rows * masked for masked in (12, 9, 6, 3)] * 2  # the laws of a block's masked positions decide
    assert seen == expected


def test_control_a_plain_forward_runs_the_head_on_everything(engine):
    with head_rows(engine) as seen, torch.inference_mode():
        engine.model(input_ids=torch.zeros(9, C + 5, dtype=torch.int64))
    assert seen == [9 * (C + 5)]
