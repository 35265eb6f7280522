"""A model's sizes, from its config.json: enough to count parameters, memory and operations without loading a weight.

Parameter counts are exact for every family (tests/learner/test_planning.py builds the models to compare). LLaDA, Dream
and LLaDA-MoE are counted by formula; for a masked LM of transformers its class is asked, on torch's meta device, where
tensors have shapes and no memory.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from learner.settings.run import RunConfig
from rewards.errors import ConfigError


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a block; for an expert's, all experts' at once."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    """Of it in one block: the number of experts."""
    used: int = 1
    """Copies that a token passes through."""
    adapted: bool = True
    """LoRA trains an adapter on it."""

    @property
    def parameters(self) -> int:
        return self.copies * (self.inputs * self.outputs + self.outputs * self.bias)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model."""

    family: str
    kind: Literal["gated", "experts", "encoder"]
    """Of its blocks: RMSNorm and SwiGLU; the same with experts; a BERT-like encoder's."""
    layers: int
    """That a token passes."""
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    """Hidden width of the MLP, or of one expert."""
    vocabulary: int
    """Rows of the embedding, and of the head."""
    tied: bool
    maps: tuple[LinearMap, ...]
    """Of one block, in the order in which a token passes them."""
    other_parameters: int
    """Norms, biases outside the blocks' maps, position embeddings, and what a head has beside its matrix."""
    experts: int = 0
    active_experts: int = 0
    rotary_fp32: bool = True
    """Queries and keys are turned in fp32, whatever the model's dtype."""
    gated: bool = True
    """The MLP has a gate: two maps up, one down."""
    fused_qkv: bool = False
    """One map makes queries, keys and values, whose memory the values then keep alive."""
    qk_norm: bool = False
    """Each head's queries and keys are normalised before they are turned."""
    window_mask: bool = False
    """Attention gets an [L, L] mask (sliding windows)."""
    unfused_gelu: bool = False
    """The MLP's activation is made by several kernels (``gelu_new`` of transformers), and each keeps what it made."""
    own_weights: int | None = None
    """Blocks that have weights of their own, where the others are these once more; null: all."""
    dtype: str | None = None
    """Of the checkpoint's weights, where config.json says so."""

    @property
    def distinct_layers(self) -> int:
        """``own_weights``, its default filled in."""
        return self.layers if self.own_weights is None else self.own_weights

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return embeddings + self.block_parameters * self.distinct_layers + self.other_parameters

    @property
    def block_parameters(self) -> int:
        """Of one block's linear maps."""
        return sum(one.parameters for one in self.maps)

    def adapter_parameters(self, r: int, *, include_head: bool = False) -> int:
        """Trained parameters: both factors of every adapted map."""
        of_block = sum(one.copies * (one.inputs + one.outputs) for one in self.maps if one.adapted)
        return r * (of_block * self.distinct_layers + (self.width + self.vocabulary) * include_head)


def model_shape(config: RunConfig) -> ModelShape:
    """The run's model: the folder or hub name of ``model.path``, or the small base that null stands for.

    Raises:
        ConfigError: when there is no config.json to read, or it is of an unknown kind.
    """
    targets = config.lora.target_modules
    shape = _small_base(config) if config.model.path is None else shape_from(read_config(config.model.path))
    if not targets:
        return shape
    # A name that means one block's map is counted in all of them: more, not less.
    chosen = tuple(
        replace(one, adapted=any(target.endswith(one.name) or one.name.endswith(target) for target in targets))
        for one in shape.maps
    )
    return replace(shape, maps=chosen)


