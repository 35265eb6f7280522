"""A checkpoint's tokenizer, and the token ids of a prompt as its family writes one."""

import re
from collections.abc import Sequence
from functools import lru_cache
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

    A last message of the assistant is the beginning of the completion, and ends the prompt as it stands. Where the text
    of a message spells a control token, ``<|mdm_mask|>``, it is text and becomes no token of that kind: a hole in the
    prompt, or the end of its turn.

    Raises ConfigError when the chat template fails on these messages (``rollout.models.chat``).
    """
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    asked = list(messages[:-1] if begun else messages)
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"].strip() for message in asked)
        pair = tokenizer(text, ".", split_special_tokens=True)  # any second text: it only shows where one starts
        return pair["input_ids"][: pair.sequence_ids().index(1)] + _as_text(tokenizer, begun)
    spelled: list[str] = []
    control, mark = _control_tokens(tokenizer), _unused_character(messages)

    def shielded(text: str) -> str:
        """With a mark and a number for each control token that it spells."""

        def shield(found: re.Match[str]) -> str:
            spelled.append(found[0])
            return f"{mark}{len(spelled) - 1}{mark}"

        return control.sub(shield, text)

    asked = [{**message, "content": shielded(message["content"])} for message in asked]
    rendered = render_chat(tokenizer, asked, add_generation_prompt=True) + shielded(begun)
    ids: list[int] = []
    for number, piece in enumerate(re.split(f"{mark}([0-9]+){mark}", rendered)):
        if number % 2:
            ids += _as_text(tokenizer, spelled[int(piece)])
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False)  # the template writes the start token itself
    return ids


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """A completion as it is graded and kept: without special tokens, and with whatever follows an end of text."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds them in a text, long ones first."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _unused_character(messages: Sequence[dict[str, str]]) -> str:
    """Of those that mean nothing to Unicode."""
    used = set().union(*(message["content"] for message in messages))
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in used)
