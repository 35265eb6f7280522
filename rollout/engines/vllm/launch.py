"""vLLM, started in this process for one model."""

from typing import Any

from rollout.engines.vllm import shim
from rollout.engines.vllm.families import vllm_config
from rollout.engines.vllm.settings import ADAPTERS, ARCHITECTURES, VllmSettings, slot_rank
from rollout.models.family import PolicyAdapter


def launch(
    model_path: str,
    family: PolicyAdapter,
    settings: VllmSettings,
    *,
    max_rows: int,
    dtype: str,
    lora_r: int | None,
) -> Any:
    """A ``vllm.LLM`` that pools every token of whole sequences.

    Args:
        lora_r: rank of the adapters that it will be given; None for none.
    """
    vllm = shim.load_vllm()
    length = settings.longest(family.max_length)
    options: dict[str, Any] = {}
    if lora_r is not None:
        options |= {
            "enable_lora": True,
            "max_lora_rank": slot_rank(lora_r),
            "max_loras": ADAPTERS,
            "max_cpu_loras": ADAPTERS,
            "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        }
    if settings.tensor_parallel_size > 1:
        options["distributed_executor_backend"] = "mp"
    return vllm.LLM(
        model_path,
        runner="pooling",
        pooler_config=vllm.config.PoolerConfig(task="token_classify"),
        hf_overrides=vllm_config if family.family in ARCHITECTURES else None,
        dtype=dtype,
        quantization=settings.quantization,
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.memory_share,
        max_model_len=length,
        max_num_batched_tokens=settings.batch_tokens(max_rows, length),
        max_num_seqs=max_rows,
        enforce_eager=True,
        skip_tokenizer_init=True,
        load_format="safetensors",
        worker_extension_cls=f"{shim.WorkerParts.__module__}.{shim.WorkerParts.__qualname__}",
        **options,
    )
