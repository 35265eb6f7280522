"""LoRA on every family: exact names, never the head unasked, names of one's own, and activation checkpointing."""

import re
from pathlib import Path

import pytest
import torch

from learner.evaluation.subject import Adapter, lora_spec
from rewards.errors import ConfigError
from rollout.adapters import adapter_parameters, digest, load_state, pack
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from tests.support.hand_made import acting_adapter
from tests.support.published import FAMILIES, HEAD, random_ids, write_published

LORA = LoraSpec(r=4, alpha=8.0)
QWEN_MLP = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
LORA_NAMES = {
    "llada": ("model.transformer.blocks", ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]),
    "dream": ("model.layers", ATTENTION + QWEN_MLP),
    "llada_moe": ("model.layers", ATTENTION),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(family)
    write_published(path, family)
    return path


@pytest.fixture(scope="module")
def model(folder) -> torch.nn.Module:
    return load_model(folder)


def adapted(model: torch.nn.Module) -> set[str]:
    return {name.partition(".lora_")[0] for name in adapter_parameters(model)}


def test_lora_adapts_exactly_these_maps_and_not_the_head(folder, family):
    policy = policy_adapter(folder)
    stem, parts = LORA_NAMES[family]
    expected = {f"{stem}.{layer}.{part}" for layer in range(2) for part in parts}
    model = attach_lora(load_model(folder), policy, LORA)
    assert adapted(model) == expected and policy.head_name == HEAD[family]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    with_head = LoraSpec(r=4, alpha=8.0, include_head=True)
    assert adapted(attach_lora(load_model(folder), policy, with_head)) == expected | {HEAD[family]}


def test_named_targets(folder, family, caplog):
    policy = policy_adapter(folder)

    def hit(*targets: str, include_head: bool = False) -> set[str]:
        spec = LoraSpec(4, 8.0, include_head, target_modules=targets)
        return adapted(attach_lora(load_model(folder), policy, spec))

    stem, parts = LORA_NAMES[family]
    query, value = parts[0], parts[2]
    assert hit("q_proj", "v_proj") == {f"{stem}.{layer}.{part}" for layer in range(2) for part in (query, value)}
    assert hit(f"{stem}.1.{query}") == {f"{stem}.1.{query}"}
    assert hit(f"1.{query}", f"0.{value}") == {f"{stem}.1.{query}", f"{stem}.0.{value}"}
    assert hit(HEAD[family], "q_proj") == {f"{stem}.{layer}.{query}" for layer in range(2)} | {HEAD[family]}
    assert not caplog.records
    if family == "llada":
        mlp = {f"{stem}.{layer}.ff_out" for layer in range(2)}
        assert hit("ff_out") == mlp
        assert "'ff_out' names the LM head model.transformer.ff_out too" in caplog.text
        assert hit("ff_out", include_head=True) == mlp | {HEAD[family]}


@pytest.mark.parametrize("target", ["query_key_value", "proj", "gate", "q_proj.weight", "layers"])
def test_a_name_that_matches_nothing_is_answered_with_the_names_that_exist(folder, family, target):
    stem, parts = LORA_NAMES[family]
    listed = rf"{target!r} names no linear map.*{re.escape(stem)}\.N\.{re.escape(sorted(parts)[0])}"
    spec = LoraSpec(4, 8.0, target_modules=("q_proj", target))
    with pytest.raises(ConfigError, match=listed) as raised:
        attach_lora(load_model(folder), policy_adapter(folder), spec)
    assert HEAD[family] in str(raised.value)


def test_checkpointing_recomputes_and_gives_the_same_gradient(folder, family):
    gradients, forwards = [], []
    mask = torch.tensor([[0] * 3 + [1] * 9, [1] * 5 + [2] * 7])
    for checkpointing in (False, True):
        model, calls = attach_lora(load_model(folder), policy_adapter(folder), LORA), []
        load_state(model, acting_adapter(model))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        stem, parts = LORA_NAMES[family]
        inner = model.get_submodule(f"base_model.model.{stem}.0.{parts[3]}")
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=random_ids(2, 12), attention_mask=mask).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
        forwards.append(len(calls))
    assert forwards == [1, 2]
    assert all(grad.abs().max() > 0 for grad in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_an_evaluation_rebuilds_an_adapter_of_ones_own_targets(folder, tmp_path):
    policy = policy_adapter(folder)
    for targets, include_head in ((("q_proj",), False), (("v_proj",), True), (None, True), (None, False)):
        spec = LoraSpec(4, 8.0, include_head, target_modules=targets)
        model = attach_lora(load_model(folder), policy, spec)
        state, config = pack(adapter_parameters(model)), model.peft_config["default"].to_dict()
        again = lora_spec(Adapter(tmp_path, state, config, digest(state)), str(folder))
        assert (again.target_modules is None) == (targets is None) and again.include_head == include_head
        assert adapted(attach_lora(load_model(folder), policy, again)) == adapted(model)
