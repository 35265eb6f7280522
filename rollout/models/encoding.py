"""A checkpoint's tokenizer, and the token ids of a prompt as its family writes one."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, EsmTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from rewards.errors import ConfigError, first_line
from rewards.infill import SEPARATOR, Infill, Span
from rollout.models.chat import render_chat
from rollout.models.words import word_tokenizer
from rollout.spans import Gap, contents, prompt_places
from rollout.trajectory import TrajectoryGroup

# Tokenizers whose class lies in their hub repository, and transformers' own class that reads the same files: byte-level
# BPE of vocab.json and merges.txt, Qwen2's pieces and NFC, special tokens of tokenizer_config.json.
_TOKENIZERS = {"DreamTokenizer": Qwen2Tokenizer}


def load_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the checkpoint. Raises ConfigError when there is none, or only one of foreign code."""
    try:
        named = get_tokenizer_config(str(model_path)).get("tokenizer_class")
        reader: Any = _TOKENIZERS.get(str(named), AutoTokenizer)
        tokenizer = reader.from_pretrained(str(model_path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {model_path}: {first_line(error)}") from error
    return _proteins(tokenizer) if isinstance(tokenizer, EsmTokenizer) else tokenizer


class EncodedPrompt(NamedTuple):
    """A prompt as its family reads it."""

    ids: list[int]
    """[P] token ids; of a text with gaps, what stands outside of them."""
    gaps: tuple[Gap, ...] = ()
    """Where the completion stands; none: behind the prompt."""


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[dict[str, str]] | Infill) -> EncodedPrompt:
    """A task's prompt for this tokenizer: ``encode_prompt`` of messages; of a text with gaps its parts, each tokenized
    by itself, in the form that it asks for.

    Raises ConfigError as ``encode_prompt``, and when the text between two gaps makes no token.
    """
    if not isinstance(prompt, Infill):
        return EncodedPrompt(encode_prompt(tokenizer, prompt))
    before, behind = _around(tokenizer, prompt)
    ids = list(before)
    gaps: list[Gap] = []
    for part in prompt.parts:
        if isinstance(part, Span):
            if gaps and gaps[-1].before == len(ids):
                raise ConfigError(
                    f"the text between two gaps of {prompt.shown()!r} makes no token; make one gap of the two"
                )
            gaps.append(Gap(len(ids), part.lengths))
        else:
            ids += encode_text(tokenizer, part)
    return EncodedPrompt(ids + behind, tuple(gaps))


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
        return pair["input_ids"][: pair.sequence_ids().index(1)] + encode_text(tokenizer, begun)
    shield = _Shield(tokenizer, messages)
    rendered = render_chat(tokenizer, shield.turns(asked), add_generation_prompt=True)
    return shield.ids(rendered + shield.text(begun))  # the template writes the start token itself


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text by itself, nothing around it. A control token that it spells stays text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], place_C: np.ndarray | None = None) -> str:
    """A completion as it is graded and kept: without special tokens, and with whatever follows an end of text.

    Args:
        place_C: where its positions stand (``rollout.spans``), when it fills gaps: their contents are joined by
            ``rewards.infill.SEPARATOR``, which none of them holds.
    """
    if place_C is None:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    texts = [completion_text(tokenizer, [ids[position] for position in gap.tolist()]) for gap in contents(place_C)]
    return SEPARATOR.join(text.replace(SEPARATOR, "\N{REPLACEMENT CHARACTER}") for text in texts)


def completion_texts(tokenizer: PreTrainedTokenizerBase, group: TrajectoryGroup) -> tuple[str, ...]:
    """``completion_text`` of each of the group's completions."""
    rows = enumerate(group.completion_ids.tolist())
    return tuple(completion_text(tokenizer, ids, group.place(row)) for row, ids in rows)


