"""HumanEval (arXiv 2107.03374): complete a function from its head and docstring. A test set only."""

import ast
import re
import textwrap
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from rewards.errors import ConfigError, DataError, first_line
from rewards.parsing import shorten
from rewards.sandbox.runner import Job
from rewards.task import Problem, Split
from rewards.tasks.code import UNPARSABLE, Code, CodeTask, text_field
from rewards.tasks.hub import problems_from_source


class HumanEval(CodeTask):
    """Fields: ``prompt``, ``entry_point``, ``test`` (defines ``check(candidate)``), as in the published file.

    A program that defines the entry point runs after the prompt, whose imports and helpers it may use; any other is
    taken for the function's body and continues the prompt. Each assertion of ``check`` counts as one test, with the
    statements it needs; a loop with assertions is one. The prompt's wording is ours: the published prompt is the bare
    function head, for models that continue a text.
    """

    name: ClassVar[str] = "humaneval"
    default_sources: ClassVar[Mapping[Split, str]] = {"test": "hub:openai/openai_humaneval:test"}

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        source = self.source(split, path)
        if source is None:
            raise ConfigError("humaneval has no training problems; train on another task, or set task.train_path")
        return problems_from_source(source, task=self.name, size=size, convert=self._fields_from_row)

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        content = (
            f"Complete this Python function.\n\n```python\n{fields['prompt'].strip()}\n```\n\n"
            "Put the whole function into one ```python block."
        )
        return [{"role": "user", "content": content}]

    def job(self, fields: dict[str, Any], code: Code) -> Job:
        declared = _declared(fields["prompt"])
        tests = _tests(fields["test"])
        program = _program(fields["prompt"], declared, fields["entry_point"], code)
        # Some tests call the function by its own name too.
        names = dict.fromkeys(("candidate", fields["entry_point"]), fields["entry_point"])
        return Job(program, tests, names, preamble=declared)

    def wanted(self, fields: dict[str, Any]) -> tuple[str, ...]:
        return (fields["entry_point"],)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        for name in ("prompt", "entry_point", "test"):
            text_field(fields, name)
        if not fields["entry_point"].isidentifier():
            raise DataError(f"entry_point must be a function's name, not {shorten(fields['entry_point'])}")
        _declared(fields["prompt"])
        _tests(fields["test"])

    def leak_key(self, fields: dict[str, Any]) -> Hashable:
        return fields["prompt"]

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any]:
        self.validate_fields(row)
        return {name: row[name] for name in ("prompt", "entry_point", "test")}


def _program(prompt: str, declared: str, entry_point: str, code: Code) -> str:
    if re.search(rf"^(async )?def {re.escape(entry_point)}\b", code.text, re.MULTILINE):
        return code.text if "from __future__ import" in code.text else f"{declared}\n\n{code.text}"
    body = code.text.lstrip("\n")
    if code.place == "text":
        return prompt + _continuation(body)
    return prompt + textwrap.indent(textwrap.dedent(body), "    ")


def _continuation(text: str) -> str:
    """A body up to the first line that is not indented any more. The indentation of its first line may be missing:
    it is often part of the prompt's last token."""
    first, *rest = text.split("\n")
    kept = [first if first[:1].isspace() else f"    {first}"]
    for line in rest:
        if line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return "\n".join(kept) + "\n"


@lru_cache(maxsize=1024)
def _declared(prompt: str) -> str:
    """The prompt as a whole program: a function head without even a docstring gets a body. Raises DataError."""
    for text in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        if _parsed(text) is not None:
            return text
    raise DataError(f"prompt must be the beginning of a Python function, not {shorten(prompt)}")


@lru_cache(maxsize=1024)
def _tests(test: str) -> tuple[str, ...]:
    """The body of ``check(candidate)`` in pieces that end with an assertion each, what stands before it in the first.
    Raises DataError."""
    module = _parsed(test)
    checks = [node for node in module.body if isinstance(node, ast.FunctionDef)] if module else []
    if module is None or [node.name for node in checks] != ["check"] or len(checks[0].args.args) != 1:
        raise DataError(f"test must be Python that defines check(candidate), not {shorten(test)}")
    parameter = checks[0].args.args[0].arg
    pieces: list[str] = []
    waiting = [_written(node) for node in module.body if node is not checks[0]]
    if parameter != "candidate":
        waiting.append(f"{parameter} = candidate")
    for node in checks[0].body:
        waiting.append(_written(node))
        if any(isinstance(inner, ast.Assert) for inner in ast.walk(node)):
            pieces.append("\n".join(waiting))
            waiting = []
    if not pieces:
        raise DataError(f"check(candidate) holds no assertion: {shorten(test)}")
    return tuple(pieces)


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except UNPARSABLE:
        return None


def _written(node: ast.stmt) -> str:
    """The node's text again. Raises DataError: what can be read can be nested too deeply for this."""
    try:
        return ast.unparse(node)
    except UNPARSABLE as error:
        reason = first_line(error)[:200]
        raise DataError(f"test can't be taken apart, line {node.lineno} of it is not plain enough: {reason}") from None
