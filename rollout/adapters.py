"""LoRA adapters as plain data: what the learner publishes, what an actor loads, and the digest that ties the two.

An adapter crosses processes as ``AdapterState``: canonical parameter name -> ``PackedTensor``. Bytes are packed because
numpy has no bfloat16. Names are canonical when they don't depend on how peft or DeepSpeed wrapped the module:
``model.transformer.blocks.0.q_proj.lora_A.weight``. On disk they carry the prefix that peft writes.

A state may bring a head that actors draw with (``rollout.models.prompt_head``): its tensors' names begin with
``prompt_head.``, are part of the digest, and lie in a file of their own on disk, which PEFT doesn't look at.

On disk the digest stands in the header of the adapter's file, where damage and files that don't belong together show.
It is no signature, and doesn't cover ``adapter_config.json``, where a user may correct the place of the base.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rewards.errors import ConfigError, DataError, WeightMismatch

ADAPTER_NAME = "default"
HEAD = "prompt_head."
_ADAPTER_FILE = "adapter_model.safetensors"
_HEAD_FILE = "prompt_head.safetensors"
_PEFT_PREFIX = "base_model.model."
_DIGEST = "digest"  # key in the header's metadata

# PEFT's options that leave the function as it is, with the values for which that holds; none: all values. Any other
# option that is set, also one of a later PEFT, is not ours.
_PLAIN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"), ()),
    **dict.fromkeys(("layers_to_transform", "layers_pattern"), ()),  # which maps: the tensors' names say it too
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"), ()),
    **dict.fromkeys(("auto_mapping", "megatron_core", "qalora_group_size"), ()),
    **dict.fromkeys(("eva_config", "ensure_weight_tying"), ()),  # how it was begun, or of no effect without tied maps
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # pissa, olora and others change the base too
}


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as bytes: torch dtype name (``float32``, ``bfloat16``), shape, [nbytes] uint8."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


AdapterState = Mapping[str, PackedTensor]


def canonical_name(name: str) -> str:
    """Name of an adapter parameter without the wrappers' parts."""
    name = name.removeprefix("module.").removeprefix(_PEFT_PREFIX)
    return name.replace(f".{ADAPTER_NAME}.", ".")


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by canonical name, sorted."""
    found = {canonical_name(name): p for name, p in model.named_parameters() if _is_lora(name)}
    return dict(sorted(found.items()))


def head_tensors(state: AdapterState) -> AdapterState:
    """The tensors of the head that a state brings, under their full names; empty where it brings none."""
    return {name: tensor for name, tensor in state.items() if name.startswith(HEAD)}


def without_head(state: AdapterState) -> AdapterState:
    """The adapter alone."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}


def pack(tensors: Mapping[str, torch.Tensor]) -> dict[str, PackedTensor]:
    """Copy tensors of any dtype and device into packed form, sorted by name. Those that lie elsewhere than on the CPU
    share the memory into which they were copied."""
    came = _on_cpu(tensors)
    return {name: _packed(came[name].clone() if _is_here(tensors[name]) else came[name]) for name in sorted(tensors)}


