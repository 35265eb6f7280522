"""Merging an adapter into its base: the same function of the input, under the base's parameter names."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from learner.export import export_merged
from rewards.errors import ConfigError, DataError, WeightMismatch
from rollout.adapters import adapter_parameters, pack, write_peft_folder
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.tokenizer import build_tokenizer


def write_base(path, **changes) -> None:
    tokenizer = build_tokenizer()
    ids = dict(mask_token_id=tokenizer.mask_token_id, eos_token_id=0, pad_token_id=0)
    sizes = dict(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=48, vocab_size=len(tokenizer), init_std=0.1)
    LLaDAModelLM(LLaDAConfig(**ids, **(sizes | changes))).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture
def trained(tmp_path):
    """(base folder, adapter folder, inputs, adapter-on logits); no B matrix is 0, the head is adapted too."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    write_base(base)
    model = attach_lora(load_model(base), policy_adapter(base), LoraSpec(r=4, alpha=8, include_head=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder.mkdir()
    config = model.peft_config["default"].to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_peft_folder(folder, pack(adapter_parameters(model)), config | {"base_model_name_or_path": str(base)})
    ids = torch.randint(7, 60, (2, 12), generator=generator)
    with torch.no_grad():
        return base, folder, ids, model(input_ids=ids).logits


@torch.no_grad()
def test_the_merged_model_is_base_plus_adapter(trained, tmp_path):
    base, adapter, ids, expected = trained
    export_merged(adapter, tmp_path / "out")
    merged = load_model(tmp_path / "out")
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=0)
    assert (load_model(base)(ids).logits - expected).abs().max() > 0.01  # control: the adapter does something
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    assert on_disk.keys() == load_file(base / "model.safetensors").keys()
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(base).get_vocab()
    assert policy_adapter(tmp_path / "out") == policy_adapter(base)


@torch.no_grad()
def test_the_fixture_is_a_peft_adapter(trained):
    base, adapter, ids, expected = trained
    torch.testing.assert_close(PeftModel.from_pretrained(load_model(base), adapter)(input_ids=ids).logits, expected)


def test_a_folder_with_content_is_not_overwritten(trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="not empty"):
        export_merged(trained[1], out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    export_merged(trained[1], out)
    assert (out / "config.json").is_file()


def test_what_does_not_fit_is_refused_and_leaves_nothing(trained, tmp_path):
    base, adapter, _, _ = trained
    out, other = tmp_path / "out", tmp_path / "other"
    write_base(other, n_layers=3)
    with pytest.raises(WeightMismatch, match=r"blocks\.2"):
        export_merged(adapter, out, str(other))
    with pytest.raises(DataError, match="no readable PEFT adapter"):
        export_merged(base, out)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="--base"):
        export_merged(adapter, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


@pytest.mark.slow
def test_the_command(trained, tmp_path):
    base, adapter, _, _ = trained
    command = [sys.executable, "-m", "learner.export", "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--base", str(base)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: --out")
