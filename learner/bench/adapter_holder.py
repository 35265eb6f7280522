"""An actor that holds an adapter of a given size and no base, to time how fast a published one arrives."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rewards.errors import WeightMismatch
from rollout.adapters import AdapterState, adapter_parameters, load_state, require_loaded
from rollout.vouching import digest_by_node
from rollout.waits import bounded_get


def adapter_shapes(*, d_model: int, mlp: int, layers: int, r: int) -> dict[str, tuple[int, int]]:
    """Canonical names and shapes of a LLaDA's LoRA parameters."""
    maps = {name: (d_model, d_model) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
    maps |= {"ff_proj": (d_model, mlp), "up_proj": (d_model, mlp), "ff_out": (mlp, d_model)}
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        for name, (wide_in, wide_out) in maps.items():
            place = f"model.transformer.blocks.{layer}.{name}"
            shapes[f"{place}.lora_A.weight"] = (r, wide_in)
            shapes[f"{place}.lora_B.weight"] = (wide_out, r)
    return shapes


class AdapterHolder:
    """Loads adapters as actors do: fetch, copy, compare what was copied, have the digest of one process of the node."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._module = torch.nn.Module()
        self._kept: AdapterState = {}
        for name, shape in shapes.items():
            self._place(name, torch.zeros(shape, dtype=torch.bfloat16))

    def ready(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self._module.parameters())

    def load(self, refs: list[Any], expected: str, timeout_s: float) -> float:
        """Seconds from the request to the verified weights. Raises WeightMismatch when others were published."""
        begin = time.perf_counter()
        published = bounded_get(refs[0], who="the published adapter", timeout_s=timeout_s)
        self.take(published, expected, digest_by_node(refs[0]))
        return time.perf_counter() - begin

    def take(self, state: AdapterState, expected: str, digest_of: Callable[[AdapterState], str]) -> None:
        """Hold this state. Raises WeightMismatch when its digest isn't the expected one."""
        self._kept = state
        load_state(self._module, state)
        require_loaded(adapter_parameters(self._module), state)
        if (found := digest_of(state)) != expected:
            raise WeightMismatch(f"the adapter was published with digest {expected[:12]}, loaded was {found[:12]}")

    def _place(self, name: str, value: torch.Tensor) -> None:
        *path, last = name.split(".")
        module = self._module
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
