"""LLaDA-MoE-7B-A1B (arXiv 2509.24389): attention with normalised queries and keys, and 64 experts for the MLP.

Names and config.json are those of inclusionAI/LLaDA-MoE-7B-A1B-{Base,Instruct}, whose model type is "llada", like the
dense LLaDA's; ``num_experts`` tells them apart. A token's experts are the eight of the largest router probability, and
their outputs are added with these probabilities as they are: the published modelling code never rescales them to sum 1
and reads neither ``norm_topk_prob`` nor ``routed_scaling_factor``. There are no shared experts.

Shapes: D model width, T tokens, X experts, K experts a token, N = T * K assignments.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from rewards.errors import ConfigError
from rollout.models.decoder import DecoderConfig, DecoderLM, check_decoder_config
from rollout.models.layers import GatedMLP

FIXED_SWITCHES = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "clip_qkv": (None,),
    "qk_layernorm": (True,),
    "partial_rotary_factor": (1.0, None),
    "rope_scaling": (None,),
    "moe_router_score_function": ("softmax", None),
    "moe_router_enable_expert_bias": (False, None),
    "shared_expert_intermediate_size": (None,),
    "tie_word_embeddings": (False, None),
}


@strict
class LLaDAMoEConfig(DecoderConfig):
    """Sizes and token ids under the names of the published config.json; the defaults are LLaDA-MoE-7B-A1B's.

    ``moe_layer_freq``: 1 for each layer with experts, 0 for each with one dense MLP; None means experts everywhere. The
    published config.json names no mask token; the default is the one that its model card states, ``<|mask|>``. Raises
    ConfigError when sizes don't fit, or a switch of ``FIXED_SWITCHES`` has another value.
    """

    model_type = "llada"

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int = 8192
    expert_intermediate_size: int = 1024
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    max_position_embeddings: int = 8192
    rope_theta: float | int = 50000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    mask_token_id: int = 156895
    eos_token_id: int = 156892
    pad_token_id: int = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        check_decoder_config(self, kwargs, FIXED_SWITCHES)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}"
            )
        if self.moe_layer_freq and len(self.moe_layer_freq) != self.num_hidden_layers:
            raise ConfigError(
                f"moe_layer_freq has {len(self.moe_layer_freq)} entries, not num_hidden_layers={self.num_hidden_layers}"
            )
        self.moe_layer_freq = self.moe_layer_freq or [1] * self.num_hidden_layers
        super().__post_init__(**kwargs)


class LLaDAMoEModelLM(DecoderLM):
    """LLaDA-MoE's policy; see ``DecoderLM``."""

    config_class = LLaDAMoEConfig
    qk_norm = True

    @staticmethod
    def build_mlp(config: LLaDAMoEConfig, layer: int) -> nn.Module:
        assert config.moe_layer_freq is not None
        if config.moe_layer_freq[layer]:
            return MixtureOfExperts(config)
        return GatedMLP(config.hidden_size, config.dense_intermediate_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            torch.nn.init.normal_(module.weight, std=self.config.initializer_range)


class MixtureOfExperts(nn.Module):
    """Each token's own experts, weighted by the router and added up.

    Tokens are sorted by expert, so each expert runs once, over all its tokens. One that nobody chose runs over none:
    every rank calls every module, as ZeRO-3's gathering needs. The experts are plain linear maps, which LoRA and 4-bit
    loading know.
    """

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, config.expert_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, h: Tensor) -> Tensor:
        h_TD = h.flatten(0, -2)
        weight_TK, expert_TK = self.gate(h_TD)
        chosen = expert_TK.shape[1]
        expert_N, order_N = expert_TK.flatten().sort(stable=True)
        tokens_X = torch.bincount(expert_N, minlength=len(self.experts)).tolist()
        inputs = h_TD.index_select(0, order_N // chosen).split(tokens_X)
        out_ND = torch.cat([expert(x) for expert, x in zip(self.experts, inputs, strict=True)])
        # Back in the order of (token, choice); a permutation and a sum repeat bitwise on a GPU, an index_add doesn't.
        back_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        out_TKD = out_ND.index_select(0, back_N).unflatten(0, (-1, chosen))
        return (out_TKD * weight_TK[:, :, None]).sum(1).view_as(h)


class Router(nn.Module):
    """Which experts a token goes to, and with what weight. Not an ``nn.Linear``: no adapter and no 4-bit loading may
    touch it, since a changed choice of experts is another function altogether."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """([T, K] probabilities in h's dtype, [T, K] int64 experts), the likeliest first."""
        probability_TX = F.linear(h_TD, self.weight).softmax(-1, dtype=torch.float32)
        probability_TK, expert_TK = probability_TX.topk(self.chosen, dim=-1)
        return probability_TK.to(h_TD.dtype), expert_TK
