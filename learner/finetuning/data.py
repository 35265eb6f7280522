"""Demonstrations: read, written as a conversation, encoded, and split into those to learn and those held out.

A row of the data is in one of three formats, told apart by its columns:

messages                        a conversation whose last message is the assistant's; it is the completion, all before
                                it the prompt
prompt, completion              the prompt is text (one user message) or a list of messages
question, thinking, answer      a reasoning trace, also under s1K's names: thinking_trajectories (a list, of which the
                                first counts) and attempt; s1K-1.1's: deepseek_thinking_trajectory, deepseek_attempt

The prompt is encoded with the chat template up to where the assistant's turn starts, as in sampling. The completion is
encoded by itself, and the token that ends a turn in the chat template (``<|eot_id|>``, ``<|im_end|>``) is put behind
it. d1's code encodes prompt and conversation as two texts and takes the length of the first for the boundary, with a
newline in place of the assistant's header, so its boundary is a few tokens off; ours is exact.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from learner.finetuning.settings import DataSection
from rewards.cells import listed
from rewards.errors import ConfigError, DataError
from rewards.tasks.hub import problems_from_source
from rollout.models.chat import render_chat
from rollout.models.encoding import encode_prompt
from rollout.seeds import numpy_generator

D1_INSTRUCTION = """
Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
...
</answer>
"""
"""What d1's fine-tuning puts before every question (its SFT/sft_trainer.py, SYSTEM_PROMPT)."""

_REASONING_COLUMNS = (
    ("thinking", "answer"),
    ("thinking_trajectories", "attempt"),
    ("deepseek_thinking_trajectory", "deepseek_attempt"),
)
_FORMATS = "messages; prompt and completion; or question, thinking and answer (docs/sft.md)"


@dataclass(frozen=True)
class Example:
    """An encoded demonstration."""

    id: str
    """Source and row; the draws of masks and EOS are named by it."""
    prompt_ids: np.ndarray
    """[P] int32, not empty."""
    completion_ids: np.ndarray
    """[C] int32, not empty, up to the end of the turn; EOS are put behind it anew for every epoch."""
    ended: bool
    """False where the completion was cut: nothing may follow it then."""

    @property
    def length(self) -> int:
        return self.prompt_ids.size + self.completion_ids.size


