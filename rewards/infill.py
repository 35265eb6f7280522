"""Prompts with gaps: text on both sides of what is to be written.

A completion is then the union of the gaps' contents, in reading order; each gap has a length in tokens, or several of
which every completion draws one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rewards.errors import DataError

PromptForm = Literal["chat", "plain", "single"]
"""How a family writes a text with gaps.

chat: as the assistant's turn of a conversation, by the tokenizer's chat template, the end of the turn behind it;
``plain`` where the tokenizer has no template. plain: conversation and text as two texts, with the separators that the
tokenizer puts between and around two. single: one text, nothing between its parts but what the tokenizer puts around
any text.
"""

SEPARATOR = "\N{SYMBOL FOR RECORD SEPARATOR}"
"""Between the contents of several gaps in a completion's text. A content never holds it."""
GAP = "\N{HORIZONTAL ELLIPSIS}"
"""What people see in the place of a gap."""


@dataclass(frozen=True)
class Span:
    """A gap. Of several lengths each completion draws one, all alike; the draw is no action of the policy."""

    lengths: tuple[int, ...]
    """Tokens."""


@dataclass(frozen=True)
class Infill:
    """A text with gaps, and the conversation before it."""

    parts: tuple[str | Span, ...]
    messages: tuple[dict[str, str], ...]
    form: PromptForm

    def shown(self) -> str:
        """The text for people, an ellipsis in the place of each gap."""
        return "".join(f" {GAP} " if isinstance(part, Span) else part for part in self.parts).strip()


def infill(
    *parts: str | int | Sequence[int], messages: Sequence[dict[str, str]] = (), form: PromptForm = "chat"
) -> Infill:
    """A text with gaps, from its parts in reading order: texts, and for each gap its length in tokens, or the lengths
    that it may have.

        infill("EVQLVESGG", 12, "WGQGTLVTVSS", form="single")

    Raises:
        DataError: there is no gap, a length that is no whole number of 1 or more, no text between two gaps, or no such
            form.
    """
    if form not in get_args(PromptForm):
        raise DataError(f"a prompt of the form {form!r}; take {', '.join(get_args(PromptForm))}")
    found: list[str | Span] = []
    for part in parts:
        if isinstance(part, str):
            found.append(part)
            continue
        lengths: tuple[Any, ...] = tuple(part) if isinstance(part, Sequence) else (part,)
        if not lengths or any(type(length) is not int or length < 1 for length in lengths):
            raise DataError(f"a gap of {part!r} tokens; give a whole number of 1 or more, or a list of them")
        if found and isinstance(found[-1], Span):
            raise DataError(f"no text between two gaps, of {list(found[-1].lengths)} and {part!r} tokens; make it one")
        found.append(Span(lengths))
    if not any(isinstance(part, Span) for part in found):
        raise DataError("a text without a gap has nothing to write; give a length in tokens between its parts")
    return Infill(tuple(found), tuple(messages), form)


def contents(completion: str) -> list[str]:
    """What a completion's text has in each gap, in reading order."""
    return completion.split(SEPARATOR)
