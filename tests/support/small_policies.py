"""Small random policies of the families that vLLM computes, on disk, with heads as wide as its kernels want them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from rollout.models.dream import DreamConfig, DreamModel
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from rollout.models.tokenizer import CHARACTERS, build_tokenizer
from tests.support.small_masked_lms import masked_tokenizer

FAMILIES = ("bert", "llada", "dream", "llada_moe")
LONGEST = 96


def write_policy(folder: Path, family: str) -> None:
    """A checkpoint with its tokenizer. Laws are neither flat nor sure, and norms and biases are not what they begin
    as."""
    tokenizer: Any = masked_tokenizer("bert") if family == "bert" else build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(family, tokenizer)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model(family: str, tokenizer: Any) -> Any:
    if family == "bert":
        return AutoModelForMaskedLM.from_config(
            AutoConfig.for_model(
                "bert",
                vocab_size=5 + len(CHARACTERS),
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=96,
                max_position_embeddings=LONGEST,
                initializer_range=0.1,
            )
        )
    ids = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "llada":
        sizes = {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 96}
        return LLaDAModelLM(LLaDAConfig(max_sequence_length=LONGEST, **sizes, **ids))
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": LONGEST,
    }
    if family == "dream":
        return DreamModel(DreamConfig(**shape, num_key_value_heads=1, intermediate_size=96, bos_token_id=None, **ids))
    return LLaDAMoEModelLM(
        LLaDAMoEConfig(
            **shape,
            num_key_value_heads=2,
            dense_intermediate_size=96,
            expert_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
            moe_layer_freq=[0, 1, 1],
            **ids,
        )
    )
