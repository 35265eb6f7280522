"""What a GPU would refuse, and what it would wait for: sampling, evaluation, scoring, every method's loss and
fine-tuning on a pretended one.

Values are those of the CPU, bit for bit, since the CPU computes them.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from learner.finetuning.data import Example
from learner.finetuning.rank import SftRank, UpdateBatch
from learner.finetuning.settings import SftConfig, load_sft_config
from learner.objectives import make_objective
from learner.ranks.rank import lora_spec
from rewards.errors import WeightMismatch
from rewards.task import Problem
from rollout.adapters import (
    HEAD,
    AdapterState,
    PackedTensor,
    adapter_parameters,
    digest,
    digest_of,
    load_state,
    pack,
    require_loaded,
    write_peft_folder,
)
from rollout.engines.torch import TorchEngine
from rollout.models import layers
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.prompt_head import head_net
from rollout.spans import Gap
from rollout.trajectory import DrawnBranches, GreedyBranches, GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.every_method import METHODS, Drawing, at, batch_of, draw_batches, drawing_of, loss_of, update_of
from tests.support.hand_made import acting_adapter
from tests.support.learner_ranks import SAMPLER, random_adapter, settings
from tests.support.pretended_gpu import Counts, MixedDevices, counted, flash_attention, pretended_gpu
from tests.support.small_masked_lms import SIZES, write_masked_lm
from tests.support.small_policies import FAMILIES, write_policy

SAMPLERS = {
    "random": SAMPLER,
    "untruncated": dataclasses.replace(SAMPLER, top_k=None, top_p=1.0),
    "low_confidence": dataclasses.replace(SAMPLER, position_rule="low_confidence"),
    "decoupled_confidence": dataclasses.replace(SAMPLER, position_rule="decoupled_confidence"),
    "threshold": dataclasses.replace(SAMPLER, threshold=0.05),
    "greedy": SAMPLER.greedy(steps=8, position_rule="random"),
}
EVALUATED = {
    "m": SAMPLER.greedy(steps=8, position_rule="low_confidence"),
    "m/2": SAMPLER.greedy(steps=4, position_rule="low_confidence"),
    "threshold": dataclasses.replace(
        SAMPLER.greedy(steps=8, position_rule="low_confidence"), threshold=(0.05, 0.3, 0.9)
    ),
}
"""As a run's own evaluation samples (``learner.supply.greedy``)."""
MASKED = [family for family in SIZES if family not in FAMILIES]
MOST_SYNCS_OF_A_STEP = 8
MOST_SYNCS_OF_A_FORWARD = 4
"""Before the backward is queued."""
MORE = {"diffpo_thresholds": 6, "dispo": 7}
"""Of methods whose loss has two parts: each sends its arrays and reads its figures."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[torch.device]:
    with pretended_gpu() as device:
        yield device


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> dict[str, str]:
    folders = {family: tmp_path_factory.mktemp(family) for family in (*FAMILIES, *MASKED)}
    for family, folder in folders.items():
        if family in FAMILIES:
            write_policy(folder, family)
        else:
            write_masked_lm(folder, family)
    return {family: str(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def adapter(tiny_model) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def batches(tiny_model, adapter) -> dict[Drawing, list[TrajectoryGroup]]:
    return draw_batches(tiny_model, adapter)


# ---- the pretended GPU itself


def test_operations_that_mix_devices_are_refused(gpu):
    here, there = torch.ones(3), torch.ones(3).to(gpu)
    assert there.device.type == gpu.type and (there + 1.0).sum().item() == 6.0
    torch.testing.assert_close((there * torch.tensor(2.0)).cpu(), 2 * here)  # a number is allowed, as on CUDA
    torch.testing.assert_close(there[torch.tensor([0, 2])].cpu(), here[:2])  # and indices are
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there.gather(0, torch.tensor([0]))):
        with pytest.raises(MixedDevices, match="mixes devices"):
            mixed()


def test_what_is_waited_for_is_counted(gpu):
    x = torch.arange(6.0).to(gpu)
    with counted() as counts:
        (x.view(2, 3)[:, 1:] * 2).sum()  # two kernels: a view is none
    assert (counts.kernels, counts.syncs) == (2, [])
    for waits in (x.sum().item, x.tolist, x.cpu, lambda: x[x > 2], x.nonzero, lambda: torch.ones(2).to(gpu)):
        with counted() as counts:
            waits()
        assert counts.syncs, "control: this waits"


# ---- sampling


def engine(path: str, device: torch.device | str, dtype: str = "float32") -> TorchEngine:
    lora = LoraSpec(r=4, alpha=8.0)
    return TorchEngine(model_path=path, lora=lora, max_rows=16, threads=1, device=str(device), dtype=dtype)


def drawn(sampled: TorchEngine, sampler: SamplerSpec, **beside: Any) -> tuple[list[TrajectoryGroup], Counts, int]:
    """Two groups with prompts of two lengths, what it took, and in how many steps of the 16 rows."""
    specs = [GroupSpec(i, Problem(f"p{i}", {}), 8, 5 + i) for i in range(2)]
    with counted() as counts:
        groups = sampled.generate(specs, [[5, 6, 7], [5, 6, 7, 8, 9]], sampler, **beside)
    return groups, counts, int(max(group.nfe.max() for group in groups))


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_waits_a_few_times_a_step_and_draws_the_same(gpu, policies, name):
    expected, none, _ = drawn(engine(policies["llada"], "cpu"), SAMPLERS[name])
    found, counts, steps = drawn(engine(policies["llada"], gpu), SAMPLERS[name])
    assert not none.syncs, "control: the CPU waits for nobody"
    assert len(counts.syncs) <= MOST_SYNCS_OF_A_STEP * steps, counts.told()
    for ours, theirs in zip(found, expected, strict=True):
        for field in ("completion_ids", "unmask_step", "logp", "logp_raw", "entropy", "support_ids", "position_logp"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)


@contextmanager
def sequences_numbered() -> Iterator[None]:
    """A deliberate mistake: how many sequences the pads make is read from the GPU."""
    found = layers.sequences
    with mock.patch.object(layers, "sequences", lambda mask: found(mask.long())):
        yield


def test_sampling_by_flash_attention_waits_no_more(gpu, policies):
    """In bf16, as on CUDA, whose kernel takes padded rows as sequences."""
    sampler = dataclasses.replace(SAMPLERS["decoupled_confidence"], steps=4)
    with flash_attention():
        expected, _, _ = drawn(engine(policies["llada"], "cpu", "bfloat16"), sampler)
        on_gpu = engine(policies["llada"], gpu, "bfloat16")
        found, counts, steps = drawn(on_gpu, sampler)
        with sequences_numbered():
            _, more, _ = drawn(on_gpu, sampler)
    assert counts.by_kernel["varlen attention"] >= steps and not counts.by_kernel["attention"], "else it wasn't taken"
    assert len(counts.syncs) <= MOST_SYNCS_OF_A_STEP * steps < len(more.syncs), "and control: " + counts.told()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        np.testing.assert_array_equal(ours.logp, theirs.logp)


BESIDE: dict[str, dict[str, Any]] = {
    "greedy branches": {"branches": GreedyBranches(3)},
    "drawn branches": {"branches": DrawnBranches(2, 4.0)},
    "gaps": {"gaps": [(Gap(1, (3, 5)), Gap(n, (4,))) for n in (3, 5)]},
}


@pytest.mark.parametrize("name", BESIDE)
def test_branches_and_gaps_are_drawn_on_one_device(gpu, policies, name):
    expected, none, _ = drawn(engine(policies["llada"], "cpu"), SAMPLER, **BESIDE[name])
    found, counts, steps = drawn(engine(policies["llada"], gpu), SAMPLER, **BESIDE[name])
    # A branched row's law is cut by itself, so that its logits are copied for one row at a time: two waits a row, once.
    once = 2 * 16 if name == "drawn branches" else 0
    assert not none.syncs and len(counts.syncs) <= MOST_SYNCS_OF_A_STEP * steps + once, counts.told()
    for ours, theirs in zip(found, expected, strict=True):
        for field in ("completion_ids", "branch_ids", "branch_logp", "places"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)


@pytest.mark.parametrize("family", [family for family in (*FAMILIES, *MASKED) if family != "llada"])
def test_every_family_samples_on_one_device(gpu, policies, family):
    expected, _, _ = drawn(engine(policies[family], "cpu"), SAMPLER)
    found, counts, steps = drawn(engine(policies[family], gpu), SAMPLER)
    routed = counts.syncs if family != "llada_moe" else [s for s in counts.syncs if "llada_moe" not in s]
    assert len(routed) <= MOST_SYNCS_OF_A_STEP * steps, counts.told()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_takes_an_adapter_with_its_head_and_decodes_the_same(gpu, policies, name):
    engines = [engine(policies["llada"], device) for device in ("cpu", gpu)]
    law = head_net(engines[0].model.config.hidden_size, 8, 3)
    torch.nn.init.normal_(law[3].weight)
    published = {**acting_adapter(engines[0].model), **pack({HEAD + n: p for n, p in law.named_parameters()})}
    for each in engines:
        each.load_adapter(3, published, digest(published))
    (expected, none, _), (found, counts, steps) = (drawn(each, EVALUATED[name]) for each in engines)
    assert not none.syncs and len(counts.syncs) <= MOST_SYNCS_OF_A_STEP * steps, counts.told()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        np.testing.assert_array_equal(ours.unmask_step, theirs.unmask_step)
    for each in engines:
        each.without_adapter()
    assert (drawn(engines[0], EVALUATED[name])[0][0].completion_ids != expected[0].completion_ids).any(), "control"


# ---- adapters


def waited(work: Callable[[], object]) -> int:
    with counted() as counts:
        work()
    return len(counts.syncs)


def test_an_adapter_comes_and_goes_in_one_copy_for_each_dtype(gpu, policies, tmp_path):
    here, there = (engine(policies["llada"], device).model for device in ("cpu", gpu))
    state = acting_adapter(here)
    load_state(here, state)
    head = {HEAD + name: p.bfloat16() for name, p in head_net(8, 4, 3).named_parameters()}  # of another dtype
    expected = {**adapter_parameters(here), **head}
    held = {**adapter_parameters(there), **{name: tensor.to(gpu) for name, tensor in head.items()}}
    published = {**state, **pack(head)}
    assert waited(lambda: load_state(there, published)) == 1
    assert waited(lambda: require_loaded(held, published)) == 2
    assert waited(lambda: digest_of(held)) == 2
    packed: dict[str, PackedTensor] = {}
    assert waited(lambda: packed.update(pack(held))) == 2
    assert waited(lambda: [pack({name: tensor}) for name, tensor in held.items()]) == len(held) > 20, "control"

    assert digest(packed) == digest_of(held) == digest_of(expected) == digest(pack(expected)) == digest(published)
    for name, tensor in expected.items():
        alone = tensor.detach().contiguous().view(torch.uint8).numpy()
        assert packed[name].data.tobytes() == alone.tobytes() and packed[name].shape == tensor.shape
    files = [tmp_path / "here", tmp_path / "there"]
    for folder, written in zip(files, (pack(expected), packed), strict=True):
        folder.mkdir()
        write_peft_folder(folder, written, {})
    for file in files[0].iterdir():
        assert file.read_bytes() == (files[1] / file.name).read_bytes()


def test_one_flipped_bit_on_the_gpu_is_found(gpu, policies):
    model = engine(policies["llada"], gpu).model
    state = acting_adapter(model)
    load_state(model, state)
    last = adapter_parameters(model)[max(state)]
    last.inner.view(torch.int32)[-1, -1] ^= 1
    with pytest.raises(WeightMismatch, match=f"{re.escape(max(state))} in the model is not what was copied"):
        require_loaded(adapter_parameters(model), state)
    load_state(model, state)
    require_loaded(adapter_parameters(model), state)


# ---- learning


def gradients(
    path: str,
    device: torch.device | str,
    method: str,
    adapter: AdapterState,
    groups: list[TrajectoryGroup],
    dtype: str = "float32",
) -> tuple[dict[str, torch.Tensor], Counts, int]:
    """As ``gradients_of`` a model that is loaded."""
    model = attach_lora(load_model(path, dtype), policy_adapter(path), lora_spec(at(method))).to(device).train()
    return gradients_of(model, path, method, adapter, groups)


def gradients_of(
    model: torch.nn.Module, path: str, method: str, adapter: AdapterState, groups: list[TrajectoryGroup]
) -> tuple[dict[str, torch.Tensor], Counts, int]:
    """Of an update's forwards, one after the other; and what was waited for before each backward."""
    family, objective = policy_adapter(path), make_objective(at(method).objective)
    load_state(model, adapter)
    plan = update_of(objective, family, groups)
    before = Counts()
    for forward in plan.forwards[0]:
        with counted() as counts:
            loss = loss_of(model, batch_of(forward, objective, family, groups), objective, family)
        before.syncs += counts.syncs
        before.by_kernel += counts.by_kernel
        (loss / plan.normaliser).backward()
    found = {name: p.grad.cpu() for name, p in adapter_parameters(model).items() if p.grad is not None}
    return found, before, len(plan.forwards[0])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_one_device(gpu, tiny_model, adapter, batches, method):
    groups = batches[drawing_of(method)]
    expected, none, _ = gradients(tiny_model, "cpu", method, adapter, groups)
    found, before, forwards = gradients(tiny_model, gpu, method, adapter, groups)
    assert not none.syncs and expected, "control: the CPU waits for nobody"
    assert len(before.syncs) <= MORE.get(method, MOST_SYNCS_OF_A_FORWARD) * forwards, before.told()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)


