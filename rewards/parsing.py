r"""Finds the submitted answer in a completion. Every function is total and linear in the text it reads.

Rules, the same for every strict task (of several boxes, mathematics takes the last: ``rewards.maths.answers``):

- Special tokens (``<|eot_id|>``) are no text.
- ``<think>...</think>`` blocks are taken out first, so an answer tag inside the thinking is no answer. Thinking that is
  never closed goes on to the next ``<answer>``, or to the end.
- The *last* complete ``<answer>...</answer>`` is the submission. One whose closing tag is damaged (``</answer}``) is
  read too, but is not complete. When there is nothing in it, what follows it is read. Without a tag, the whole
  remaining text is, and it is marked as untagged: graders give no format credit for it and accept it only where the
  text is the answer itself.
- Inside the submission the first balanced ``\boxed{...}`` counts, if there is one. A box may have lost its backslash,
  and one that is still open where the tag is closed ends there. But where the text just ends in a box, the answer was
  cut off, and an earlier box is a draft.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

MAX_CHARACTERS = 16_384
"""Only this many characters at the end of a completion are read: room for any answer, bounded work for any input."""

_THINK = re.compile(r"<(/?)think>", re.IGNORECASE | re.ASCII)
_ANSWER = re.compile(r"<(/?)answer(>|(?<=/answer)(?![A-Za-z])[^\s\w<]?)", re.IGNORECASE | re.ASCII)
_OPEN_ANSWER = re.compile(r"<answer>", re.IGNORECASE | re.ASCII)
_NOTHING = re.compile(r"(?:[\s$]|\\boxed\s*\{\s*\})*")
_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>")
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_MISSPELLED_BOX = re.compile(r"(?:(?<![\\A-Za-z])|(?<!\\)\\\\)boxed(?=\s*\{)")
_FACTORS_X = re.compile(r"(?<=[0-9)]) ?[xX] ?(?=[0-9(])")
_OPERATOR_SPELLINGS = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-")
    | dict.fromkeys("\u00d7\u00b7\u22c5\u2219\u2022\u2217\uff0a", "*")
    | dict.fromkeys("\u00f7\u2044\u2215\uff0f", "/")
    | {"\uff0b": "+", "\uff1d": "=", "\uff08": "(", "\uff09": ")", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
)
_COMMANDS = re.compile(r"\\(?:(times|cdot|ast)|(div)|left|right|[Bb]igg?[lr]?)(?![A-Za-z])|\\[][(),;:! ]|\$")


@dataclass(frozen=True)
class Submission:
    """The answer's text, stripped, and whether it stood in an answer tag."""

    text: str
    tagged: bool


class Region(NamedTuple):
    """The part of a completion that holds its answer.

    ``begun``: an ``<answer>`` stands before it; ``ended``: a closing tag behind it; ``tagged``: both, undamaged.
    """

    text: str
    begun: bool
    ended: bool
    tagged: bool


class Box(NamedTuple):
    """Where a box begins, start and end of its inside, and whether it is closed: else its inside goes to the end."""

    begin: int
    start: int
    end: int
    closed: bool


def submission(completion: str) -> Submission:
    """What the completion submits as its answer; the text is empty when there is nothing."""
    text = readable(completion)
    region = answer_region(text)
    inner = region.text if region.ended or not region.begun else text
    found = boxes(inner)
    if found and not found[-1].closed and not region.ended:
        return Submission("", region.tagged)
    content = inner[found[0].start : found[0].end] if found else inner
    return Submission(content.strip(), region.tagged)


def readable(completion: str) -> str:
    """The end of a completion without thinking and special tokens, its boxes spelled ``\boxed``."""
    text = without_thinking(without_special_tokens(completion.strip()[-MAX_CHARACTERS:]))
    count = text.count("boxed")
    if not count or (count == text.count(r"\boxed") and r"\\boxed" not in text):
        return text  # as nearly always
    return _MISSPELLED_BOX.sub(r"\\boxed", text)


def answer_region(text: str) -> Region:
    """Where the answer of a readable text stands."""
    block, opened = None, None
    for match in _ANSWER.finditer(text):
        if not match[1]:
            opened = match.end()
        elif opened is not None:
            block, opened = (opened, match.start(), match.end(), match[2] == ">"), None
    if block is not None:
        start, end, after, complete = block
        behind = text[after:]
        if _NOTHING.fullmatch(text, start, end) and behind.strip():
            return Region(behind, begun=False, ended=False, tagged=complete)
        return Region(text[start:end], begun=True, ended=True, tagged=complete)
    if opened is not None and text[opened:].strip():
        return Region(text[opened:], begun=True, ended=False, tagged=False)
    return Region(text, begun=False, ended=False, tagged=False)


def boxed(text: str) -> str | None:
    r"""The inside of the first balanced ``\boxed{...}``, or None.

    A box that wraps nothing but another box is taken off too. Escaped braces ``\{ \}`` don't count as braces.
    """
    return next((text[box.start : box.end] for box in boxes(text) if box.closed), None)


def boxes(text: str) -> list[Box]:
    r"""The balanced ``\boxed{...}`` that lie in no other, in order, and then the last that is not closed, if none
    follows it.

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
    found: list[Box] = []
    outer_end = -1
    for begin in sorted(insides):
        start, end = insides[begin]
        if start > outer_end:
            outer_end = end
            while start in insides and insides[start][1] + 1 == end:
                start, end = insides[start]
            found.append(Box(begin, start, end, True))
    for opened, start in reversed(open_braces):
        if text[opened] != "{":
            return [*found, Box(opened, start, len(text), False)] if opened > outer_end else found
    return found


def plain_operators(text: str) -> str:
    r"""Replaces the usual other spellings of ``+ - * / ( )``: LaTeX's (``\times``, ``\left(``), Unicode's, an x between
    numbers. What only sets them off (``$``, spaces) is a space, and a full stop at the end is none of it."""
    text = _COMMANDS.sub(
        lambda match: "*" if match[1] else "/" if match[2] else " ", text.translate(_OPERATOR_SPELLINGS)
    )
    return _FACTORS_X.sub("*", text).rstrip().removesuffix(".")


def without_special_tokens(text: str, instead: str = " ") -> str:
    """The text with ``instead`` of a tokenizer's special tokens, such as ``<|eot_id|>``."""
    return _SPECIAL.sub(instead, text) if "<|" in text else text


def shorten(value: object, limit: int = 60) -> str:
    """The value's repr for an error message, cut after ``limit`` characters."""
    quoted = repr(value[: limit + 1] if isinstance(value, str) else value)
    return quoted if len(quoted) <= limit else quoted[:limit] + "..."


def without_thinking(text: str) -> str:
    """Thinking replaced by a space: closed blocks, and what is never closed up to the next ``<answer>`` or the end. A
    closing tag without its partner is left alone."""
    kept: list[str] = []
    kept_to, opened = 0, None
    for match in _THINK.finditer(text):
        closing = bool(match.group(1))
        if not closing and opened is None:
            opened = match.start()
        elif closing and opened is not None:
            kept.append(text[kept_to:opened])
            kept_to, opened = match.end(), None
    if opened is not None:
        kept.append(text[kept_to:opened])
        answer = _OPEN_ANSWER.search(text, opened)
        kept_to = answer.start() if answer else len(text)
    return " ".join([*kept, text[kept_to:]])


def has_thinking(text: str) -> bool:
    """Whether there is a closed think block."""
    opened = False
    for match in _THINK.finditer(text):
        if opened and match.group(1):
            return True
        opened = opened or not match.group(1)
    return False
