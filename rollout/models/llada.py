"""LLaDA (arXiv 2502.09992): a bidirectional transformer that predicts every masked token at once.

Pre-norm blocks with RMSNorm, rotary positions and a SwiGLU MLP, no biases, no causal mask. Module names are those of
the published LLaDA-8B checkpoint, so its weights load without a translation table. Two things differ from the
modelling code in circulation: the padding mask is honoured (a pad is never attended to), and the caller may ask for the
logits of a few rows only, in which case neither the head runs on the others, nor more of the last block than keys and
values (``layers.through``).

Shapes: B rows, L positions, D model width, F hidden width of the MLP, H heads, E head width, V rows of the embedding, N
wanted rows.
"""

from typing import Any

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from rewards.errors import ConfigError
from rollout.models.adapted import products
from rollout.models.head import Head, exact_logits
from rollout.models.layers import RMSNorm, Visibility, at_rows, attention, rotary_tables, through, visibility

# Switches of the published config.json that have one value in every LLaDA checkpoint. They are written out again, so
# that other people's modelling code reads our checkpoints, and a checkpoint that sets one differently is refused.
FIXED_SWITCHES = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}


@strict
class LLaDAConfig(PreTrainedConfig):
    """Sizes and token ids under the names of the published config.json; the defaults are LLaDA-8B's.

    ``n_kv_heads`` None means one per head, ``embedding_size`` None means ``vocab_size``. Raises ConfigError when heads
    don't divide the width, or when a switch of ``FIXED_SWITCHES`` has a value that this file doesn't implement.
    """

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int = 12288
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    init_std: float = 0.02
    mask_token_id: int = 126336
    eos_token_id: int = 126081
    pad_token_id: int = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in FIXED_SWITCHES.items():
            if kwargs.setdefault(name, value) not in (value, None):
                raise ConfigError(
                    f"{name}={kwargs[name]!r} is not supported for model type llada; it must be {value!r}"
                )
        if self.d_model % self.n_heads or self.n_heads % self.kv_heads or (self.d_model // self.n_heads) % 2:
            raise ConfigError(
                f"d_model={self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads} don't fit: heads must "
                "divide d_model into an even head width, and n_kv_heads must divide n_heads"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As any config's, but a mixture of experts, whose model type is "llada" as well, gets its own config."""
        if "num_experts" not in config_dict:
            return super().from_dict(config_dict, **kwargs)
        from rollout.models.llada_moe import LLaDAMoEConfig

        return LLaDAMoEConfig.from_dict(config_dict, **kwargs)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def embedding_rows(self) -> int:
        return self.embedding_size or self.vocab_size


class LLaDAModelLM(PreTrainedModel):
    """The policy: token ids in, logits out. Has no cache and no dropout, so ``train()`` only enables checkpointing."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LLaDABlock"]

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = _Wrapper(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logit_rows: Tensor | None = None
    ) -> MaskedLMOutput:
        """Logits of every position, or of the rows named.

        input_ids: [B, L] int64. attention_mask: [B, L], 0 for a pad; tokens of one positive number see each other and
        nobody else; None when nothing is padded or packed, which lets the attention kernel run without a mask.
        Positions count from 0, pads included: rotary positions are relative, so left padding and packing change logits
        by rounding only. logit_rows: [N] int64, flat indices ``b * L + l``.

        Returns an output whose ``logits``, float32, are [B, L, V], or [N, V] with logit_rows. Logits at pads are finite
        and mean nothing.
        """
        return MaskedLMOutput(logits=self.model.transformer(input_ids, attention_mask, logit_rows))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.weight_tying else self.model.transformer.ff_out


class _Wrapper(nn.Module):
    """Only the "model." of the published names."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.transformer = LLaDATransformer(config)


class LLaDATransformer(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.embedding_rows, config.d_model)
        self.blocks = nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = Head(config.d_model, config.embedding_rows, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, logit_rows: Tensor | None) -> Tensor:
        length, head_width = input_ids.shape[1], self.config.d_model // self.config.n_heads
        tables = rotary_tables(length, head_width, self.config.rope_theta, input_ids.device)
        seen = visibility(attention_mask, self.wte.weight.dtype)
        # No name here for the embeddings: nothing shall hold them when the blocks no longer need them.
        x = self.ln_f(through(self.blocks, self.wte(input_ids), tables, seen, logit_rows))
        return exact_logits(x, self.wte.weight) if self.config.weight_tying else self.ff_out(x)


class LLaDABlock(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x)), at all positions or, [N, D], at the asked rows. ``ff_out`` is the
    MLP's output map, not the LM head."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        width, kv_width = config.d_model, config.d_model // config.n_heads * config.kv_heads
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

    def forward(
        self,
        x_BLD: Tensor,
        cos_LE: Tensor,
        sin_LE: Tensor,
        seen: Visibility,
        asked_N: Tensor | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        maps = (self.q_proj, self.k_proj, self.v_proj)
        x = at_rows(x_BLD, asked_N) + self.attn_out(
            attention(self.attn_norm(x_BLD), maps, cos_LE, sin_LE, seen, asked_N, apart=last)
        )
        gate, up = products(self.ff_norm(x), self.ff_proj, self.up_proj)
        return x + self.ff_out(F.silu(gate) * up)
