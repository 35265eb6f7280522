"""Model families' configs as vLLM's layers read them."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from rollout.engines.vllm.settings import ARCHITECTURES
from rollout.models.dream import DreamConfig
from rollout.models.llada import LLaDAConfig
from rollout.models.llada_moe import LLaDAMoEConfig


def vllm_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config under the names that vLLM's Llama reads, every token seeing every token; one of ``MERGED`` as it is."""
    if isinstance(config, LLaDAMoEConfig):
        experts = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.expert_intermediate_size,
            "moe_layer_freq": config.moe_layer_freq,
            "norm_topk_prob": False,
        }
        return _llama("llada_moe", config, intermediate_size=config.dense_intermediate_size, **experts)
    if isinstance(config, LLaDAConfig):
        sizes = {"vocab_size": config.embedding_rows, "num_key_value_heads": config.kv_heads}
        return _llama("llada", config, tie_word_embeddings=config.weight_tying, **sizes)
    if isinstance(config, DreamConfig):
        return _llama("dream", config, qkv_bias=True)
    return config


def _llama(family: str, config: Any, **own: Any) -> LlamaConfig:
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "mask_token_id"),
    )
    names: dict[str, Any] = {name: getattr(config, name, None) for name in same}
    names |= {
        "architectures": [ARCHITECTURES[family]],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},
        "tie_word_embeddings": False,
        "is_causal": False,
        "head_dtype": "float32",  # as ``rollout.models.head`` computes, whatever the model's dtype
    }
    return LlamaConfig(**names | own)
