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

from rollout.adapters import digest, pack

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

    def digest_in_use(self, adapter: int, modules: Sequence[str], r: int) -> str:
        """``rollout.adapters.digest`` of the maps in the slot that this adapter's requests are computed with.

        Args:
            modules: canonical names of the adapted maps.
            r: rank; slots are wider.

        Raises:
            LookupError: one of the maps has no slot, or the adapter isn't there.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(adapter)
        rename = manager.model.hf_to_vllm_mapper.get_rename_mapper()
        places = {
            part: (module, i)
            for name, module in manager.modules.items()
            for i, part in enumerate(manager.packed_modules.get(name, [name]))
        }
        tensors = {}
        for name in modules:
            module, i = places[rename.map_name(f"{name}.").removesuffix(".")]
            tensors[f"{name}.lora_A.weight"] = module.lora_a_stacked[i][slot, 0, :r]
            tensors[f"{name}.lora_B.weight"] = module.lora_b_stacked[i][slot, 0, :, :r]
        return digest(pack(tensors))

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


@contextmanager
def without_lora(vllm_config: Any) -> Iterator[Any]:
    """The config, for building a part of the model that no adapter touches: vLLM would choose kernels for experts that
    adapt them, which a CPU hasn't."""
    from vllm.config import set_current_vllm_config

    bare = copy.copy(vllm_config)
    bare.lora_config = None
    with set_current_vllm_config(bare):
        yield bare