@dataclass(frozen=True)
class Demonstrations:
    """What a run learns from, and what it is measured on."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    told: tuple[str, ...]
    """What was left out or cut, one sentence each."""

    @property
    def fingerprint(self) -> str:
        """sha256 over all examples: the same data, encoded the same."""
        sha = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            sha.update(f"{example.id}|{example.prompt_ids.size}|{example.ended}|".encode())
            sha.update(example.prompt_ids.tobytes() + example.completion_ids.tobytes())
        return sha.hexdigest()


def load_demonstrations(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, mask_token_id: int, seed: int
) -> Demonstrations:
    """Read, encode and split.

    Raises:
        DataError: when a source can't be read, a row has no known format, or nothing is left; it names the place.
        ConfigError: when the split leaves nothing to learn or to hold out, or the model's chat template fails.
    """
    assert data.train is not None
    told: list[str] = []
    examples = _encoded(data.train, data, tokenizer, mask_token_id, told, size=data.size or sys.maxsize)
    if data.held_out is not None:
        held_out = _encoded(data.held_out, data, tokenizer, mask_token_id, told, size=sys.maxsize)
    elif data.held_out_fraction > 0:
        order = numpy_generator(seed, "sft", "held out").permutation(len(examples))
        count = max(1, round(data.held_out_fraction * len(examples)))
        held_out = [examples[i] for i in sorted(order[:count])]
    else:
        held_out = []
    asked = {example.prompt_ids.tobytes() for example in held_out}
    train = [example for example in examples if example.prompt_ids.tobytes() not in asked]
    left_out = len(examples) - len(train) - (0 if data.held_out is not None else len(held_out))
    if left_out:
        told.append(f"{left_out} demonstrations have the prompt of a held-out one and are not learned")
    if not train:
        raise ConfigError(
            f"data.held_out_fraction={data.held_out_fraction:g} of {len(examples)} demonstrations leaves none to "
            "learn; lower it or give more data"
        )
    return Demonstrations(tuple(train), tuple(held_out), tuple(told))


def conversation(row: dict[str, Any], reasoning: str) -> dict[str, Any]:
    """A row as ``{"messages": the prompt's, "completion": text}``.

    reasoning: how a question with its thinking and answer is written, think or d1 (``data.reasoning``).

    Raises:
        DataError: when the row is in no known format.
    """
    if "messages" in row:
        return _split(_messages(listed(row["messages"]), "messages"))
    if "prompt" in row and "completion" in row:
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
        return {"messages": messages, "completion": _text(row["completion"], "completion")}
    for thinking, answer in _REASONING_COLUMNS:
        if "question" in row and thinking in row and answer in row:
            value = listed(row[thinking])
            trace = _text(value[0] if isinstance(value, list) and value else value, thinking)
            return _reasoned(_text(row["question"], "question"), trace, _text(row[answer], answer), reasoning)
    have = ", ".join(sorted(map(str, row)))
    raise DataError(f"the columns {have} are in no known format; a demonstration has {_FORMATS}")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends the assistant's turn in the chat template; [] when the turn ends without one of its own."""
    marker = "MARKER"
    if tokenizer.chat_template is None:
        return []
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": marker}]
    text = render_chat(tokenizer, messages, add_generation_prompt=False)
    ids = tokenizer.encode(text.rpartition(marker)[2], add_special_tokens=False)
    return ids[:1] if ids and ids[0] in tokenizer.added_tokens_decoder else []


def _encoded(
    source: str,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    told: list[str],
    *,
    size: int,
) -> list[Example]:
    rows = problems_from_source(source, task="sft", size=size, convert=lambda row: conversation(row, data.reasoning))
    end, counts, examples = turn_end(tokenizer), Counter[str](), []
    for row in rows:
        prompt = encode_prompt(tokenizer, row.fields["messages"])
        completion = [*tokenizer.encode(row.fields["completion"], add_special_tokens=False), *end]
        if mask_token_id in completion:
            raise DataError(f"{source}: {row.id} holds the mask token in its text, which is never learned; take it out")
        room = data.max_tokens - len(prompt)
        too_long = len(completion) + 1 > room  # at least one EOS is to follow
        if too_long and (data.too_long == "drop" or room < 1):
            counts["dropped"] += 1
            continue
        counts["cut"] += too_long
        kept = completion[:room] if too_long else completion
        ids = np.array(prompt, dtype=np.int32), np.array(kept, dtype=np.int32)
        examples.append(Example(row.id, *ids, ended=not too_long))
    if counts["dropped"]:
        told.append(
            f"{counts['dropped']} of {len(rows)} demonstrations of {source} have more than "
            f"data.max_tokens={data.max_tokens} tokens and are left out"
        )
    if counts["cut"]:
        told.append(
            f"{counts['cut']} of {len(rows)} demonstrations of {source} lose the end of their completion at "
            f"data.max_tokens={data.max_tokens} tokens"
        )
    if not examples:
        raise DataError(f"no demonstration of {source} fits into data.max_tokens={data.max_tokens} tokens; raise it")
    return examples


def _reasoned(question: str, thinking: str, answer: str, reasoning: str) -> dict[str, Any]:
    if reasoning == "d1":
        question = f"{D1_INSTRUCTION}\n\n{question}"
        completion = f"<reasoning>{thinking}</reasoning>\n<answer>{answer}</answer>"
    else:
        completion = f"<think>{thinking}</think>\n<answer>{answer}</answer>"
    return {"messages": [{"role": "user", "content": question}], "completion": completion}


def _split(messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    *prompt, last = messages
    if last["role"] != "assistant" or not prompt:
        raise DataError(f"the last message is the {last['role']}'s; it must be the assistant's, and another before it")
    return {"messages": prompt, "completion": _text(last["content"], "the last message")}


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    whole = isinstance(value, list) and value
    if not whole or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value):
        raise DataError(f"{column} is not a list of messages with role and content")
    return [{"role": str(m["role"]), "content": _text(m["content"], f"a message of {column}")} for m in value]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{column} is {'empty' if isinstance(value, str) else 'not text'}; give it a text")
    return value
