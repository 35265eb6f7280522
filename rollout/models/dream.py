"""Dream-7B (arXiv 2508.15487): Qwen2.5's trunk with biases on queries, keys and values, every token seeing every token.

It was made from a left-to-right model and kept its habit: the logits at a position predict the *next* position's token
(``logit_shift`` 1). Names and config.json are those of Dream-org/Dream-v0-{Base,Instruct}-7B.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn

from rollout.models.decoder import DecoderConfig, DecoderLM, check_decoder_config
from rollout.models.layers import GatedMLP

FIXED_SWITCHES = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "tie_word_embeddings": (False, None),
    "rope_scaling": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}


@strict
class DreamConfig(DecoderConfig):
    """Sizes and token ids under the names of the published config.json; the defaults are Dream-7B's.

    Raises ConfigError when heads don't divide the width, or a switch of ``FIXED_SWITCHES`` has another value.
    """

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 131072
    rope_theta: float | int = 1000000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    mask_token_id: int = 151666
    bos_token_id: int | None = 151643
    eos_token_id: int = 151643
    pad_token_id: int = 151643

    def __post_init__(self, **kwargs: Any) -> None:
        check_decoder_config(self, kwargs, FIXED_SWITCHES)
        super().__post_init__(**kwargs)


class DreamModel(DecoderLM):
    """Dream's policy; see ``DecoderLM``."""

    config_class = DreamConfig
    qkv_bias = True

    @staticmethod
    def build_mlp(config: DreamConfig, layer: int) -> nn.Module:
        return GatedMLP(config.hidden_size, config.intermediate_size)
