"""Every family from a checkpoint in its published layout, with nothing missing and nothing left over, and back to that
layout with an adapter merged in."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from learner.export import export_merged
from rewards.errors import ConfigError
from rollout.adapters import adapter_parameters, load_state, pack, write_peft_folder
from rollout.models.encoding import encode_prompt, load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from tests.support.hand_made import acting_adapter
from tests.support.published import FAMILIES, random_ids, write_published, write_shards

LORA = LoraSpec(r=4, alpha=8.0)


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


# ---- loading


def test_the_published_weights_are_the_models_weights(family, folder, tmp_path):
    written = write_published(tmp_path, family)
    kind = policy_adapter(folder).model_class
    loaded, loading = kind.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not any(loading.values()), loading
    held = loaded.state_dict()
    assert held.keys() == written.keys()
    assert all(torch.equal(held[name], written[name]) for name in written)
    assert not load_model(folder).training
    assert type(AutoModel.from_pretrained(folder)) is kind  # plain transformers, once our families are imported


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "torn", "none"])
def test_a_checkpoint_with_other_weights_is_refused_in_one_sentence(family, tmp_path, fault):
    state = write_published(tmp_path, family)
    victim = sorted(name for name in state if ".1." in name and name.endswith("q_proj.weight"))[0]
    expected = {
        "missing": f"lacks: {re.escape(victim)}$",
        "unexpected": r"has too much: model\.rotary\.inv_freq$",
        "shape": rf"has in other shapes: {re.escape(victim)} \(3, 5\)$",
        "torn": "can't be read",
        "none": "can't be read",
    }[fault]
    if fault == "missing":
        del state[victim]
    elif fault == "unexpected":
        state["model.rotary.inv_freq"] = torch.ones(4)
    elif fault == "shape":
        state[victim] = torch.ones(3, 5)
    if fault in ("missing", "unexpected", "shape"):
        write_shards(tmp_path, state)
    for shard in tmp_path.glob("model*"):
        if fault == "torn" and shard.suffix == ".safetensors":
            shard.write_bytes(shard.read_bytes()[:200])
        if fault == "none":
            shard.unlink()
    with pytest.raises(ConfigError, match=expected) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_of_many_faults_the_first_are_named(family, tmp_path):
    state = write_published(tmp_path, family)
    write_shards(tmp_path, {name: t for name, t in state.items() if "_proj" not in name})
    with pytest.raises(ConfigError, match=r"lacks: ([^,]+, ){2}[^,]+ and \d+ more$"):
        load_model(tmp_path)


def test_a_hub_name_is_looked_up_in_transformers_own_cache(family, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--small"
    state = write_published(repository / "snapshots" / "c0ffee", family)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    assert load_model("somebody/small").state_dict().keys() == state.keys()
    assert load_tokenizer("somebody/small").mask_token_id == policy_adapter("somebody/small").mask_token_id
    for what in (policy_adapter, load_model, load_tokenizer):
        with pytest.raises(ConfigError, match="somebody/absent") as raised:
            what("somebody/absent")
        assert "\n" not in str(raised.value)


def test_ids_and_tokenizer_come_from_the_checkpoint(folder):
    policy, tokenizer = policy_adapter(folder), load_tokenizer(folder)
    assert policy.mask_token_id == tokenizer.mask_token_id
    assert policy.eos_token_id == policy.pad_token_id == tokenizer.eos_token_id
    assert policy.max_length == 128
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hello, 12 + 30?"}])
    text = tokenizer.decode(ids)
    assert "Hello, 12 + 30?" in text and "assistant" in text.partition("30?")[2] and policy.mask_token_id not in ids


def test_a_size_that_is_no_number_is_refused(family, tmp_path):
    write_published(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": "tiny"}))
    with pytest.raises(ConfigError, match="another type.*rms_norm_eps.*'tiny'") as raised:
        policy_adapter(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_mask_token_beyond_the_vocabulary_is_refused(family, tmp_path):
    write_published(tmp_path, family, mask_token_id=5000)
    with pytest.raises(ConfigError, match="mask token 5000 lies beyond its vocabulary"):
        policy_adapter(tmp_path)


@torch.no_grad()
def test_bfloat16_loads_and_is_near(model, folder):
    half, ids = load_model(folder, "bfloat16"), random_ids(2, 12)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    difference = (half(ids).logits.float() - model(ids).logits).abs()
    assert 0 < difference.mean() < 0.1 * model(ids).logits.std()


# ---- export


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """An adapter folder as a run writes it, and its logits."""
    model = attach_lora(load_model(folder), policy_adapter(folder), LORA)
    load_state(model, acting_adapter(model))
    path = tmp_path_factory.mktemp("adapter")
    config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": str(folder)}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_peft_folder(path, pack(adapter_parameters(model)), plain)
    with torch.no_grad():
        return path, model(input_ids=random_ids(2, 12)).logits


@torch.no_grad()
def test_plain_peft_loads_the_adapter_onto_the_base(trained, folder, model):
    adapter, expected = trained
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(folder, dtype="float32"), adapter)
    torch.testing.assert_close(by_peft(input_ids=random_ids(2, 12)).logits, expected)
    assert (model(random_ids(2, 12)).logits - expected).abs().max() > 0.01  # control: the adapter does something


@torch.no_grad()
def test_the_export_has_the_published_layout(trained, folder, tmp_path):
    adapter, expected = trained
    code = folder / "modeling_of_the_publisher.py"
    code.write_text("raise AssertionError('foreign code was run')\n")
    export_merged(adapter, tmp_path / "out")
    torch.testing.assert_close(load_model(tmp_path / "out")(random_ids(2, 12)).logits, expected, atol=1e-5, rtol=1e-5)
    published = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == published.keys()
    source, written = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert written == source | {"torch_dtype": "float32"}
    assert (tmp_path / "out" / code.name).read_text() == code.read_text()
    theirs = {path.name for path in folder.iterdir() if not path.name.startswith("model")}
    assert theirs <= {path.name for path in (tmp_path / "out").iterdir()}
    for name in theirs - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    code.unlink()


@torch.no_grad()
def test_a_base_of_the_hub_keeps_its_code_there(trained, family, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--small"
    write_published(repository / "snapshots" / "c0ffee", family)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    adapter, expected = trained
    export_merged(adapter, tmp_path / "out", "somebody/small")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(
        target.startswith("somebody/small--modeling_")
        for kind, target in written["auto_map"].items()
        if kind != "AutoConfig"
    )
    torch.testing.assert_close(load_model(tmp_path / "out")(random_ids(2, 12)).logits, expected, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer("somebody/small").get_vocab()
