r"""MATH (Hendrycks et al.): competition problems whose answer is LaTeX. The same task for MATH-500.

Reward components and prompt are GSM8K's (``rewards.tasks.gsm8k``), the verdict's rules are in
``rewards.maths.equivalence``. One rule more: an answer that only repeats an expression of the problem does not solve
it. ``\frac{6!}{3!}`` is refused where the problem asks for its value, although it equals the gold 120; other
unevaluated expressions are accepted.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from rewards.cells import as_text
from rewards.errors import DataError
from rewards.maths import symbolic
from rewards.maths.latex import key, tokenize
from rewards.parsing import boxes, shorten
from rewards.task import Split
from rewards.tasks.gsm8k import WrittenMaths

_LEVEL = re.compile(r"(?:Level )?([1-5?])")
_OPERATION = re.compile(r"[-+*/^!=]|\\[a-z]+|[0-9a-z)}][({a-z]")
_LONGEST_PROBLEM = 20_000


class Math(WrittenMaths):
    """Fields: ``problem`` and ``answer``; of a file also ``level`` (1 to 5, None where the source has "Level ?") and
    ``subject``, which grading does not need."""

    name: ClassVar[str] = "math"
    QUESTION: ClassVar[str] = "problem"
    SYMBOLIC: ClassVar[bool] = True
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:DigitalLearningGmbH/MATH-lighteval:default:train",
        "test": "hub:HuggingFaceH4/MATH-500:test",
    }

    def prepare(self) -> None:
        symbolic.start()

    def refusal(self, fields: dict[str, Any], candidate: str) -> str | None:
        problem = fields.get(self.QUESTION)
        answer = key(tokenize(candidate))
        if not isinstance(problem, str) or not _OPERATION.search(answer.lstrip("-")):
            return None
        if answer in key(tokenize(problem[:_LONGEST_PROBLEM])):
            return f"the answer {shorten(candidate)} repeats the problem instead of solving it"
        return None

    def fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The task's fields from a row of the published files; without ``answer`` it is the last box of ``solution``.
        A row without either has no gold answer and is passed over."""
        answer, solution = as_text(row.get("answer")), row.get("solution")
        if answer is None and isinstance(solution, str) and (found := [b for b in boxes(solution) if b.closed]):
            answer = solution[found[-1].start : found[-1].end]
        if isinstance(answer, str) and not answer.strip():
            return None
        fields = {
            "problem": row.get("problem"),
            "answer": answer,
            "level": _level(row.get("level")),
            "subject": row.get("subject", row.get("type")),
        }
        self.validate_problem(fields)
        return fields


def _level(value: Any) -> int | None:
    match = _LEVEL.fullmatch(str(value)) if value is not None else None
    if value is not None and match is None:
        raise DataError(f"level must be 1 to 5, 'Level 3' or 'Level ?', not {shorten(value)}")
    return None if match is None or match[1] == "?" else int(match[1])
