"""Small random masked LMs written by transformers' own classes, and a tokenizer in the manner of theirs."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from rollout.models.tokenizer import CHARACTERS

WORDS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
}
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert")
PAD, UNK, CLS, SEP, MASK = range(5)
LONGEST = 64

SIZES: dict[str, dict[str, Any]] = {
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "attention_dropout": 0.1,
        "initializer_cutoff_factor": 2.0,
    },
    "eurobert": {"num_key_value_heads": 2, "attention_dropout": 0.1, "tie_word_embeddings": False, "mask_token_id": 4},
    "bert": {},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 24},
    "albert": {  # each layer has weights of its own; test_models_albert.py has one for all
        "embedding_size": 24,
        "num_hidden_groups": 3,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
    "esm": {
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
        "mask_token_id": 4,
    },
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
}


def small_config(model_type: str, **changes: Any) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    if model_type == "distilbert":
        shape = {}
    tokens = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP}
    return AutoConfig.for_model(
        model_type,
        vocab_size=len(WORDS["bert"]) + len(CHARACTERS),
        max_position_embeddings=LONGEST,
        initializer_range=0.2,
        **shape,
        **tokens,
        **SIZES[model_type] | changes,
    )


def write_masked_lm(folder: Path, model_type: str, **changes: Any) -> PreTrainedModel:
    """A random checkpoint as transformers publishes it, tokenizer included; returns the model in eval mode. ``changes``
    go to its config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(small_config(model_type, **changes), attn_implementation="sdpa").eval()
    model.save_pretrained(folder)
    masked_tokenizer("roberta" if model_type in LIKE_ROBERTA else "bert").save_pretrained(folder)
    return model


def masked_tokenizer(style: str, **without: None) -> PreTrainedTokenizerFast:
    """Characters as tokens, between a start and a separator, and no chat template; a pair as BERT or RoBERTa has it."""
    pad, unk, cls, sep, mask = WORDS[style]
    tokenizer = Tokenizer(WordLevel({t: i for i, t in enumerate((*WORDS[style], *CHARACTERS))}, unk_token=unk))
    tokenizer.pre_tokenizer = Split("", behavior="isolated")
    tokenizer.decoder = Fuse()
    between = f"{sep} {sep}" if style == "roberta" else sep
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {between} $B {sep}", special_tokens=[(cls, CLS), (sep, SEP)]
    )
    names = {"pad_token": pad, "unk_token": unk, "cls_token": cls, "sep_token": sep, "mask_token": mask, **without}
    if style == "roberta":
        names["eos_token"] = sep
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
