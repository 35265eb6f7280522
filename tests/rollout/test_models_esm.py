"""ESM-2 beyond what every masked LM shows: its embeddings depend on how many masks a sequence holds, its files have
the hub's older names, and its tokenizer writes proteins without spaces."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EsmTokenizer

from rewards.errors import ConfigError
from rollout.models.encoding import completion_text, encode_prompt, load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from tests.support.small_masked_lms import MASK, PAD, write_masked_lm

WORDS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
SPECIAL = {"cls_token": "<cls>", "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("esm")
    return folder, write_masked_lm(folder, "esm")


def masked(length: int, masks: int, seed: int) -> torch.Tensor:
    """[1, length] ids, some of them masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (1, length), generator=generator)
    ids[0, torch.randperm(length, generator=generator)[:masks]] = MASK
    return ids


@torch.no_grad()
@pytest.mark.parametrize("masks", [0, 3, 11])
def test_logits_with_masks_are_transformers(written, masks):
    folder, original = written
    model, ids = load_model(folder), masked(12, masks, seed=masks)
    expected = original(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    padded = torch.cat([ids, torch.full((1, 5), PAD)], dim=1)
    torch.testing.assert_close(
        model(padded, (torch.arange(17) < 12).long()[None]).logits[:, :12], expected, atol=1e-5, rtol=0
    )
    original.esm.embeddings.token_dropout = False
    difference = (original(ids).logits - expected).abs().max()
    original.esm.embeddings.token_dropout = True
    assert difference > 1e-2, "control: the scaling matters"


@torch.no_grad()
def test_a_norm_of_the_embeddings_is_transformers(tmp_path):
    original = write_masked_lm(tmp_path, "esm", emb_layer_norm_before=True)
    ids = masked(12, 4, seed=3)
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, original(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_masks_are_counted_by_sequence_in_a_packed_row(written):
    folder, original = written
    model, first, second = load_model(folder), masked(14, 9, seed=1), masked(11, 1, seed=2)
    packed = torch.cat([torch.full((1, 3), MASK), first, second], dim=1)
    numbers = torch.tensor([[0] * 3 + [1] * 14 + [2] * 11])
    logits = model(packed, numbers).logits
    for part, ids in ((slice(3, 17), first), (slice(17, 28), second)):
        torch.testing.assert_close(logits[:, part], original(ids).logits, atol=1e-5, rtol=0)
    together = model(packed, (numbers > 0).long()).logits
    assert (together[:, 17:] - logits[:, 17:]).abs().max() > 0.05, "control: one sequence"


@torch.no_grad()
def test_the_hubs_layout_is_read(tmp_path):
    original = write_masked_lm(tmp_path, "esm", mask_token_id=WORDS.index("<mask>"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    write_tokenizer(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: held for name, held in weights.items() if not name.endswith("inv_freq")}
    frequencies = original.esm.rotary_embeddings.inv_freq
    for layer in range(3):
        weights[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = frequencies.clone()
    weights["esm.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    family, tokenizer = policy_adapter(tmp_path), load_tokenizer(tmp_path)
    assert (family.mask_token_id, family.eos_token_id, family.pad_token_id) == (32, 2, 1)
    ids = torch.tensor([tokenizer("MKTAY<mask>KQ<mask>")["input_ids"]])
    assert (ids == 32).sum() == 2
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, original(ids).logits, atol=1e-5, rtol=0)


def write_tokenizer(folder: Path) -> None:
    """As the hub has it."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    settings = {**SPECIAL, "mask_token": "<mask>", "tokenizer_class": "EsmTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_proteins_are_read_and_written_without_spaces(tmp_path):
    write_tokenizer(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), EsmTokenizer.from_pretrained(tmp_path)
    for text in ("MKTAYIAKQR", "MKT<mask><mask>A", "M K TX-.", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    assert (ours.mask_token_id, ours.eos_token_id, len(ours)) == (theirs.mask_token_id, theirs.eos_token_id, 33)
    ids = ours("MKTA")["input_ids"]
    assert completion_text(ours, ids) == "MKTA" and theirs.decode(ids, skip_special_tokens=True) == "M K T A"
    assert encode_prompt(ours, [{"role": "user", "content": "MKTA"}]) == ids


def test_an_esm_without_rotary_positions_is_refused(written, tmp_path):
    folder, _ = written
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"position_embedding_type": "absolute"}))
    with pytest.raises(ConfigError, match="is an ESM-1.*take ESM-2"):
        policy_adapter(tmp_path)
