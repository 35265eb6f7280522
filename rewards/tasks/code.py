r"""Finds the program in a completion, and what the code tasks share. Every function is total and linear in its text.

The program is, in this order of preference, and after closed ``<think>`` blocks were taken out:

1. the last complete fenced block marked as Python (```` ```python ````, ``py``, ``python3``),
2. the last complete fenced block of another or no language,
3. the inside of the last complete ``<answer>`` tag,
4. what follows an opening fence that is never closed (the model stopped, or ran out of tokens),
5. the text itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rewards.errors import DataError
from rewards.parsing import last_answer, shorten, without_thinking
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

LIMITS = Limits(cpu_seconds=4, seconds=15.0)
"""For one program with all its tests; the slowest reference solution takes 2.2 s of CPU time. (The published HumanEval
harness allows 3 s of wall-clock time, by which a busy machine changes verdicts; here that ends only what waits.)"""

_MARK = re.compile(r"```([A-Za-z0-9_+.-]*)")
_PYTHON = ("python", "py", "python3")


@dataclass(frozen=True)
class Code:
    """A program's text and where it stood: in a complete fence, an answer tag, an unclosed fence, or nowhere."""

    text: str
    place: Literal["fence", "answer", "open fence", "text"]


def code_in(completion: str) -> Code:
    """The program that a completion submits."""
    text = completion[-MAX_CHARACTERS:].replace("\r\n", "\n")
    thinks_first = text.lstrip()[: len("<think>")].lower() == "<think>"
    text = without_thinking(text)
    if thinks_first and text.startswith(" "):  # what stands for the thinking; a function's body is indented
        text = text[1:]
    fences, unclosed = _fences(text)
    for block in reversed(fences):
        if block[0] in _PYTHON:
            return Code(block[1], "fence")
    if fences:
        return Code(fences[-1][1], "fence")
    answer = last_answer(text)
    if answer is not None:
        return Code(answer.strip("\n"), "answer")
    return Code(text, "text") if unclosed is None else Code(unclosed, "open fence")


def _fences(text: str) -> tuple[list[tuple[str, str]], str | None]:
    """(language, inside) of every complete block, and what follows a fence that stays open. A fence that names Python
    always opens; inside a block any other closes it."""
    blocks: list[tuple[str, str]] = []
    opened: tuple[str, int] | None = None
    for mark in _MARK.finditer(text):
        language = mark.group(1).lower()
        if opened is None or language in _PYTHON:
            opened = language, mark.end()
        else:
            blocks.append((opened[0], _inside(text[opened[1] : mark.start()])))
            opened = None
    return blocks, None if opened is None else _inside(text[opened[1] :])


def _inside(text: str) -> str:
    """Without the rest of the line that the fence stands on, when that is blank."""
    first, newline, rest = text.partition("\n")
    return rest if newline and not first.strip() else text


class CodeTask(Task):
    """A task whose answer is a program, decided by its tests in the sandbox.

    Reward components, 2.0 in all: ``format`` 0.25 for a program in a complete fenced block that is Python (it compiles;
    that too is tried in the sandbox), ``tests`` 0.75 times the share of the tests passed, ``passed`` 1.0 when all are.
    The verdict: all tests pass, wherever the program stood.
    """

    components: ClassVar[tuple[str, ...]] = ("format", "tests", "passed")
    time_limit_s: ClassVar[float] = LIMITS.seconds + 3.0
    memory_limit_mb: ClassVar[int] = LIMITS.most_memory_mb

    def prepare(self) -> None:
        """Starts the sandbox, so that no verdict waits for it. Raises ConfigError where there is none."""
        run_program(Job("pass"), LIMITS)

    def job(self, fields: dict[str, Any], code: Code) -> Job:
        """The program and its tests, for the sandbox."""
        raise NotImplementedError

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        """Runs the program: up to ``time_limit_s``. Raises ConfigError where there is no sandbox to run it in: a
        completion must not count as wrong because the machine is."""
        self.validate_fields(fields)
        code = code_in(completion)
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
