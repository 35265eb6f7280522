"""A checkpoint's tokenizer, and the token ids of a prompt as its family writes one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from rewards.errors import ConfigError, first_line
from rollout.models.chat import render_chat

# Tokenizers whose class lies in their hub repository, and transformers' own class that reads the same files: byte-level
# BPE of vocab.json and merges.txt, Qwen2's pieces and NFC, special tokens of tokenizer_config.json.
_TOKENIZERS = {"DreamTokenizer": Qwen2Tokenizer}


def load_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the checkpoint. Raises ConfigError when there is none, or only one of foreign code."""
    try:
        named = get_tokenizer_config(str(model_path)).get("tokenizer_class")
        reader: Any = _TOKENIZERS.get(str(named), AutoTokenizer)
        return reader.from_pretrained(str(model_path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {model_path}: {first_line(error)}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation and what stands before the completion: the header of the assistant's turn.

    A tokenizer without a chat template (a masked LM's) gets the messages' texts, an empty line between them, as the
    first half of a pair of texts whose second half is the completion: ``[CLS] text [SEP]`` for BERT and ModernBERT,
    ``<s>text</s></s>`` for RoBERTa. Roles are not written.

    A last message of the assistant is the beginning of the completion, and ends the prompt as it stands.

    Raises ConfigError when the chat template fails on these messages (``rollout.models.chat``).
    """
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    asked = list(messages[:-1] if begun else messages)
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"].strip() for message in asked)
        pair = tokenizer(text, ".", split_special_tokens=True)  # any second text: it only shows where one starts
        return pair["input_ids"][: pair.sequence_ids().index(1)] + tokenizer.encode(begun, add_special_tokens=False)
    rendered = render_chat(tokenizer, asked, add_generation_prompt=True)
    # The template writes the start token itself.
    return tokenizer.encode(rendered + begun, add_special_tokens=False)
