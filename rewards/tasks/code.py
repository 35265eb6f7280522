r"""Finds the program in a completion, and what the code tasks share. Every function is total and linear in its text.

Special tokens and thinking are taken out first. Then the program is the first of these that defines a wanted name, else
the first that there is:

1. the complete fenced blocks marked as Python (```` ```python ````, ``py``, ``python3``),
2. the complete fenced blocks of another or no language,
3. the inside of the last ``<answer>`` tag,
4. what follows an opening fence that is never closed (the model stopped, or ran out of tokens),
5. the text itself, up to a closing fence that was never opened.

A fence is three or more backticks or tildes; one in a docstring is text. Of several blocks, the last that defines a
wanted name is the program, after and before those that only define and import; usage and tests are left out. When none
defines one, all are joined.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from rewards.errors import DataError
from rewards.layout import Cell, Layout, place_of
from rewards.parsing import answer_region, shorten, without_special_tokens, without_thinking
from rewards.sandbox.runner import Job, Limits, run_program
from rewards.task import Grade, Task

MAX_CHARACTERS = 65_536
"""Only this many characters at the end of a completion are read."""

MAX_FIELD = 1 << 18
"""Characters of a problem's field, a list's together: parsing one takes some 500 bytes and 1.5 us. No field of the
published sets has 5,000."""

UNPARSABLE = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
"""What ``ast.parse`` and ``ast.unparse`` raise for text that is no Python, holds NUL, is nested too deeply, or whose
numbers are too long to be written down."""

LIMITS = Limits(cpu_seconds=8, seconds=15.0)
"""For one program with all its tests; the slowest reference solution takes 2.2 s of CPU time, and took 7 s on
cores that others used too. (The published HumanEval harness allows 3 s of wall-clock time, by which a busy
machine changes verdicts; here that ends only what waits.)"""

_MARK = re.compile(r"(`{3,}|~{3,})[ \t]*([A-Za-z0-9_+.-]*)")
_PYTHON = ("python", "py", "python3")
_LABEL = re.compile(r"[ \t]*[:{]")
_DEFINING_LINE = re.compile(
    r"(?:import|from|(?:async +)?def|class)\b|[@#\s)\]}]|$|[A-Za-z_]\w*[ \t]*(?::[^=(]*)?=[^=(]*$|\"\"\"|'''", re.ASCII
)


@dataclass(frozen=True)
class Code:
    """A program's text and where it stood: in a complete fence, an answer tag, an unclosed fence, or nowhere."""

    text: str
    place: Literal["fence", "answer", "open fence", "text"]


def code_in(completion: str, names: Sequence[str]) -> Code:
    """The program that a completion submits, which should define one of ``names``."""
    text = without_special_tokens(completion[-MAX_CHARACTERS:].replace("\r\n", "\n"), instead="")
    thinks_first = text.lstrip()[: len("<think>")].lower() == "<think>"
    text = without_thinking(text)
    if thinks_first and text.startswith(" "):  # what stands for the thinking; a function's body is indented
        text = text[1:]
    definition = _definition(tuple(names))
    blocks, opened = _fences(text)
    found = [
        Code(_joined(group, definition), "fence")
        for group in (
            [inside for language, inside in blocks if language in _PYTHON],
            [inside for language, inside in blocks if language not in _PYTHON],
        )
        if group
    ]
    region = answer_region(text)
    if region.ended:
        found.append(Code(region.text.strip("\n"), "answer"))
    if opened is not None:
        mark, inside = opened
        unopened = Code(text[:mark].rstrip(" \t"), "text")
        rest = [Code(inside, "open fence"), unopened]
        found += rest if inside.strip() or not unopened.text.strip() else rest[::-1]
    found.append(Code(text, "text"))
    return next((code for code in found if definition.search(code.text)), found[0])


def _fences(text: str) -> tuple[list[tuple[str, str]], tuple[int, str] | None]:
    """(language, inside) of every complete block, and where a fence that stays open begins, with what follows it. A
    fence that names Python always opens; inside a block any other that is as long closes it."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    looked_to, quotes = 0, {'"""': 0, "'''": 0}
    for mark in _MARK.finditer(text):
        for quote in quotes:
            quotes[quote] += text.count(quote, looked_to, mark.start())
        looked_to = mark.end()
        if opened is not None and any(count % 2 for count in quotes.values()):
            continue  # in a docstring
        if opened is None or mark[2].lower() in _PYTHON:
            opened, quotes = mark, dict.fromkeys(quotes, 0)
        elif mark[1].startswith(opened[1]):
            blocks.append((opened[2].lower(), _inside(text[opened.end() : mark.start()])))
            opened = None
    return blocks, None if opened is None else (opened.start(), _inside(text[opened.end() :]))