def read_config(path: str) -> dict[str, Any]:
    """config.json of a folder, or of a hub name; the best known names' sizes are built in, and the hub isn't asked."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        try:
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"no model at {path}: its config.json can't be read ({error})") from error
    if path in PUBLISHED:
        return PUBLISHED[path]
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(path, "config.json", etag_timeout=10)
    except Exception as error:  # the hub client raises many kinds, all of them "not there"
        raise ConfigError(
            f"the sizes of {path} aren't known: its config.json can't be fetched ({type(error).__name__}); "
            "give model.path as a folder with that file in it"
        ) from error
    return json.loads(Path(file).read_text(encoding="utf-8"))


def shape_from(raw: dict[str, Any]) -> ModelShape:
    """Sizes from what config.json says. Raises ConfigError when a size is missing."""
    return replace(_sizes(raw), dtype=raw.get("dtype") or raw.get("torch_dtype"))


def _sizes(raw: dict[str, Any]) -> ModelShape:
    family = raw.get("model_type", "")
    try:
        if family == "llada":  # LLaDA-MoE's config.json says so too
            return llada_moe_shape(raw) if raw.get("num_experts") else llada_shape(raw)
        if family == "Dream":
            return dream_shape(raw)
    except KeyError as error:
        raise ConfigError(f"config.json of model type {family!r} lacks {error.args[0]!r}") from error
    return masked_lm_shape(raw)


def llada_shape(raw: dict[str, Any]) -> ModelShape:
    d, hidden, heads = raw["d_model"], raw["mlp_hidden_size"], raw["n_heads"]
    kv_heads = raw.get("n_kv_heads") or heads
    return _gated(
        "llada",
        layers=raw["n_layers"],
        width=d,
        heads=heads,
        kv_heads=kv_heads,
        head_width=d // heads,
        mlp=hidden,
        vocabulary=raw.get("embedding_size") or raw["vocab_size"],
        tied=bool(raw.get("weight_tying", False)),
        names=("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
    )


def dream_shape(raw: dict[str, Any]) -> ModelShape:
    d, heads = raw["hidden_size"], raw["num_attention_heads"]
    return _gated(
        "Dream",
        layers=raw["num_hidden_layers"],
        width=d,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_width=d // heads,
        mlp=raw["intermediate_size"],
        vocabulary=raw["vocab_size"],
        tied=False,
        names=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        qkv_bias=True,
        rotary_fp32=False,
    )


def llada_moe_shape(raw: dict[str, Any]) -> ModelShape:
    d, heads = raw["hidden_size"], raw["num_attention_heads"]
    head_width = d // heads
    dense = _gated(
        "llada_moe",
        layers=raw["num_hidden_layers"],
        width=d,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_width=head_width,
        mlp=raw["expert_intermediate_size"],
        vocabulary=raw["vocab_size"],
        tied=False,
        names=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        rotary_fp32=False,
    )
    experts, active = raw["num_experts"], raw["num_experts_per_tok"]
    attention, mlp = dense.maps[:4], dense.maps[4:]
    router = LinearMap("router", d, experts, adapted=False)
    of_experts = tuple(replace(one, copies=experts, used=active, adapted=False) for one in mlp)
    norms_of_heads = 2 * head_width * dense.layers
    return replace(
        dense,
        kind="experts",
        maps=(*attention, router, *of_experts),
        experts=experts,
        active_experts=active,
        other_parameters=dense.other_parameters + norms_of_heads,
        qk_norm=True,
    )


def masked_lm_shape(raw: dict[str, Any]) -> ModelShape:
    """Any AutoModelForMaskedLM: its class, built on the meta device, says what it holds."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    family = raw.get("model_type", "")
    try:
        config = AutoConfig.for_model(family, **{key: value for key, value in raw.items() if key != "model_type"})
        with torch.device("meta"):
            model = AutoModelForMaskedLM.from_config(config)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"model type {family!r} is neither llada nor Dream nor a masked LM that transformers knows"
        ) from error
    layers, d, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    own_weights = getattr(config, "num_hidden_groups", layers)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == own_weights]
    if not lists:
        raise ConfigError(f"model type {family!r} keeps its {layers} blocks in no list; its sizes can't be read")
    linear = [(n, m) for n, m in lists[0][-1].named_modules() if isinstance(m, torch.nn.Linear)]
    maps = tuple(LinearMap(name, m.in_features, m.out_features, m.bias is not None) for name, m in linear)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary = embedding.weight.shape[0]
    tied = head is None or head.weight is embedding.weight
    hidden, fused = config.intermediate_size, maps[0].outputs == 3 * d
    ups = [one.outputs for one in maps[fused:] if one.inputs == d]
    shape = ModelShape(
        family=family,
        kind="encoder",
        layers=layers,
        own_weights=own_weights,
        width=d,
        heads=heads,
        kv_heads=heads,
        head_width=d // heads,
        mlp=hidden,
        vocabulary=vocabulary,
        tied=tied,
        maps=maps,
        other_parameters=0,
        gated=2 * hidden in ups or sum(one.outputs == hidden and one.inputs == d for one in maps[4:]) > 1,
        fused_qkv=fused,
        unfused_gelu=getattr(config, "hidden_act", None) == "gelu_new",
        window_mask="sliding_attention" in (getattr(config, "layer_types", None) or ()),
    )
    return replace(shape, other_parameters=sum(p.numel() for p in model.parameters()) - shape.parameters)


