"""Everything of vLLM that its documentation doesn't promise, in one place: what a new version of vLLM may break.

Written against vLLM 0.32 (``pyproject.toml`` pins it).
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rewards.errors import WeightMismatch
from rollout.adapters import digest_of

# Read by vLLM when it is imported. The engine's core stays in this process, where one SIGKILL ends it all, and where no
# message has to be packed; a CPU's threads are those that the process was given.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


def load_vllm() -> Any:
    """The package, imported in the environment that it needs, with our models in its registry.

    From then on the process is vLLM's: it fixes torch's threads, seeds the global generators, and on a CPU stubs
    ``torch.accelerator``. Nothing else may compute there.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    from rollout.engines.vllm.plugin import register

    register()
    return vllm


class WorkerParts:
    """Mixed into vLLM's worker (``worker_extension_cls``); called by name, in every worker."""

    model_runner: Any

    def digest_in_use(self, adapter: int, modules: Sequence[str]) -> str:
        """``rollout.adapters.digest`` of the maps that this adapter's requests are computed with.

        It is taken of vLLM's whole copy, and every slot is compared with what it must have of it: of the ranks of a
        tensor parallel model each computes with a part.

        Args:
            modules: canonical names of the adapted maps.

        Raises:
            WeightMismatch: a slot holds something else.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(adapter)
        copies = manager.get_adapter(adapter).loras
        tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, module in manager.modules.items():
            if (copy := copies.get(name)) is None:
                continue
            a, b = copy.lora_a, copy.lora_b
            parts = manager.packed_modules.get(name, [name])
            tensors |= zip(parts, zip(_listed(a), _listed(b), strict=True), strict=True)
            if module.tp_size > 1:
                a, b = module.slice_lora_a(a), module.slice_lora_b(b)
            for held, wanted in ((module.lora_a_stacked, a), (module.lora_b_stacked, b)):
                for of_slots, part in zip(held, _listed(wanted), strict=True):
                    if not torch.equal(of_slots[slot, 0, : part.shape[0], : part.shape[1]].cpu(), part.cpu()):
                        raise WeightMismatch(f"vLLM's slot for {name} doesn't hold the adapter that was loaded")
        rename = manager.model.hf_to_vllm_mapper.get_rename_mapper()
        found: dict[str, torch.Tensor] = {}
        for name in modules:
            a, b = tensors[rename.map_name(f"{name}.").removesuffix(".")]
            found |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        return digest_of(found)

    def reload(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take these weights, under the names of the checkpoint, in place of the model's."""
        self.model_runner.reload_weights(weights_iterator=iter(weights.items()))


def adapters_of_rows(model: Any, starts: np.ndarray) -> list[int]:
    """vLLM's number of the adapter that each row of the pass was computed with, 0 for none, from the rows' first
    tokens."""
    manager = getattr(model, "lora_manager", None)
    if manager is None:
        return [0] * len(starts)
    of_tokens = manager._last_mapping.index_mapping
    return [int(of_tokens[start]) for start in starts]


def _listed(tensors: Any) -> list[torch.Tensor]:
    """Of a map, or of several that vLLM computes as one."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


@contextmanager
def without_lora(vllm_config: Any) -> Iterator[Any]:
    """The config, for building a part of the model that no adapter touches: vLLM would choose kernels for experts that
    adapt them, which a CPU hasn't."""
    from vllm.config import set_current_vllm_config

    bare = copy.copy(vllm_config)
    bare.lora_config = None
    with set_current_vllm_config(bare):
        yield bare
