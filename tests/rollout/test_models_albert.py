"""ALBERT, whose layers are one layer over and over: one adapter for all of them, and all are computed again."""

import json
import shutil

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForMaskedLM
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.export import export_merged
from rewards.errors import ConfigError
from rollout.adapters import adapter_parameters, load_state, pack, write_peft_folder
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from tests.support.hand_made import acting_adapter
from tests.support.small_masked_lms import write_masked_lm

LAYERS = 3
LORA = LoraSpec(r=4, alpha=4.0)
IDS = torch.arange(5, 21).reshape(2, 8)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("albert")
    return folder, write_masked_lm(folder, "albert", num_hidden_groups=1)


@torch.no_grad()
def test_one_layer_stands_for_all(shared):
    folder, original = shared
    model = load_model(folder)
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-6, rtol=0)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 1 and model.config.num_hidden_layers == LAYERS
    plain = AutoModelForMaskedLM.from_pretrained(folder)
    assert not any(isinstance(module, GradientCheckpointingLayer) for module in plain.modules()), "transformers' own"


@torch.no_grad()
def test_adapter_and_merged_model_go_back_to_plain_transformers(shared, tmp_path):
    folder, original = shared
    model = attach_lora(load_model(folder), policy_adapter(folder), LORA)
    load_state(model, acting_adapter(model, scale=0.2))
    logits = model(input_ids=IDS).logits
    assert (logits - original(IDS).logits).abs().max() > 0.01, "control: the adapter does something"
    peft_config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config["default"].to_dict().items()
    }
    (adapter := tmp_path / "adapter").mkdir()
    write_peft_folder(adapter, pack(adapter_parameters(model)), peft_config)
    export_merged(adapter, tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    torch.testing.assert_close(merged(IDS).logits, logits, atol=1e-5, rtol=0)


def test_several_layers_in_one_are_refused(shared, tmp_path):
    folder, _ = shared
    copied = shutil.copytree(folder, tmp_path / "several")
    config = json.loads((copied / "config.json").read_text()) | {"inner_group_num": 2}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="inner_group_num=2"):
        policy_adapter(copied)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_adapter_of_the_one_layer_has_the_gradient_of_all_its_uses(shared, checkpointing):
    folder, original = shared
    model = attach_lora(load_model(folder), policy_adapter(folder), LORA)
    adapter = acting_adapter(model)
    load_state(model, adapter)
    assert {name.split(".lora_")[0].rpartition("albert_layers.0.")[2] for name in adapter_parameters(model)} == {
        *(f"attention.{name}" for name in ("query", "key", "value", "dense")),
        *("ffn", "ffn_output"),
    }
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    next(m for m in model.train().modules() if isinstance(m, LoraLayer)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    model(input_ids=IDS).logits.square().mean().backward()
    assert len(calls) == LAYERS * (1 + checkpointing)
    name, parameter = next((n, p) for n, p in adapter_parameters(model).items() if "ffn_output" in n and "lora_B" in n)
    step, loss = 1e-3, []
    with torch.no_grad():
        for sign in (1, -1):
            parameter[0, 0] += sign * step
            loss.append(float(model(input_ids=IDS).logits.double().square().mean()))
            parameter[0, 0] -= sign * step
    slope = (loss[0] - loss[1]) / (2 * step)
    assert abs(slope) > 1e-3 and parameter.grad[0, 0] == pytest.approx(slope, rel=2e-2), name
