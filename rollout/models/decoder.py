"""The trunk that Dream and LLaDA-MoE share: a decoder under Qwen's module names whose attention knows no order.

Shapes: B rows, L positions, D model width, H heads, E head width, V vocabulary, N wanted rows.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from rewards.errors import ConfigError
from rollout.models.head import Head
from rollout.models.layers import RMSNorm, Visibility, at_rows, attention, rotary_tables, through, visibility


class DecoderSizes(Protocol):
    """What the trunk reads of a family's config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float


class DecoderLM(PreTrainedModel):
    """Token ids in, logits out. Has no cache and no dropout, so ``train()`` only enables checkpointing.

    A family sets ``qkv_bias`` and ``qk_norm`` and builds its MLPs in ``build_mlp``.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]
    qkv_bias = False
    qk_norm = False

    def __init__(self, config: Any):
        super().__init__(config)
        mlps = [self.build_mlp(config, layer) for layer in range(config.num_hidden_layers)]
        self.model = Decoder(config, mlps, qkv_bias=self.qkv_bias, qk_norm=self.qk_norm)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def build_mlp(config: Any, layer: int) -> nn.Module:
        """The map [..., D] -> [..., D] that stands for this layer's MLP."""
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logit_rows: Tensor | None = None
    ) -> MaskedLMOutput:
        """Logits of every position, or of the rows named.

        input_ids: [B, L] int64. attention_mask: [B, L], 0 for a pad; tokens of one positive number see each other and
        nobody else; None when nothing is padded or packed. Positions count from 0, pads included: rotary positions are
        relative, so left padding and packing change logits by rounding only. logit_rows: [N] int64, flat indices
        ``b * L + l``.

        Returns an output whose ``logits``, float32, are [B, L, V], or [N, V] with logit_rows. Logits at pads are finite
        and mean nothing.
        """
        x = self.model(input_ids, attention_mask, logit_rows)
        return MaskedLMOutput(logits=self.lm_head(self.model.norm(x)))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Decoder(nn.Module):
    """Embedding and layers. Holds the final norm too, which the head applies to the wanted rows only."""

    def __init__(self, config: DecoderSizes, mlps: list[nn.Module], *, qkv_bias: bool, qk_norm: bool):
        super().__init__()
        self.rope_theta, self.head_width = config.rope_theta, config.hidden_size // config.num_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, mlp, qkv_bias=qkv_bias, qk_norm=qk_norm) for mlp in mlps)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, logit_rows: Tensor | None) -> Tensor:
        """[B, L, D], or [N, D] at the rows that are wanted."""
        dtype = self.embed_tokens.weight.dtype
        # The published code of both families rounds the tables to the model's dtype and turns in it.
        tables = rotary_tables(input_ids.shape[1], self.head_width, self.rope_theta, input_ids.device, dtype)
        seen = visibility(attention_mask, dtype)
        # No name here for the embeddings: nothing shall hold them when the blocks no longer need them.
        return through(self.layers, self.embed_tokens(input_ids), tables, seen, logit_rows)


class DecoderLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x)), at all positions or, [N, D], at the asked rows."""

    def __init__(self, config: DecoderSizes, mlp: nn.Module, *, qkv_bias: bool, qk_norm: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

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
        x = at_rows(x_BLD, asked_N) + self.self_attn(
            self.input_layernorm(x_BLD), cos_LE, sin_LE, seen, asked_N, last=last
        )
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention; ``qk_norm``: each head's query and key are normalised before they are turned."""

    def __init__(self, config: DecoderSizes, *, qkv_bias: bool, qk_norm: bool):
        super().__init__()
        width, self.head_width = config.hidden_size, config.hidden_size // config.num_attention_heads
        kv_width = self.head_width * config.num_key_value_heads
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = RMSNorm(self.head_width, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_width, config.rms_norm_eps)

    def forward(
        self, h_BLD: Tensor, cos_LE: Tensor, sin_LE: Tensor, seen: Visibility, asked_N: Tensor | None, *, last: bool
    ) -> Tensor:
        maps = (self.q_proj, self.k_proj, self.v_proj)
        norms = (self.q_norm, self.k_norm) if self.qk_norm else ()
        return self.o_proj(attention(h_BLD, maps, cos_LE, sin_LE, seen, asked_N, apart=last, norms=norms))


def check_decoder_config(config: Any, switches: dict[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse what a family's code doesn't implement.

    Args:
        switches: the settings of config.json that are no field of the config; what is missing is set to its first
            allowed value, so that a checkpoint we write has every key that the published one has.
        fixed: the values that each switch may have.

    Raises:
        ConfigError: naming the first switch with another value, or sizes that don't fit.
    """
    for name, allowed in fixed.items():
        value = switches.setdefault(name, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise ConfigError(f"{name}={value!r} is not supported for {config.model_type}; it must be {wanted}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads or heads % kv_heads or (config.hidden_size // heads) % 2:
        raise ConfigError(
            f"hidden_size={config.hidden_size}, num_attention_heads={heads}, num_key_value_heads={kv_heads} don't fit: "
            "heads must divide hidden_size into an even head width, and num_key_value_heads must divide the heads"
        )


class DecoderConfig(PreTrainedConfig):
    """Keeps ``rope_scaling`` of the published config.json, which transformers would rename. It is always null."""

    def to_dict(self) -> dict[str, Any]:
        written = super().to_dict()
        written.pop("rope_parameters", None)
        return written | {"rope_scaling": None}