def _gated(
    family: str,
    *,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    mlp: int,
    vocabulary: int,
    tied: bool,
    names: tuple[str, ...],
    qkv_bias: bool = False,
    rotary_fp32: bool = True,
) -> ModelShape:
    queries, keys = heads * head_width, kv_heads * head_width
    sizes = [(width, queries), (width, keys), (width, keys), (queries, width)]
    sizes += [(width, mlp), (width, mlp), (mlp, width)]
    maps = [
        LinearMap(name, inputs, outputs, bias=qkv_bias and i < 3)
        for i, (name, (inputs, outputs)) in enumerate(zip(names, sizes, strict=True))
    ]
    return ModelShape(
        family=family,
        kind="gated",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp=mlp,
        vocabulary=vocabulary,
        tied=tied,
        maps=tuple(maps),
        other_parameters=(2 * layers + 1) * width,
        rotary_fp32=rotary_fp32,
    )


def _small_base(config: RunConfig) -> ModelShape:
    from rollout.models.tokenizer import build_tokenizer

    base = config.model.base
    return llada_shape(
        {
            "d_model": base.d_model,
            "n_layers": base.n_layers,
            "n_heads": base.n_heads,
            "mlp_hidden_size": base.mlp_hidden,
            "vocab_size": len(build_tokenizer()),
        }
    )


_LLADA_8B: dict[str, Any] = {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "weight_tying": False,
    "torch_dtype": "bfloat16",
}
_DREAM_7B: dict[str, Any] = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "torch_dtype": "bfloat16",
}
_LLADA_MOE_7B: dict[str, Any] = {
    "model_type": "llada",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "expert_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 157184,
    "torch_dtype": "bfloat16",
}
_MODERNBERT_BASE: dict[str, Any] = {"model_type": "modernbert"}
_MODERNBERT_LARGE: dict[str, Any] = {
    "model_type": "modernbert",
    "hidden_size": 1024,
    "intermediate_size": 2624,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
}
_ANTIBERTY: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 25,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
_RXNFP: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 591,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "models/antiberty": _ANTIBERTY,
    "models/rxnfp": _RXNFP,
    "GSAI-ML/LLaDA-8B-Base": _LLADA_8B,
    "GSAI-ML/LLaDA-8B-Instruct": _LLADA_8B,
    "GSAI-ML/LLaDA-1.5": _LLADA_8B,
    "Dream-org/Dream-v0-Base-7B": _DREAM_7B,
    "Dream-org/Dream-v0-Instruct-7B": _DREAM_7B,
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": _LLADA_MOE_7B,
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": _LLADA_MOE_7B,
    "answerdotai/ModernBERT-base": _MODERNBERT_BASE,
    "answerdotai/ModernBERT-large": _MODERNBERT_LARGE,
}
"""Sizes of published models under their hub names, or where ``make models`` puts them, so that a plan needs no
network."""
