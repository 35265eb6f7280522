r"""Finds the submitted answer in a completion. Every function is total and linear in the text it reads.

Rules, the same for every strict task (of several boxes, mathematics takes the last: ``rewards.maths.answers``):

- Closed ``<think>...</think>`` blocks are taken out first, so an answer tag inside the thinking is no answer.
- The *last* complete ``<answer>...</answer>`` is the submission. Without one, the whole remaining text is, and it is
  marked as untagged: graders give no format credit for it and accept it only where the text is the answer itself.
- Inside the submission the first balanced ``\boxed{...}`` counts, if there is one.
"""

import re
from dataclasses import dataclass

MAX_CHARACTERS = 16_384
"""Only this many characters at the end of a completion are read: room for any answer, bounded work for any input."""

_THINK = re.compile(r"<(/?)think>", re.IGNORECASE | re.ASCII)
_ANSWER = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_OPERATOR_SPELLINGS = {r"\times": "*", r"\cdot": "*", "\u00d7": "*", r"\div": "/", "\u00f7": "/"}


@dataclass(frozen=True)
class Submission:
    """The answer's text, stripped, and whether it stood in an answer tag."""

    text: str
    tagged: bool


def submission(completion: str) -> Submission:
    """What the completion submits as its answer; the text is empty when there is nothing."""
    text = without_thinking(completion.strip()[-MAX_CHARACTERS:])
    answer = last_answer(text)
    inner = text if answer is None else answer
    content = boxed(inner)
    return Submission((inner if content is None else content).strip(), tagged=answer is not None)


def boxed(text: str) -> str | None:
    r"""The inside of the first balanced ``\boxed{...}``, or None.

    A box that wraps nothing but another box is taken off too. Escaped braces ``\{ \}`` don't count as braces.
    """
    return next((text[start:end] for _, start, end in boxes(text)), None)


def boxes(text: str) -> list[tuple[int, int, int]]:
    r"""The balanced ``\boxed{...}`` that lie in no other, in order: where each begins, and start and end of its inside.

    The inside is that of ``boxed``.
    """
    if r"\boxed" not in text:
        return []
    insides: dict[int, tuple[int, int]] = {}  # start of a balanced box: start and end of its inside
    open_braces: list[tuple[int, int]] = []  # start and end of the token, "{" or the whole box opener
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "{" or token.startswith(r"\boxed"):
            open_braces.append(match.span())
        elif token == "}" and open_braces:
            opened, start = open_braces.pop()
            if text[opened] != "{":
                insides[opened] = start, match.start()
    found: list[tuple[int, int, int]] = []
    outer_end = -1
    for begin in sorted(insides):
        start, end = insides[begin]
        if start > outer_end:
            outer_end = end
            while start in insides and insides[start][1] + 1 == end:
                start, end = insides[start]
            found.append((begin, start, end))
    return found


def plain_operators(text: str) -> str:
    r"""Replaces the usual other spellings of * and / (``\times``, ``\cdot``, ``\div`` and the two signs)."""
    for spelling, operator in _OPERATOR_SPELLINGS.items():
        text = text.replace(spelling, operator)
    return text


def shorten(value: object, limit: int = 60) -> str:
    """The value's repr for an error message, cut after ``limit`` characters."""
    quoted = repr(value[: limit + 1] if isinstance(value, str) else value)
    return quoted if len(quoted) <= limit else quoted[:limit] + "..."


def without_thinking(text: str) -> str:
    """Closed think blocks replaced by a space. A tag without its partner is left alone."""
    kept: list[str] = []
    kept_to, opened = 0, None
    for match in _THINK.finditer(text):
        closing = bool(match.group(1))
        if not closing and opened is None:
            opened = match.start()
        elif closing and opened is not None:
            kept.append(text[kept_to:opened])
            kept_to, opened = match.end(), None
    return " ".join([*kept, text[kept_to:]])


def has_thinking(text: str) -> bool:
    """Whether there is a closed think block."""
    opened = False
    for match in _THINK.finditer(text):
        if opened and match.group(1):
            return True
        opened = opened or not match.group(1)
    return False


def last_answer(text: str) -> str | None:
    """The inside of the last complete answer block, or None."""
    inside, opened = None, None
    for match in _ANSWER.finditer(text):
        if not match.group(1):
            opened = match.end()
        elif opened is not None:
            inside, opened = (opened, match.start()), None
    return None if inside is None else text[inside[0] : inside[1]]
