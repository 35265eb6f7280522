"""Small random checkpoints laid out by hand as the real ones are published: parameter names, shards and their index,
config.json, tokenizer files. Nothing here asks our model classes what they would write.

Sources: GSAI-ML/LLaDA-8B-Instruct, Dream-org/Dream-v0-Instruct-7B, inclusionAI/LLaDA-MoE-7B-A1B-Instruct.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer

from rollout.models.tokenizer import build_tokenizer

FAMILIES = ("llada", "dream", "llada_moe")
HEAD = {"llada": "model.transformer.ff_out", "dream": "lm_head", "llada_moe": "lm_head"}
SHARDS = 3

_LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
_DREAM_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DREAM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")


def write_published(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a checkpoint with its tokenizer and return its weights. ``changes`` go to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"llada": _llada, "dream": _dream, "llada_moe": _llada_moe}[family](folder)
    config |= changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = {"llada": _llada_shapes, "dream": _dream_shapes, "llada_moe": _llada_moe_shapes}[family](config)
    state = _random_weights(shapes, seed)
    write_shards(folder, state)
    return state


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """[rows, length] token ids that every small vocabulary here has."""
    return torch.randint(20, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def write_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The weights over several files, and the index that says what is where."""
    place = {name: f"model-{i % SHARDS + 1:05}-of-{SHARDS:05}.safetensors" for i, name in enumerate(sorted(state))}
    for shard in sorted(set(place.values())):
        held = {name: state[name] for name in state if place[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights that make every part matter: norms off 1, biases off 0, queries and keys large enough to choose."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.2 * x if "norm" in name or "ln_f" in name else 0.25 * x for name, x in drawn.items()}


def _llada(folder: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = _LLADA_TEMPLATE
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) + 3
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 32,
        "embedding_dropout": 0.0,
        "embedding_size": rows,
        "eos_token_id": tokenizer.eos_token_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": tokenizer.mask_token_id,
        "max_sequence_length": 128,
        "mlp_hidden_size": 48,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": rows,
        "weight_tying": False,
    }


def _llada_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, hidden, kv = c["d_model"], c["mlp_hidden_size"], c["d_model"] // c["n_heads"] * c["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.weight": (c["embedding_size"], width),
        "model.transformer.ln_f.weight": (width,),
        "model.transformer.ff_out.weight": (c["embedding_size"], width),
    }
    block = {"attn_norm": (width,), "ff_norm": (width,), "q_proj": (width, width), "k_proj": (kv, width)}
    block |= {"v_proj": (kv, width), "attn_out": (width, width), "ff_proj": (hidden, width)}
    block |= {"up_proj": (hidden, width), "ff_out": (width, hidden)}
    for i in range(c["n_layers"]):
        shapes |= {f"model.transformer.blocks.{i}.{part}.weight": shape for part, shape in block.items()}
    return shapes


def _dream(folder: Path) -> dict[str, Any]:
    first = write_bpe_tokenizer(folder)
    return {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": first,
        "eos_token_id": first,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "mask_token_id": first + _DREAM_SPECIAL.index("<|mask|>"),
        "max_position_embeddings": 128,
        "max_window_layers": 28,
        "model_type": "Dream",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": first,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": first + 10,  # more rows than tokens, as published
    }


def _dream_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return _qwen_shapes(c, qkv_bias=True, mlp=_gated_mlp("mlp", c["hidden_size"], c["intermediate_size"]))


def _llada_moe(folder: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    return {
        "architectures": ["LLaDAMoEModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "clip_qkv": None,
        "dense_intermediate_size": 64,
        "eos_token_id": tokenizer.eos_token_id,
        "expert_intermediate_size": 24,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "mask_token_id": tokenizer.mask_token_id,  # the published file leaves it to the model card
        "max_position_embeddings": 128,
        "model_type": "llada",
        "moe_layer_freq": [1, 1],
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "pad_token_id": tokenizer.pad_token_id,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2",
        "use_cache": False,
        "vocab_size": len(tokenizer) + 5,
    }


def _llada_moe_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    mlp: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (c["num_experts"], width)}
    for expert in range(c["num_experts"]):
        mlp |= _gated_mlp(f"mlp.experts.{expert}", width, c["expert_intermediate_size"])
    mlp |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    return _qwen_shapes(c, qkv_bias=False, mlp=mlp)


def _gated_mlp(name: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    return {f"{name}.{part}.weight": shape for part, shape in sizes.items()}


def _qwen_shapes(c: dict[str, Any], *, qkv_bias: bool, mlp: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    width, kv = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], width),
        "model.norm.weight": (width,),
        "lm_head.weight": (c["vocab_size"], width),
    }
    layer = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,), **mlp}
    for part, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv), ("o_proj", width)):
        layer[f"self_attn.{part}.weight"] = (rows, width)
        if qkv_bias and part != "o_proj":
            layer[f"self_attn.{part}.bias"] = (rows,)
    for i in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in layer.items()}
    return shapes


def write_bpe_tokenizer(folder: Path) -> int:
    """Dream's tokenizer files with few merges, and the id of its first special token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Hello world, how many apples? 12 + 30 = 42\n\n"] * 5, vocab_size=300)
    bpe.save_model(str(folder))
    first = bpe.get_vocab_size()
    ids = {token: first + i for i, token in enumerate(_DREAM_SPECIAL)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": _DREAM_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    named = {f"{name}_token": settings[f"{name}_token"] for name in ("bos", "eos", "mask", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    return first