def context_texts(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray, place_C: np.ndarray
) -> list[tuple[int, str]]:
    """The prompt's text between the gaps that a completion fills, in reading order: how many of the completion's tokens
    stand before each piece, and the piece.

    Args:
        ids: [P] of the prompt.
        place_C: where the completion's positions stand (``rollout.spans``).
    """
    ids_P = np.asarray(ids)
    before_P = np.searchsorted(place_C[place_C >= 0], prompt_places(place_C, ids_P.size))
    pieces = np.split(np.arange(ids_P.size), np.flatnonzero(np.diff(before_P)) + 1)
    return [(int(before_P[at[0]]), str(tokenizer.decode(ids_P[at].tolist()))) for at in pieces]


def _around(tokenizer: PreTrainedTokenizerBase, prompt: Infill) -> tuple[list[int], list[int]]:
    """Token ids before and behind a text with gaps, in its form."""
    if prompt.form == "chat" and tokenizer.chat_template is not None:
        shield = _Shield(tokenizer, prompt.messages)
        turns = [*shield.turns(prompt.messages), {"role": "assistant", "content": shield.hole}]
        rendered = render_chat(tokenizer, turns, add_generation_prompt=False).split(shield.hole)
        if len(rendered) != 2:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} writes the assistant's turn "
                f"{len(rendered) - 1} times, so a text with gaps has no place in it; give the prompt the form plain"
            )
        return shield.ids(rendered[0]), shield.ids(rendered[1])
    asked = [message["content"].strip() for message in prompt.messages]
    any_text = encode_text(tokenizer, ".")  # it only shows where a text stands
    assert any_text, "a tokenizer that makes nothing of a full stop, not even an unknown token"
    if prompt.form != "single" and asked:
        pair = tokenizer("\n\n".join(asked), ".", split_special_tokens=True)
        ids, at = list(pair["input_ids"]), pair.sequence_ids().index(1)
        return ids[:at], ids[at + len(any_text) :]
    ids = list(tokenizer(".", split_special_tokens=True)["input_ids"])
    at = next(i for i in range(len(ids)) if ids[i : i + len(any_text)] == any_text)
    return [*ids[:at], *(token for text in asked for token in encode_text(tokenizer, text))], ids[at + len(any_text) :]


class _Shield:
    """Keeps the control tokens that people's texts spell from becoming tokens of that kind, through a chat template:
    the rendered text has a mark and a number for each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> None:
        self._tokenizer = tokenizer
        self._control = _control_tokens(tokenizer)
        self._spelled: list[str] = []
        self._mark, self.hole = _unused_characters(messages)

    def text(self, text: str) -> str:
        def shield(found: re.Match[str]) -> str:
            self._spelled.append(found[0])
            return f"{self._mark}{len(self._spelled) - 1}{self._mark}"

        return self._control.sub(shield, text)

    def turns(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        return [{**message, "content": self.text(message["content"])} for message in messages]

    def ids(self, rendered: str) -> list[int]:
        """Token ids of a text of shielded parts."""
        ids: list[int] = []
        for number, piece in enumerate(re.split(f"{self._mark}([0-9]+){self._mark}", rendered)):
            if number % 2:
                ids += encode_text(self._tokenizer, self._spelled[int(piece)])
            else:
                ids += self._tokenizer.encode(piece, add_special_tokens=False)
        return ids


def _proteins(tokenizer: EsmTokenizer) -> PreTrainedTokenizerBase:
    """ESM's words under the same ids. transformers' own class writes spaces between them, and can't tell the texts of a
    pair apart."""
    words = word_tokenizer(tokenizer.all_tokens, tokenizer.special_tokens_map, "characters")
    words.name_or_path, words.model_max_length = tokenizer.name_or_path, tokenizer.model_max_length
    return words


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds them in a text, long ones first."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _unused_characters(messages: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Two of those that mean nothing to Unicode."""
    used = set().union(*(message["content"] for message in messages))
    first, second, *_ = (character for character in map(chr, range(0xE000, 0xF900)) if character not in used)
    return first, second
