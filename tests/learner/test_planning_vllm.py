"""``learner.plan`` knows what an actor over vLLM holds."""

import pytest

from learner.planning.memory import GIB, VLLM_ALLOWANCE, actor_memory
from learner.planning.report import render
from tests.learner.test_planning import items, planned_run

VLLM = "rollout.engine=vllm"


def test_an_actor_holds_two_slots_instead_of_an_adapter() -> None:
    embedded, vllm = items(planned_run().actor), items(planned_run(VLLM).actor)
    assert vllm["base weights"] == embedded["base weights"] == 2 * 8_015_581_184
    assert vllm["slots for adapters"] == 2 * embedded["adapter"] and "adapter" not in vllm
    wide = items(planned_run(VLLM, "lora.r=65").actor)["slots for adapters"]
    assert wide == pytest.approx(vllm["slots for adapters"] * 128 / 64, rel=1e-9)


def test_weights_are_split_and_stored_in_eight_bits() -> None:
    whole, maps = 2 * 8_015_581_184, 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    settings = (VLLM, "rollout.vllm.tensor_parallel_size=2", "resources.gpus_per_actor=2")
    assert items(planned_run(*settings).actor)["base weights"] == whole // 2
    assert items(planned_run(VLLM, "rollout.vllm.quantization=fp8").actor)["base weights"] == whole - maps


def test_the_budget_is_vllms_share_and_a_pass_has_its_own_limit() -> None:
    plan = planned_run(VLLM, "rollout.vllm.memory_share=0.5")
    assert plan.actor_budget.bytes == planned_run().actor_budget.bytes // 2
    few = planned_run(VLLM, "rollout.vllm.max_batch_tokens=1280").actor
    two = planned_run(VLLM, "rollout.max_rows=2").actor
    assert items(few)["one block's forward"] == items(two)["one block's forward"]
    assert "vllm, max_rows" in render(plan)


def test_on_a_cpu_vllm_itself_counts() -> None:
    config = planned_run(VLLM).config
    model = planned_run().model
    assert items(actor_memory(config, model, device="cpu", prompt=256))["vLLM"] == VLLM_ALLOWANCE < GIB
