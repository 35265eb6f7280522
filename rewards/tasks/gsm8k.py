r"""GSM8K: grade-school word problems whose answer is a number. The same task for the usual test set and Platinum's.

Reward components (AGRPO's table, 4.0 in all): ``think_tag`` 0.5 for a complete ``<think>`` block, ``answer_tag`` 0.5
for a complete ``<answer>`` block, ``correct`` 3.0 when the verdict is right. Only the table is AGRPO's: the verdict is
that of ``rewards.maths.answers`` (the last box of the submission, "#### 42", "The answer is 42.") and
``rewards.maths.equivalence`` (exact numbers with units, currency, percent signs); no published parser's mistake is in
it.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from rewards.cells import as_text
from rewards.errors import DataError
from rewards.layout import Layout, answer_line
from rewards.maths.answers import FinalAnswer, final_answer
from rewards.maths.equivalence import equivalent
from rewards.parsing import MAX_CHARACTERS, has_thinking, shorten
from rewards.task import Grade, Split
from rewards.tasks.hub import DataTask

SYSTEM_PROMPT = (
    "Solve the problem step by step. Put your reasoning inside <think> and </think>, then give the final answer inside "
    r"<answer> and </answer>, as \boxed{...} with nothing else in the box."
)

_GOLD = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,10})?")
_PUNCTUATION = str.maketrans("", "", "$,.;:!?'\"")


class WrittenMaths(DataTask):
    """What GSM8K and MATH share: fields QUESTION and ``answer``, prompt, components and verdict."""

    components: ClassVar[tuple[str, ...]] = ("think_tag", "answer_tag", "correct")
    largest: ClassVar[Mapping[str, float]] = {"think_tag": 0.5, "answer_tag": 0.5, "correct": 3.0}

    QUESTION: ClassVar[str]
    """The field that holds the problem's text."""
    SYMBOLIC: ClassVar[bool]
    """Whether answers may need ``rewards.maths.symbolic``."""

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": fields[self.QUESTION].strip()},
        ]

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        answer = final_answer(completion)
        error = self.fault(fields, answer)
        components = {
            "think_tag": 0.5 * has_thinking(completion[-MAX_CHARACTERS:]),
            "answer_tag": 0.5 * answer.tagged,
            "correct": 3.0 * (error is None),
        }
        return Grade(error is None, components, error)

    def fault(self, fields: dict[str, Any], answer: FinalAnswer) -> str | None:
        """Why the answer is not right; None when it is."""
        if not answer.candidates:
            return "there is no answer"
        faults = [self._fault(fields, candidate) for candidate in answer.candidates]
        if None in faults or (answer.boxes and all(self._fault(fields, box) is None for box in answer.boxes)):
            return None
        return faults[0]

    def _fault(self, fields: dict[str, Any], candidate: str) -> str | None:
        gold = fields["answer"]
        verdict = equivalent(gold, candidate, by_symbols=self.SYMBOLIC)
        if verdict.correct:
            return self.refusal(fields, candidate) if verdict.how != "text" else None
        reason = {"timeout": "the symbolic comparison was stopped", "failed": "the symbolic comparison failed"}
        return f"the answer {shorten(candidate)} is not {shorten(gold)} ({reason.get(verdict.how, verdict.how)})"

    def refusal(self, fields: dict[str, Any], candidate: str) -> str | None:
        """Why an answer of the right value, in another spelling than the gold's, is not accepted; None when it is."""
        return None

    def expected(self, fields: dict[str, Any]) -> str:
        return str(fields["answer"])

    def layout(self, fields: dict[str, Any], completion: str, *, correct: bool) -> Layout | None:
        """The final answer, where the completion has it as it is read."""
        candidates = final_answer(completion).candidates
        return answer_line(candidates[0], completion, correct=correct) if candidates else None

    def leak_key(self, fields: dict[str, Any]) -> str:
        """The problem's text without case, spaces and punctuation. Operators stay: z^4-z^2 and z^4+z^2 are two, one in
        MATH's training set and one in MATH-500."""
        text = "".join(fields[self.QUESTION].casefold().split())
        return text.translate(_PUNCTUATION)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        answer = fields.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f"answer must be the gold answer as text, not {shorten(answer)}")

    def validate_problem(self, fields: dict[str, Any]) -> None:
        """``validate_fields`` and that there is a problem to ask; grading alone needs only the answer."""
        question = fields.get(self.QUESTION)
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{self.QUESTION} must be the problem as text, not {shorten(question)}")
        self.validate_fields(fields)


class Gsm8k(WrittenMaths):
    """Fields: ``question`` and ``answer``, the gold number as text without commas (``-10``, ``3.5``)."""

    name: ClassVar[str] = "gsm8k"
    QUESTION: ClassVar[str] = "question"
    SYMBOLIC: ClassVar[bool] = False
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:openai/gsm8k:main:train",
        "test": "hub:openai/gsm8k:main:test",
    }

    def validate_fields(self, fields: dict[str, Any]) -> None:
        super().validate_fields(fields)
        if not _GOLD.fullmatch(fields["answer"]):
            raise DataError(f"answer must be a number in digits without commas, not {shorten(fields['answer'])}")

    def fields_from_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The task's fields from a row of the published files: the gold number follows the last ``####``."""
        answer = as_text(row.get("answer"))
        if isinstance(answer, str):
            answer = answer.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
        fields = {"question": row.get("question"), "answer": answer}
        self.validate_problem(fields)
        return fields