def _is_here(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _elsewhere(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of the tensors that are not on the CPU, sorted: those of one device and dtype together."""
    found: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name in sorted(tensors):
        if not _is_here(tensors[name]):
            found.setdefault((tensors[name].device, tensors[name].dtype), []).append(name)
    return list(found.values())


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors where they are on the CPU, else copies there. What is elsewhere is laid end to end there, and comes
    in one copy for each dtype: the host waits for the device once, not once for each tensor."""
    came = {name: tensor.detach() for name, tensor in tensors.items() if _is_here(tensor)}
    for names in _elsewhere(tensors):
        flat = torch.cat([tensors[name].detach().reshape(-1) for name in names]).to("cpu")
        parts = flat.split([tensors[name].numel() for name in names])
        came |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return came


def _packed(tensor: torch.Tensor) -> PackedTensor:
    """Of a CPU tensor, whose memory it shares where that is contiguous."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return PackedTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def unpack(packed: PackedTensor) -> torch.Tensor:
    """A fresh CPU tensor with the packed values."""
    flat = torch.from_numpy(packed.data.copy()).view(getattr(torch, packed.dtype))
    return flat.reshape(packed.shape)


def _readable(packed: PackedTensor) -> torch.Tensor:
    """The packed values where they lie, which may be memory of the object store that nobody may write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(packed.data)
    return flat.view(getattr(torch, packed.dtype)).reshape(packed.shape)


def digest(state: AdapterState) -> str:
    """sha256 over sorted (canonical name, dtype, shape, bytes)."""
    sha = hashlib.sha256()
    for name in sorted(state):
        _hash(sha, name, state[name])
    return sha.hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest of these tensors, packed; what lies in the CPU's memory is hashed where it is."""
    sha = hashlib.sha256()
    for name, tensor in sorted(_on_cpu(tensors).items()):
        _hash(sha, name, _packed(tensor))
    return sha.hexdigest()


def _hash(sha: Any, name: str, tensor: PackedTensor) -> None:
    sha.update(f"{name}|{tensor.dtype}|{tensor.shape}|".encode())
    sha.update(np.ascontiguousarray(tensor.data))


def require_plain_lora(peft_config: Mapping[str, Any], source: Path) -> None:
    """Refuses an adapter whose options make it another function than the LoRA that this code applies.

    Raises:
        ConfigError: naming the options.
    """
    odd = [f"{name}={value}" for name, value in peft_config.items() if value and not _is_plain(name, value)]
    if any(not isinstance(peft_config.get(name), int | float) for name in ("r", "lora_alpha")):
        odd.append("no r or lora_alpha")
    if odd:
        raise ConfigError(
            f"the adapter in {source} has {', '.join(odd)}, and only plain LoRA is applied here; merge it into its "
            "model with PEFT and give that as model.path"
        )


def _is_plain(name: str, value: Any) -> bool:
    allowed = _PLAIN.get(name)
    return allowed is not None and (not allowed or value in allowed)


def load_state(model: torch.nn.Module, state: AdapterState) -> None:
    """Copy an adapter into ``model``. A head beside it is left alone.

    Raises:
        WeightMismatch: when names, shapes or dtypes differ from the model's adapter; nothing is copied then.
    """
    own, state = adapter_parameters(model), without_head(state)
    if set(own) != set(state):
        odd = ", ".join(sorted(set(own) ^ set(state))[:3])
        raise WeightMismatch(f"the adapter and this model's LoRA disagree about parameters: {odd}")
    for name, parameter in own.items():
        theirs, held = state[name], f"{str(parameter.dtype).removeprefix('torch.')} {_full_shape(parameter)}"
        if held != f"{theirs.dtype} {theirs.shape}":
            raise WeightMismatch(f"{name} is {theirs.dtype} {theirs.shape} in the adapter and {held} in this model")
    with torch.no_grad():
        for name, parameter in own.items():
            if _is_here(parameter):
                parameter.copy_(_readable(state[name]))
        for names in _elsewhere(own):  # end to end in one copy, as they come back in ``_on_cpu``
            flat = torch.cat([_readable(state[name]).reshape(-1) for name in names]).to(own[names[0]].device)
            for name, part in zip(names, flat.split([own[name].numel() for name in names]), strict=True):
                own[name].copy_(part.view(own[name].shape))


def require_loaded(tensors: Mapping[str, torch.Tensor], state: AdapterState) -> None:
    """Compare what a model computes with, by canonical name, with the state that was copied into it, bit for bit.

    Raises:
        WeightMismatch: naming a tensor that is another one, or is missing on a side.
    """
    if odd := set(tensors) ^ set(state):
        raise WeightMismatch(f"what the model holds and what was copied into it disagree about {min(odd)}")
    for name, tensor in sorted(_on_cpu(tensors).items()):
        held, theirs = _packed(tensor), state[name]
        if (held.dtype, held.shape) != (theirs.dtype, theirs.shape) or not np.array_equal(held.data, theirs.data):
            raise WeightMismatch(f"{name} in the model is not what was copied into it")


def write_peft_folder(folder: Path, state: AdapterState, peft_config: Mapping[str, Any]) -> None:
    """Write the adapter so that ``PeftModel.from_pretrained(base, folder)`` loads it, with its digest. ``folder`` must
    exist. The same adapter is the same bytes."""
    tensors = {_PEFT_PREFIX + name: unpack(packed) for name, packed in without_head(state).items()}
    metadata = {"format": "pt", _DIGEST: digest(state)}
    save_file(tensors, folder / _ADAPTER_FILE, metadata=metadata)
    _order_metadata(folder / _ADAPTER_FILE, metadata)
    if head := head_tensors(state):
        save_file({name: unpack(packed) for name, packed in head.items()}, folder / _HEAD_FILE)
    (folder / "adapter_config.json").write_text(json.dumps(peft_config, indent=2, sort_keys=True) + "\n")


def _order_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Give the metadata of a safetensors file this order: the library writes it in a different one each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": metadata}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size, f"the header of {path} has {len(text)} bytes instead of {size}"
        file.seek(8)
        file.write(text)


def read_peft_folder(folder: Path) -> tuple[dict[str, PackedTensor], dict[str, Any]]:
    """An adapter in PEFT format, with the head that lies beside it, and its configuration.

    Raises:
        DataError: when the folder holds no readable adapter, or one that isn't what was written: it has a digest, as
            those of ``write_peft_folder`` have, and not that of its tensors. PEFT itself writes none.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / _ADAPTER_FILE)
        head = load_file(folder / _HEAD_FILE) if (folder / _HEAD_FILE).exists() else {}
        with safe_open(folder / _ADAPTER_FILE, framework="pt") as file:
            written = (file.metadata() or {}).get(_DIGEST)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} holds no readable PEFT adapter (safetensors): {error}") from error
    state = pack({**{canonical_name(name): tensor for name, tensor in tensors.items()}, **head})
    if written is not None and (found := digest(state)) != written:
        raise DataError(
            f"the adapter in {folder} is damaged or its files belong to several adapters: its digest is {found[:12]}, "
            f"and {written[:12]!r} was written with it; copy the whole folder anew from where it was made"
        )
    return state, config


def _is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty shard behind
