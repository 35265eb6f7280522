"""The digest of what a model holds is that of what was published, and is taken where the weights lie. On disk it tells
an adapter that isn't the one that was written."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewards.errors import DataError
from rollout.adapters import (
    AdapterState,
    adapter_parameters,
    digest,
    digest_of,
    load_state,
    pack,
    read_peft_folder,
    write_peft_folder,
)

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.fixture
def model() -> torch.nn.Module:
    """Two LoRA parameters, of different types."""
    model, layer = torch.nn.Module(), torch.nn.Module()
    model.add_module("layer", layer)
    for name, dtype in (("lora_A", torch.float32), ("lora_B", torch.bfloat16)):
        part = torch.nn.Module()
        part.register_parameter("weight", torch.nn.Parameter(torch.randn(4, 6).to(dtype)))
        layer.add_module(name, part)
    return model


def test_it_is_the_packed_weights_digest(model: torch.nn.Module) -> None:
    held = adapter_parameters(model)
    assert len(held) == 2 and digest_of(held) == digest(pack(held))
    turned = {name: value.detach().t() for name, value in held.items()}  # not contiguous
    assert digest_of(turned) == digest(pack(turned)) != digest_of(held)


def test_one_changed_value_changes_it(model: torch.nn.Module) -> None:
    held = adapter_parameters(model)
    before = digest_of(held)
    with torch.no_grad():
        next(iter(held.values()))[2, 3] += 1e-3
    assert digest_of(held) != before


def test_weights_are_loaded_from_memory_that_nobody_may_write_to(model: torch.nn.Module) -> None:
    state = pack({name: torch.full_like(value, 3.0) for name, value in adapter_parameters(model).items()})
    for tensor in state.values():
        tensor.data.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_state(model, state)
    assert digest_of(adapter_parameters(model)) == digest(state)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.zero_()
    assert all(np.asarray(tensor.data).any() for tensor in state.values()), "the model shares the store's memory"


# ---- on disk


@pytest.fixture
def with_head() -> AdapterState:
    names = ("layer.lora_A.weight", "layer.lora_B.weight", "prompt_head.out.weight")
    generator = torch.Generator().manual_seed(1)
    return pack({name: torch.randn(4, 6, generator=generator) for name in names})


@pytest.fixture
def folder(tmp_path: Path, with_head: AdapterState) -> Path:
    write_peft_folder(tmp_path, with_head, CONFIG)
    return tmp_path


def header(folder: Path) -> dict[str, str]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return file.metadata() or {}


def last_byte(file: Path) -> None:
    """Change one bit of one weight."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def another_head(folder: Path) -> None:
    save_file({"prompt_head.out.weight": torch.zeros(4, 6)}, folder / "prompt_head.safetensors")


def another_name(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layer.lora_A", b"other.lora_A"))


def another_digest(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(header(folder)["digest"].encode(), 64 * b"0"))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a weight": lambda folder: last_byte(folder / "adapter_model.safetensors"),
    "a weight of the head": lambda folder: last_byte(folder / "prompt_head.safetensors"),
    "no head": lambda folder: (folder / "prompt_head.safetensors").unlink(),
    "another head": another_head,
    "another name": another_name,
    "another digest": another_digest,
}


def test_an_adapter_on_disk_has_the_digest_of_what_was_published(folder: Path, with_head: AdapterState) -> None:
    assert header(folder) == {"format": "pt", "digest": digest(with_head)}
    state, config = read_peft_folder(folder)
    assert digest(state) == digest(with_head) and config == CONFIG


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_not_what_was_written_is_refused(folder: Path, damage: str) -> None:
    """And read where nothing says what was written: the digest is what refuses it."""
    DAMAGE[damage](folder)
    with pytest.raises(
        DataError, match=re.escape(f"the adapter in {folder} is damaged or its files belong to")
    ) as told:
        read_peft_folder(folder)
    assert "\n" not in str(told.value) and header(folder)["digest"][:12] in str(told.value)
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors", {"format": "pt"})
    read_peft_folder(folder)


def test_an_adapter_of_pefts_own_has_no_digest_and_is_read(folder: Path, with_head: AdapterState) -> None:
    """Nor has one of an older Unmask."""
    for metadata in ({"format": "pt"}, None):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(tensors, folder / "adapter_model.safetensors", metadata)
        assert digest(read_peft_folder(folder)[0]) == digest(with_head)


def test_what_a_user_corrects_in_the_configuration_is_not_covered(folder: Path) -> None:
    moved = CONFIG | {"base_model_name_or_path": "/elsewhere"}
    (folder / "adapter_config.json").write_text(json.dumps(moved))
    assert read_peft_folder(folder)[1] == moved


def test_the_same_adapter_is_the_same_bytes(folder: Path, with_head: AdapterState) -> None:
    file = folder / "adapter_model.safetensors"
    first, tensors, metadata = file.read_bytes(), load_file(file), header(folder)
    for _ in range(20):
        write_peft_folder(folder, with_head, CONFIG)
        assert file.read_bytes() == first
    others = set()
    for _ in range(20):
        save_file(tensors, file, metadata)
        others.add(file.read_bytes())
    assert len(others) == 2, "the control: safetensors alone writes its metadata in any order"
    assert {len(other) for other in others} == {len(first)} and first in others