def _inside(text: str) -> str:
    """Without the rest of the line that the fence stands on, when that is blank or a label, and without the indentation
    of all lines."""
    first, newline, rest = text.partition("\n")
    inside = rest if newline and (not first.strip() or _LABEL.match(first)) else text
    return textwrap.dedent(inside) if inside.lstrip("\n")[:1].isspace() else inside


def _joined(blocks: Sequence[str], definition: re.Pattern[str]) -> str:
    """One program of several blocks."""
    if len(blocks) == 1:
        return blocks[0]
    defining = [index for index, block in enumerate(blocks) if definition.search(block)]
    if not defining:
        return "\n".join(blocks)
    kept = [n for n, block in enumerate(blocks) if n == defining[-1] or (n not in defining and _only_defines(block))]
    return "\n".join(blocks[n] for n in kept)


def _only_defines(block: str) -> bool:
    return all(_DEFINING_LINE.match(line) for line in block.split("\n"))


@lru_cache(maxsize=4096)
def _definition(names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds where one of the names is defined at the outermost level."""
    name = f"(?:{'|'.join(map(re.escape, names))})"
    defined = rf"^(?:(?:async +)?def|class)[ \t]+{name}\b"
    given = rf"^{name}[ \t]*(?::[^=\n]*)?=(?!=)|^from\b[^\n]*\b{name}\b"
    return re.compile(f"{defined}|{given}", re.MULTILINE)


class CodeTask(Task):
    """A task whose answer is a program, decided by its tests in the sandbox.

    Reward components, 2.0 in all: ``format`` 0.25 for a program in a complete fenced block that is Python (it compiles;
    that too is tried in the sandbox), ``tests`` 0.75 times the share of the tests passed, ``passed`` 1.0 when all are.
    The verdict: all tests pass, wherever the program stood.
    """

    components: ClassVar[tuple[str, ...]] = ("format", "tests", "passed")
    largest: ClassVar[Mapping[str, float]] = {"format": 0.25, "tests": 0.75, "passed": 1.0}
    time_limit_s: ClassVar[float] = LIMITS.seconds + 3.0
    memory_limit_mb: ClassVar[int] = LIMITS.most_memory_mb

    def prepare(self) -> None:
        """Starts the sandbox, so that no verdict waits for it. Raises ConfigError where there is none."""
        run_program(Job("pass"), LIMITS)

    def wanted(self, fields: dict[str, Any]) -> tuple[str, ...]:
        """The names that the program has to define."""
        raise NotImplementedError

    def job(self, fields: dict[str, Any], code: Code) -> Job:
        """The program and its tests, for the sandbox."""
        raise NotImplementedError

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        """Runs the program: up to ``time_limit_s``. Raises ConfigError where there is no sandbox to run it in: a
        completion must not count as wrong because the machine is."""
        self.validate_fields(fields)
        code = code_in(completion, self.wanted(fields))
        if not code.text.strip():
            return Grade(False, dict.fromkeys(self.components, 0.0), "there is no program")
        outcome = run_program(self.job(fields, code), LIMITS)
        passed = outcome.status == "passed"
        share = sum(result is None for result in outcome.tests) / max(1, len(outcome.tests))
        components = {
            "format": 0.25 * (code.place == "fence" and outcome.compiled),
            "tests": 0.75 * share,
            "passed": 1.0 * passed,
        }
        return Grade(passed, components, None if passed else f"{outcome.status}: {outcome.error}")

    def layout(self, fields: dict[str, Any], completion: str, *, correct: bool) -> Layout | None:
        """The program; nothing where it was put together of several parts."""
        place = place_of(code_in(completion, self.wanted(fields)).text.strip("\n"), completion)
        return None if place is None else Layout("code", (Cell("", "right" if correct else "wrong", *place),))


def text_field(fields: dict[str, Any], *names: str) -> str:
    """The field of the first of these names that there is. Raises DataError unless it is text, of at most ``MAX_FIELD``
    characters."""
    value = next((fields[name] for name in names if name in fields), None)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{names[0]} must be text, not {shorten(value)}")
    require_bounded(names[0], value)
    return value


def texts_field(fields: dict[str, Any], *names: str) -> Sequence[str]:
    """The same for a list of texts; empty when there is none of these fields."""
    value = next((fields[name] for name in names if name in fields), ())
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{names[0]} must be a list of texts, not {shorten(value)}")
    require_bounded(names[0], *value)
    return value


def require_bounded(name: str, *texts: str) -> None:
    """Raises DataError when a field has more than ``MAX_FIELD`` characters, its texts joined by line ends."""
    size = sum(map(len, texts)) + max(0, len(texts) - 1)
    if size > MAX_FIELD:
        raise DataError(f"{name} has {size} characters, the most is {MAX_FIELD}; shorten or remove the problem")
