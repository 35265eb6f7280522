r"""AGRPO's protocols (arXiv 2510.04019, github.com/probablyabot/agrpo, commit 98f1182): prompts, rewards, verdicts.

A system message with the format (``<think>``, ``<answer>``) and a user message with the problem, the same in training
and in evaluation. Both parse a completion in one way: the inside of the first ``<answer>`` block (tags in any case), or
all of the text without one; then the inside of the first ``\boxed{}`` of that, unless it is empty or never closed.
Answers are compared by math-verify as published (``rewards.protocols.math_verify_raw``), not by our own
``rewards.maths.equivalence``: math-verify rounds to six digits (0.333333 is 1/3) and passes over words around a number.

Mistakes of all four tasks: the *first* answer block counts, so a draft inside the thinking is graded; text without any
tag is graded as an answer; the first box decides even when it is not closed.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from rewards.errors import DataError
from rewards.maths import symbolic
from rewards.protocols.math_verify_raw import finding, verified
from rewards.protocols.sudoku_examples import EXAMPLES
from rewards.protocols.texts import first_block, matching_brace, read
from rewards.task import Grade, Problem, Split, Task
from rewards.tasks.countdown import Countdown
from rewards.tasks.gsm8k import Gsm8k
from rewards.tasks.hub import problems_from_source
from rewards.tasks.math import Math
from rewards.tasks.sudoku import CELLS, Sudoku

HARDEST_LEVEL = 4
"""MATH problems above this level are not trained on."""

_MATH_SYSTEM = r"""You will be given a math problem.
Think through the problem step by step, enclosing your reasoning process in <think> tags.
Provide your final answer in <answer> tags, with only the number or expression enclosed in \boxed{}, as follows:
<think>
...
</think>
<answer>
\boxed{...}
</answer>
"""

_COUNTDOWN_SYSTEM = (
    "You will be given a target number and a list of numbers. Create a mathematical expression using each number "
    "exactly once and the operations +, -, *, / (with parentheses allowed) to reach the target.\n"
    "Think through different combinations systematically, exploring which operations might work. Enclose your "
    "reasoning process in <think> tags.\n"
    "Format your response as:\n<think>\nreasoning process here\n</think>\n<answer>\nfinal expression = target\n"
    "</answer>\n"
    "For example, if the target is 67 and the numbers are [17, 18, 5], a valid answer is:\n"
    "<answer>\n17 * 5 - 18 = 67\n</answer>\n"
)

_SUDOKU_SYSTEM = (
    "You will be given a 4x4 Sudoku puzzle, provided as a 16-character string from left to right, top to bottom, with "
    "0s representing empty cells.\n"
    "Fill in the empty cells with the correct digits 1-4 such that each row, column, and 2x2 subgrid contains each "
    "digit exactly once.\n"
    "Think through the puzzle step by step, enclosing your reasoning process in <think> tags.\n"
    "Your final answer should be a complete 16-character string with only the digits 1-4 representing the filled-in "
    "grid.\n"
    "Format your response as:\n<think>\nreasoning process here\n</think>\n<answer>\n"
    "[16-character string with no spaces]\n</answer>\n\n"
    + "\n".join(
        f"Puzzle: {puzzle}\n\n<think>\n{reasoning}\n</think>\n<answer>\n{solution}\n</answer>\n"
        for puzzle, reasoning, solution in EXAMPLES
    )
)


class _AsksMathVerify(Task):
    def prepare(self) -> None:
        symbolic.start()


class Gsm8kAgrpo(_AsksMathVerify, Gsm8k):
    r"""GSM8K as AGRPO has it. Evaluated on GSM8K-Platinum, which is the default test set here.

    Reward: ``thinking`` 0.5 for a think block, ``answer`` 0.5 for an answer block, ``correctness`` 3.0 when math-verify
    takes the parsed answer for the gold one. Verdict: the *first run of digits* of the parsed answer against the gold.

    Known mistakes of the verdict: "1,234" is read as 1, "-5" as 5 and "3.50" as 3; "2 + 3 = 5" as 2. So it can be
    false where ``correctness`` is 3.0, and an untagged text is judged by the first number in it.
    """

    name: ClassVar[str] = "gsm8k_agrpo"
    components: ClassVar[tuple[str, ...]] = ("thinking", "answer", "correctness")
    largest: ClassVar[Mapping[str, float]] = {"thinking": 0.5, "answer": 0.5, "correctness": 3.0}
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:openai/gsm8k:main:train",
        "test": "hub:madrylab/gsm8k-platinum:main:test",
    }

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return _chat(_MATH_SYSTEM, fields["question"])

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, gold = read(completion), fields["answer"]
        parsed = _parsed_answer(text)
        digits = re.search(r"\d+", parsed)
        first = digits.group() if digits else parsed
        correct = verified(f"${gold}$", f"${first}$")
        error = None if correct else f"the first number of the answer, {first[:40]!r}, is not {gold}"
        return Grade(correct, _math_components(text, parsed, gold), error)


class MathAgrpo(_AsksMathVerify, Math):
    r"""MATH as AGRPO has it: trained on levels 1 to 4 without MATH-500, tested on MATH-500.

    Reward: that of ``gsm8k_agrpo``. Verdict: math-verify on the parsed answer. The gold answer of a training problem is
    the *first* box of its solution (``math`` takes the last); that of a row without a solution its ``answer``.

    Known mistakes: those of the parser above. Rows of level 5 or of no known level are passed over in the train split.
    """

    name: ClassVar[str] = "math_agrpo"
    components: ClassVar[tuple[str, ...]] = ("thinking", "answer", "correctness")
    largest: ClassVar[Mapping[str, float]] = {"thinking": 0.5, "answer": 0.5, "correctness": 3.0}
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:qwedsacf/competition_math:train",
        "test": "hub:HuggingFaceH4/MATH-500:test",
    }

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        source = self.source(split, path)
        assert source is not None
        convert = self._training_fields if split == "train" else self.fields_from_row
        return problems_from_source(source, task=self.name, size=size, convert=convert)

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return _chat(_MATH_SYSTEM, fields["problem"])

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, gold = read(completion), fields["answer"]
        parsed = _parsed_answer(text)
        components = _math_components(text, parsed, gold)
        correct = components["correctness"] > 0
        return Grade(correct, components, None if correct else f"the answer {parsed[:40]!r} is not {gold[:40]!r}")

    def _training_fields(self, row: dict[str, Any]) -> dict[str, Any] | None:
        fields = self.fields_from_row(row)
        if fields is None or fields["level"] is None or fields["level"] > HARDEST_LEVEL:
            return None
        gold = _first_box(row["solution"]) if isinstance(row.get("solution"), str) else fields["answer"]
        return fields | {"answer": gold} if gold else None


class CountdownAgrpo(_AsksMathVerify, Countdown):
    r"""Countdown as AGRPO has it; three numbers a problem.

    Reward: ``format`` (needs an answer block and a ``=`` in it): 1/3 for a right side that is the target in digits, 1/3
    for a left side of digits, spaces and ``+ - * / ( )``, 1/3 when the integers in it are the given ones, -0.5 when
    there are several ``=``; ``correctness`` 3.0 when the text before the first ``=`` has the given numbers and
    math-verify takes its value for the target. Verdict: the same test on the last line of the parsed answer that has
    something before a ``=``.

    Known mistakes: the right side of the equation is ignored ("2*3=7" is right for 6); an expression without ``=`` is
    wrong; the left side may hold anything that math-verify reads over; ``\times`` and the like depend on it as well.
    """

    name: ClassVar[str] = "countdown_agrpo"
    components: ClassVar[tuple[str, ...]] = ("format", "correctness")
    largest: ClassVar[Mapping[str, float]] = {"format": 1.0, "correctness": 3.0}

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return _chat(_COUNTDOWN_SYSTEM, f"Target: {fields['target']}\nNumbers: {list(fields['numbers'])}")

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, numbers, target = read(completion), sorted(fields["numbers"]), fields["target"]
        block = first_block(text, "answer", ignore_case=True)
        lines = [line.lstrip("=") for line in _parsed_answer(text).split("\n")]
        equation = next((line for line in reversed(lines) if "=" in line), "")
        verdict = _reaches(equation, numbers, target)
        # One question that overruns its limits is enough: a verdict has a second.
        trained = "different" if block is None or verdict == "timeout" else _reaches(block, numbers, target)
        components = {
            "format": 0.0 if block is None else _countdown_format(block, numbers, target),
            "correctness": 3.0 * (trained == "equal"),
        }
        correct = verdict == "equal"
        error = None if correct else f"the left side of {equation[:60]!r} does not use the numbers or is not {target}"
        return Grade(correct, components, error)


class SudokuAgrpo(Sudoku):
    """4x4 Sudoku as AGRPO has it: SPG's new split, three worked examples in the system prompt.

    Reward: ``format`` (needs an answer block of 16 characters) 0.25, 0.25 more for four of each digit, 0.5 for every
    clue kept; ``correctness`` 3.0 times the share of originally empty cells that agree with the stored solution. The
    published score is the mean of that share over puzzles (``correctness`` / 3), not the puzzles solved; ``correct``
    here says that all of those cells are right.

    Known mistakes: a short answer is filled with zeros on the *left*, so "1234" counts for the last row; more than 16
    characters are cut; text without a tag scores by its first 16 characters; clue cells are not looked at, an answer
    that overwrites them all can be right; a second valid solution is wrong. A puzzle without an empty cell divides by
    zero there and scores 0 here.

    Rows of a file whose flag ``solution_in_spg_test`` is 1 are passed over, as their grids are SPG's test grids.
    """

    name: ClassVar[str] = "sudoku_agrpo"
    components: ClassVar[tuple[str, ...]] = ("format", "correctness")
    largest: ClassVar[Mapping[str, float]] = {"format": 1.0, "correctness": 3.0}

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return _chat(_SUDOKU_SYSTEM, f"Puzzle: {fields['puzzle']}")

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, puzzle, solution = read(completion), fields["puzzle"], fields["solution"]
        block = first_block(text, "answer", ignore_case=True)
        written = _parsed_answer(text).zfill(CELLS)[:CELLS]
        empty = [cell for cell, clue in enumerate(puzzle) if clue == "0"]
        matches = sum(written[cell] == solution[cell] for cell in empty)
        components = {
            "format": 0.0 if block is None else _sudoku_format(block, puzzle),
            "correctness": 3.0 * matches / len(empty) if empty else 0.0,
        }
        correct = 0 < len(empty) == matches
        error = None if correct else f"{matches} of {len(empty)} empty cells of {written!r} are right"
        return Grade(correct, components, error)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        require_solution(fields)
        super().validate_fields(fields)

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return None if in_spg_test(row) else super()._fields_from_row(row)


def require_solution(fields: dict[str, Any]) -> None:
    """DataError without a stored solution, which the published Sudoku graders compare with."""
    if fields.get("solution") is None:
        raise DataError("solution is missing; the published graders compare with it, so store one beside the puzzle")


def in_spg_test(row: dict[str, Any]) -> bool:
    """Whether a row of the Sudoku training file is flagged: its solution is one of SPG's test grids."""
    return str(row.get("solution_in_spg_test", "0")) == "1"


