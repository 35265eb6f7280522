"""The adapter's way into vLLM: in slots of its own, or merged into the base's weights.

Both know afterwards that what vLLM computes with is what was published.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import Linear

from rewards.errors import ConfigError, WeightMismatch
from rollout.adapters import (
    ADAPTER_NAME,
    AdapterState,
    adapter_parameters,
    canonical_name,
    digest,
    load_state,
    pack,
    require_loaded,
    unpack,
    write_peft_folder,
)
from rollout.engines.vllm.heads import encoder
from rollout.engines.vllm.settings import ADAPTERS
from rollout.models.family import PolicyAdapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, adapter_shapes, attach_lora


class Weights(Protocol):
    """What the model in vLLM computes with."""

    def load(self, adapter: AdapterState, expected_digest: str, hashed: Callable[[AdapterState], str]) -> None:
        """Raises WeightMismatch: names, shapes or digest are not what they should be; nothing may be drawn then."""

    def bare(self) -> None:
        """Back to the base."""


class Slots:
    """Adapters beside the base, each version under a number of its own: vLLM would go on serving an old adapter under
    a number that it knows. The one before stays for requests that are on their way."""

    def __init__(self, llm: Any, model_path: str, family: PolicyAdapter, lora: LoraSpec) -> None:
        self._llm, self._lora = llm, lora
        self._shapes = adapter_shapes(model_path, lora)
        if odd := [name for name in _maps(self._shapes) if not re.fullmatch(family.lora_regex, name)]:
            raise ConfigError(
                f"rollout.engine=vllm can't adapt {odd[0]} of a {family.family} model; leave lora.target_modules and "
                "lora.include_head as they are, or set rollout.engine=torch"
            )
        self._loads = 0
        self._place = tempfile.TemporaryDirectory(prefix="adapters-")
        self._folders: list[Path] = []
        self.request: Any = None
        """vLLM's of the current adapter; None: the bare base."""

    @property
    def number(self) -> int:
        return 0 if self.request is None else int(self.request.lora_int_id)

    def bare(self) -> None:
        self.request = None

    def load(self, adapter: AdapterState, expected_digest: str, hashed: Callable[[AdapterState], str]) -> None:
        from vllm.lora.request import LoRARequest

        self.request = None
        _require_shapes(adapter, self._shapes)
        _require_digest(hashed(adapter), expected_digest)
        # The scale is in the B matrices: vLLM multiplies them by it anyway, and so their digest says what is in use.
        scale = self._lora.alpha / self._lora.r
        scaled = pack({name: _scaled(name, unpack(packed), scale) for name, packed in adapter.items()})
        self._loads += 1
        folder = Path(tempfile.mkdtemp(dir=self._place.name))
        modules = _maps(adapter)
        config = {"peft_type": "LORA", "r": self._lora.r, "lora_alpha": self._lora.r, "target_modules": modules}
        write_peft_folder(folder, scaled, config)
        request = LoRARequest(f"version-{self._loads}", self._loads, str(folder))
        self._llm.llm_engine.add_lora(request)
        self._folders.append(folder)
        if len(self._folders) > ADAPTERS:
            shutil.rmtree(self._folders.pop(0))
        for used in self._llm.collective_rpc("digest_in_use", args=(self._loads, modules)):
            _require_digest(used, digest(scaled))
        self.request = request


class Merged:
    """Adapters in the base's weights, which vLLM takes anew at each version. The policy stays here too: it says what
    the merged weights are, and what vLLM must answer with them."""

    def __init__(self, llm: Any, model_path: str, family: PolicyAdapter, lora: LoraSpec, dtype: str) -> None:
        self._llm = llm
        self._policy = attach_lora(load_model(model_path, dtype), family, lora).eval()
        self._encode = encoder(llm, lambda: None)
        self._probe = [family.eos_token_id, *[family.mask_token_id] * 6, family.eos_token_id]
        self._tolerance = 1e-3 if dtype == "float32" else 0.1
        self._is_bare = True

    def bare(self) -> None:
        if not self._is_bare:
            with torch.no_grad():
                for name, parameter in adapter_parameters(self._policy).items():
                    if ".lora_B." in name:
                        parameter.zero_()
            self._reload()
            self._is_bare = True

    def load(self, adapter: AdapterState, expected_digest: str, hashed: Callable[[AdapterState], str]) -> None:
        load_state(self._policy, adapter)
        self._is_bare = False
        require_loaded(adapter_parameters(self._policy), adapter)
        _require_digest(hashed(adapter), expected_digest)
        self._reload()

    def _reload(self) -> None:
        weights = merged_weights(self._policy)
        self._llm.collective_rpc("reload", args=(weights,))
        with torch.inference_mode():
            ours = self._policy(input_ids=torch.tensor([self._probe])).logits[0].float().log_softmax(-1)
        (theirs,) = self._encode([self._probe], [{}])
        error = float((theirs.float().cpu().log_softmax(-1) - ours).abs().max())
        if not error < self._tolerance:
            raise WeightMismatch(f"vLLM's log-probs with the reloaded weights are {error:.2g} off the policy's")


def merged_weights(policy: PeftModel) -> dict[str, torch.Tensor]:
    """The base's weights under the checkpoint's names, with the adapter added."""
    weights = {
        canonical_name(name).replace(".base_layer.", "."): tensor
        for name, tensor in policy.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in policy.get_base_model().named_modules():
        if isinstance(module, Linear):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight(ADAPTER_NAME)
    return weights


def _maps(parameters: Iterable[str]) -> list[str]:
    """The adapted maps, sorted."""
    return sorted({name.rpartition(".lora_")[0] for name in parameters})


def _scaled(name: str, tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return tensor * scale if ".lora_B." in name else tensor


def _require_shapes(adapter: AdapterState, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: packed.shape for name, packed in adapter.items()}
    if odd := sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name)):
        raise WeightMismatch(f"the adapter and this model's LoRA disagree about parameters: {', '.join(odd[:3])}")


def _require_digest(found: str, expected: str) -> None:
    if found != expected:
        raise WeightMismatch(
            f"the adapter was published with digest {expected[:12]}, and what was loaded has {found[:12]}"
        )