def test_learning_by_flash_attention_waits_no_more(gpu, tiny_model, batches):
    groups, dtype = batches[drawing_of("diffu_grpo")], "bfloat16"
    adapter = random_adapter(tiny_model, settings(learner__dtype=dtype, learner__zero_stage=1))
    with flash_attention():
        expected, _, _ = gradients(tiny_model, "cpu", "diffu_grpo", adapter, groups, dtype)
        found, before, forwards = gradients(tiny_model, gpu, "diffu_grpo", adapter, groups, dtype)
        with sequences_numbered():
            _, more, _ = gradients(tiny_model, gpu, "diffu_grpo", adapter, groups, dtype)
    assert before.by_kernel["varlen attention"] and not before.by_kernel["attention"], "else it wasn't taken"
    assert len(before.syncs) <= MOST_SYNCS_OF_A_FORWARD * forwards < len(more.syncs), "and control: " + before.told()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)


# ---- fine-tuning


class _Engine(torch.nn.Module):
    """What a rank reads of DeepSpeed's engine, without DeepSpeed."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> object:
        return self.module(**inputs)


class _SftRank(SftRank):
    """A rank that is alone, and is handed its demonstrations themselves."""

    def __init__(self, config: SftConfig, path: str, device: torch.device | str, adapter: AdapterState) -> None:
        super().__init__(config, path, 0, 1)
        self.family = policy_adapter(path)
        model = attach_lora(load_model(path), self.family, lora_spec(config)).to(device)
        load_state(model, adapter)
        self.engine = _Engine(model).train()

    def _fetched(self, refs):
        (given,) = refs
        return given


def demonstrations() -> tuple[Example, ...]:
    rng = np.random.default_rng(4)
    sizes = [(5, 9), (7, 4), (6, 12), (9, 3)]
    return tuple(
        Example(str(i), *(rng.integers(5, 25, size).astype(np.int32) for size in both), ended=True)
        for i, both in enumerate(sizes)
    )


@pytest.mark.parametrize("packing", [True, False])
def test_fine_tuning_on_one_device(gpu, tiny_model, adapter, packing):
    given = [f"model.path={tiny_model}", "data.train=none.jsonl", "data.max_tokens=48", "lora.r=4"]
    config = load_sft_config([*given, "sft.eos_tokens=6", "sft.rows_per_forward=2", f"sft.packing={packing}".lower()])
    learned: list[dict[str, torch.Tensor]] = []
    for device in ("cpu", gpu):
        rank, before, packed = _SftRank(config, tiny_model, device, adapter), Counts(), False
        plan, data = rank._work([UpdateBatch(demonstrations(), (0,) * 4)], 0)
        for forward in plan.forwards[0]:
            packed |= max(map(len, forward.rows)) > 1
            with counted() as counts:
                (part,) = rank._losses(forward, data)
            before.syncs += counts.syncs
            (part.loss / plan.normaliser).backward()
        assert packed == packing, "else nothing is shown"
        assert len(before.syncs) <= MOST_SYNCS_OF_A_FORWARD * len(plan.forwards[0]), before.told()
        parameters = adapter_parameters(rank.engine.module)
        held_out = rank.held_out([demonstrations()]).values()
        learned.append({name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None} | held_out)
    expected, found = learned
    assert len(expected) > 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)
