"""MBPP (arXiv 2108.07732): a function from one sentence and its three tests, which the prompt shows.

Splits by the published task_id: 601-974 are for training, 11-510 for testing; 1-10 (prompts) and 511-600 (validation)
belong to neither. Rows without a task_id are all taken. The full set and the sanitized one are read alike.
"""

import ast
import builtins
from collections.abc import Hashable, Mapping
from functools import lru_cache, partial
from typing import Any, ClassVar

from rewards.cells import listed, whole
from rewards.errors import DataError
from rewards.parsing import shorten
from rewards.sandbox.runner import Job
from rewards.task import Problem, Split
from rewards.tasks.code import UNPARSABLE, Code, CodeTask, require_bounded, text_field, texts_field
from rewards.tasks.hub import problems_from_source

_LISTS = ("tests", "test_list", "imports", "test_imports")

TASK_IDS: Mapping[Split, range] = {"train": range(601, 975), "test": range(11, 511)}


class Mbpp(CodeTask):
    """Fields: ``text``, ``tests`` (a list of assert statements) and, optional, ``setup`` (run after the program),
    ``imports`` (of the tests), ``task_id``. The names of the published files are understood too (``prompt``,
    ``test_list``, ``test_setup_code``, ``test_imports``). The prompt's wording is the MBPP paper's but for the last
    sentence, which is ours."""

    name: ClassVar[str] = "mbpp"
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:google-research-datasets/mbpp:full:train",
        "test": "hub:google-research-datasets/mbpp:full:test",
    }

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        source = self.source(split, path)
        assert source is not None
        convert = partial(self._fields_from_row, split)
        return problems_from_source(source, task=self.name, size=size, convert=convert)

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        tests = "\n".join(texts_field(fields, "tests", "test_list"))
        content = (
            f"You are an expert Python programmer, and here is your task: {text_field(fields, 'text', 'prompt')} "
            f"Your code should pass these tests:\n\n{tests}\n\nPut the whole program into one ```python block."
        )
        return [{"role": "user", "content": content}]

    def job(self, fields: dict[str, Any], code: Code) -> Job:
        tests = tuple(texts_field(fields, "tests", "test_list"))
        imports = "\n".join(texts_field(fields, "imports", "test_imports"))
        setup = f"{imports}\n{_setup(fields)}"
        return Job(code.text, tests, {name: name for name in self.wanted(fields)}, setup, imports)

    def wanted(self, fields: dict[str, Any]) -> tuple[str, ...]:
        tests = tuple(texts_field(fields, "tests", "test_list"))
        return _names(tests, "\n".join(texts_field(fields, "imports", "test_imports")))

    def validate_fields(self, fields: dict[str, Any]) -> None:
        text_field(fields, "text", "prompt")
        tests = texts_field(fields, "tests", "test_list")
        if not tests:
            raise DataError("tests must hold at least one assert statement")
        _setup(fields)
        self.wanted(fields)

    def leak_key(self, fields: dict[str, Any]) -> Hashable:
        return fields.get("task_id", tuple(texts_field(fields, "tests", "test_list")))

    def _fields_from_row(self, split: Split, row: dict[str, Any]) -> dict[str, Any] | None:
        row = {name: listed(value) if name in _LISTS else value for name, value in row.items()}
        self.validate_fields(row)
        fields: dict[str, Any] = {
            "text": text_field(row, "text", "prompt"),
            "tests": list(texts_field(row, "tests", "test_list")),
            "setup": _setup(row),
            "imports": list(texts_field(row, "imports", "test_imports")),
        }
        if (task_id := whole(row.get("task_id"))) is not None:
            if type(task_id) is not int:
                raise DataError(f"task_id must be an integer, not {shorten(task_id)}")
            if task_id not in TASK_IDS[split]:
                return None
            fields["task_id"] = task_id
        return fields


def _setup(fields: dict[str, Any]) -> str:
    setup = fields.get("setup", fields.get("test_setup_code", ""))
    if not isinstance(setup, str):
        raise DataError(f"setup must be text, not {shorten(setup)}")
    require_bounded("setup", setup)
    return setup


@lru_cache(maxsize=4096)
def _names(tests: tuple[str, ...], imports: str) -> tuple[str, ...]:
    """The names in the tests that the program has to define. Raises DataError when the tests are not Python."""
    try:
        nodes = [node for text in (*tests, imports) for node in ast.walk(ast.parse(text))]
    except UNPARSABLE as error:
        raise DataError(f"a test or an import is not Python ({error}): {shorten(tests)}") from None
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    used = {node.id for node in nodes if isinstance(node, ast.Name)} - bound
    wanted = {name for name in used if not hasattr(builtins, name)}
    if not wanted:  # one problem asks for a function called sum
        wanted = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    if not wanted:
        raise DataError(f"the tests call no function: {shorten(tests)}")
    return tuple(sorted(wanted))