def _chat(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _parsed_answer(text: str) -> str:
    block = first_block(text, "answer", ignore_case=True)
    answer = text if block is None else block
    return _first_box(answer) or answer


def _first_box(text: str) -> str | None:
    start = text.find("\\boxed{")
    end = matching_brace(text, start) if start >= 0 else None
    return text[start + len("\\boxed{") : end] if end is not None else None


def _math_components(text: str, parsed: str, gold: str) -> dict[str, float]:
    return {
        "thinking": 0.5 * (first_block(text, "think", ignore_case=True) is not None),
        "answer": 0.5 * (first_block(text, "answer", ignore_case=True) is not None),
        "correctness": 3.0 * verified(f"${gold}$", f"${parsed}$"),
    }


def _countdown_format(block: str, numbers: list[int], target: int) -> float:
    if "=" not in block:
        return 0.0
    left, *_, right = (side.strip() for side in block.split("="))
    reward = -0.5 if block.count("=") > 1 else 0.0
    reward += (_integers(right) == [target] and re.fullmatch(r"\d+", right) is not None) / 3
    reward += (re.fullmatch(r"[\d\s+\-*/()]+", left) is not None) / 3
    reward += (_integers(left) == numbers) / 3
    return reward


def _reaches(equation: str, numbers: list[int], target: int) -> symbolic.Finding:
    """Whether math-verify takes the text before the first ``=`` for the target, and its integers are the numbers."""
    left, equals, _ = equation.partition("=")
    return finding(str(target), left) if equals and _integers(left) == numbers else "different"


def _integers(text: str) -> list[int] | None:
    """The integers in a text, sorted; None where one is too long for Python to read."""
    try:
        return sorted(map(int, re.findall(r"\d+", text)))
    except ValueError:
        return None


def _sudoku_format(block: str, puzzle: str) -> float:
    if len(block) != CELLS:
        return 0.0
    permutation = sorted(block) == sorted("1234" * 4)
    clues = all(clue in ("0", digit) for clue, digit in zip(puzzle, block, strict=True))
    return 0.25 + 0.25 * permutation + 0.5 * clues
