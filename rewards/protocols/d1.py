r"""d1's protocols (diffu-GRPO, github.com/dllm-reasoning/d1, commit 837888f): prompts, rewards, verdicts.

One user message: the format (``<reasoning>``, ``<answer>``) and the problem. Evaluation words it differently, asks for
a ``\boxed{}`` inside the answer tag (the training prompts of GSM8K and Countdown do not), and starts the completion
with ``<reasoning>``. Problems of the test split carry ``evaluation: true`` in their fields and get that prompt; a last
message of the assistant is the start of the completion.

Not repeated: the cut of every training prompt to its last 200 tokens, which takes the format instructions off long
questions; the last 500 rows of the shuffled Countdown and Sudoku data that are never trained on; the draw of 256 of
the 500 Sudoku test puzzles. SPG (``rewards.protocols.spg``) shares these graders with a few changes.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from rewards.protocols.agrpo import require_solution
from rewards.protocols.math_strings import last_box, same_answer
from rewards.protocols.python_value import python_value
from rewards.protocols.texts import boxes_to_a_brace, first_block, last_block, read
from rewards.task import Grade, Problem, Split, Task
from rewards.tasks.countdown import Countdown
from rewards.tasks.gsm8k import Gsm8k
from rewards.tasks.math import Math
from rewards.tasks.sudoku import CELLS, Sudoku

_FORMAT = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
_BOXED_FORMAT = (
    "Respond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
    "<answer>\n\\boxed{...}\n</answer>"
)
_MATH_EXPERT = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. Wrap the final answer in a "
    "\\boxed{}."
)
SUDOKU_SYSTEM = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading left-to-right, \
top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""

_NUMBER = re.compile(r"-?\d+\.?\d*")
# <reasoning>.*?</reasoning>\s*<answer>.*?</answer>, which tries every pair of inner tags, with the two that matter: the
# first on the line of the reasoning, and the one that a line end parts.
_SOFT_FORMAT = re.compile(
    r"<reasoning>(?:(?>.*?</reasoning>[^\S\n]*<answer>)|(?>.*</reasoning>)\s*<answer>).*?</answer>"
)


class TwoPrompts(Task):
    """Marks the problems of the test split for the evaluation prompt."""

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        problems = super().problems(split, seed=seed, size=size, path=path)  # type: ignore[safe-super]
        if split == "train":
            return problems
        return [replace(problem, fields=problem.fields | {"evaluation": True}) for problem in problems]


class Gsm8kD1(TwoPrompts, Gsm8k):
    r"""GSM8K as d1 has it.

    Reward, 4.0 at most: ``xml_count`` (``<reasoning>\n``, ``\n</reasoning>\n``, ``\n<answer>\n``, ``\n</answer>``
    occurring exactly once: 0.125 each, less 0.001 for every character after the closing answer tag, twice);
    ``soft_format`` 0.5, ``strict_format`` 0.5; ``integer`` 0.5 when the answer tag holds digits only; ``correctness``
    2.0 when it is exactly the gold text. Verdict: the first box that is not empty or dots, as a float or by the first
    number in it; without one, the first answer block, as a float or by the *last* number in it; equal as floats.

    Known mistakes of the reward: without ``\n</answer>\n`` the first penalty counts the *whole* text (about -1); the
    two format expressions don't let ``.`` cross a line, so they fire for reasoning of one line only, and the strict one
    wants a newline at the very end (a later commit repairs the first); a gold text of "1,234" asks for the comma, and
    ``integer`` then refuses it; "5.0", "$5" or a box are never right. Of the verdict: "1,234" in a box is 1; a box ends
    at its first closing brace, so a fraction is its numerator; two gold answers of the test set are negative, the
    parser reads no gold from them, and they count as wrong whatever the answer.
    """

    name: ClassVar[str] = "gsm8k_d1"
    components: ClassVar[tuple[str, ...]] = ("xml_count", "soft_format", "strict_format", "integer", "correctness")
    largest: ClassVar[Mapping[str, float]] = {
        "soft_format": 0.5,
        "strict_format": 0.5,
        "integer": 0.5,
        "correctness": 2.0,
    }

    PENALTY_SPLIT: ClassVar[str] = "\n</answer>\n"
    """``xml_count``'s first penalty counts what follows this text's last occurrence."""
    READS_UNTAGGED: ClassVar[bool] = False
    """Whether the verdict falls back on text without a complete answer block."""

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        if fields.get("evaluation"):
            return prefilled(f"{_MATH_EXPERT} \n{_BOXED_FORMAT}\n\n{fields['question']}")
        return _user(f"{_FORMAT}\n\n{fields['question']}")

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, gold_text = read(completion), fields.get("raw_answer", fields["answer"])
        answer = text.split("<answer>")[-1].split("</answer>")[0].strip()
        strict = re.match(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", text)
        components = {
            "xml_count": self._xml_count(text),
            "soft_format": 0.5 * bool(_SOFT_FORMAT.match(text)),
            "strict_format": 0.5 * bool(strict),
            "integer": 0.5 * answer.isdigit(),
            "correctness": 2.0 * (answer == gold_text),
        }
        gold = _gold_number(gold_text)
        number = self._number(text)
        correct = number is not None and number == gold
        error = None if correct else f"the published parsers read {number} where the gold answer is {gold}"
        return Grade(correct, components, error)

    def fields_from_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """``gsm8k``'s fields, and ``raw_answer``, the gold text as written ("1,234"), where that is another."""
        fields = super().fields_from_row(row)
        raw = str(row["answer"]).rpartition("####")[2].strip()
        return fields if raw == fields["answer"] else fields | {"raw_answer": raw}

    def _xml_count(self, text: str) -> float:
        count = 0.125 * (text.count("<reasoning>\n") == 1)
        count += 0.125 * (text.count("\n</reasoning>\n") == 1)
        if text.count("\n<answer>\n") == 1:
            count += 0.125
            count -= len(text.split(self.PENALTY_SPLIT)[-1]) * 0.001
        if text.count("\n</answer>") == 1:
            count += 0.125
            count -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
        return count

    def _number(self, text: str) -> float | None:
        for box in boxes_to_a_brace(text):
            content = box.strip()
            if content.strip(".") and (number := _float(content, 0)) is not None:
                return number
        number = _float(first_block(text, "answer") or "", -1)
        if number is None and self.READS_UNTAGGED:
            number = _float(text.split("<answer>")[-1].split("</answer>")[0].strip(), -1)
        return number


class MathD1(TwoPrompts, Math):
    r"""MATH as d1 has it; trained on the 12,000 problems beside MATH-500, tested on MATH-500.

    Reward: ``correctness`` 2.0 when the last box equals the gold answer as a cleaned string
    (``rewards.protocols.math_strings``), ``format`` 0.75 with an opening answer tag and 0.25 without. Verdict: the same
    comparison; an empty box or one never closed gives way to the first answer block.

    Known mistakes: ``format`` looks for a backspace and "oxed" instead of ``\boxed``, so its values 1.0 and 0.5 are out
    of reach; text without a box is compared as a whole, so an answer tag without a box is wrong; strings are compared,
    not values. The evaluation prompt has a stray quotation mark.
    """

    name: ClassVar[str] = "math_d1"
    components: ClassVar[tuple[str, ...]] = ("correctness", "format")
    largest: ClassVar[Mapping[str, float]] = {"correctness": 2.0, "format": 0.75}
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:ankner/math-500:train",
        "test": "hub:HuggingFaceH4/MATH-500:test",
    }

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        if fields.get("evaluation"):
            return prefilled(f'{_MATH_EXPERT}\n{_BOXED_FORMAT}" \n\n\n{fields["problem"]}')
        return _user(f"{_FORMAT}\n\n{_MATH_EXPERT} \n\n{fields['problem']}")

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, gold = read(completion), fields["answer"]
        box = last_box(text)
        inside = text.split("<answer>")[1].split("</answer>")[0] if "<answer>" in text else text
        components = {
            "correctness": 2.0 * same_answer(text if box is None else box, gold),
            "format": 0.5 * (("<answer>" in text) + (1.0 if "\boxed" in inside else 0.5)),  # the published slip
        }
        answer = box or first_block(text, "answer") or box
        correct = answer is not None and same_answer(answer, gold)
        return Grade(correct, components, None if correct else f"the answer {str(answer)[:60]!r} is not {gold[:60]!r}")


class CountdownD1(TwoPrompts, Countdown):
    r"""Countdown as d1 and SPG have it; three numbers a problem.

    Reward: ``score`` 1.0 when the last answer block is an expression with the given numbers and within 1e-5 of the
    target, 0.1 for *any* other closed answer block, 0 without. Verdict: the last box (of the whole text when there is
    none, see below), LaTeX operators replaced, cut to its left side where it reads ``expression=number``.

    Known mistakes: 0.1 for the tag alone, also with wrong numbers; ``eval`` decides, so ``**`` and ``//`` are operators
    and values are floats; an ``=`` in the training answer is worth 0.1 only; without a box the verdict looks at the
    *whole text* for its first ``expression=number`` and never at the answer tag (a tag counts only when a box is not
    closed); the number right of the ``=`` is ignored. A result that is no number stops the published evaluation, here
    it is wrong. Powers of more than 4096 bits and texts of more than 1000 characters count as failed (ours). The
    published training set is not filtered for test numbers; ours is, as ``countdown``'s.
    """

    name: ClassVar[str] = "countdown_d1"
    components: ClassVar[tuple[str, ...]] = ("score",)
    largest: ClassVar[Mapping[str, float]] = {"score": 1.0}

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        numbers, target = list(fields["numbers"]), fields["target"]
        if fields.get("evaluation"):
            return prefilled(
                "Using only the provided numbers, create an arithmetic expression that evaluates to exactly the "
                "provided target number. You may use the operations +, -, *, and / as needed, but each number must be "
                "used exactly once. Think step-by-step. After reasoning, provide only your final expression inside "
                "\\boxed{} tags without including an equals sign or the target number. For example: \\boxed{a + b * c}"
                f"{_BOXED_FORMAT}\n\nNumbers: {numbers}\nTarget: {target}"
            )
        return _user(
            f"{_FORMAT}\nUsing only the numbers {numbers}, create an arithmetic expression that evaluates to exactly "
            f"{target}. You must use all numbers from the list, and each number must be used exactly once. You may use "
            "the operations +, -, *, and / as needed. After reasoning, provide only your final expression inside "
            "<answer></answer> tags without including an equals sign or the target number. For example, if the numbers "
            "are [2, 3, 4] and the target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
        )

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, numbers, target = read(completion), sorted(fields["numbers"]), fields["target"]
        block = last_block(text, "answer")
        score = 0.0 if block is None else 1.0 if _hits(block, numbers, target) else 0.1
        answer = _countdown_answer(text)
        correct = _hits(answer, numbers, target)
        error = None if correct else f"{answer[:60]!r} does not use the numbers once each or is not {target}"
        return Grade(correct, {"score": score}, error)


class SudokuD1(TwoPrompts, Sudoku):
    """4x4 Sudoku as d1 has it, zero-shot; its test set has 500 puzzles.

    Reward: ``cells``, the share of originally empty cells that agree with the stored solution, from the digits of the
    last answer block, zeros added on the *right* to 16, cut to 16. Verdict: all empty cells right in what the five
    expressions of the evaluation script find (``evaluated_cells``). The published score is *micro*: right cells over
    empty cells of the whole test set, which ``evaluated_cells`` gives per puzzle.

    Known mistakes: clue cells are not looked at; 124 of the 500 test puzzles have several solutions and only the stored
    one counts; the training data shares solution grids with the test data (15,959 of the 20,000 rows in
    ``sudoku_4x4_train20k``), so only the puzzles themselves are kept apart here too (``leak_key``).
    """

    name: ClassVar[str] = "sudoku_d1"
    components: ClassVar[tuple[str, ...]] = ("cells",)
    largest: ClassVar[Mapping[str, float]] = {"cells": 1.0}

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        content = f"{SUDOKU_SYSTEM}\n\nSolve the following Sudoku puzzle: {fields['puzzle']}\n"
        return prefilled(content) if fields.get("evaluation") else _user(content)

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        text, puzzle, solution = read(completion), fields["puzzle"], fields["solution"]
        digits = "".join(filter(str.isdigit, last_block(text, "answer") or ""))
        right, empty = _right_cells(puzzle, solution, digits)
        cells = right / empty if empty else 0.0
        right, empty = evaluated_cells(puzzle, solution, text)
        correct = 0 < empty == right
        return Grade(correct, {"cells": cells}, None if correct else f"{right} of {empty} empty cells are right")

    def validate_fields(self, fields: dict[str, Any]) -> None:
        require_solution(fields)
        super().validate_fields(fields)

    def leak_key(self, fields: dict[str, Any]) -> str:
        """The puzzle; d1 lets solution grids occur on both sides."""
        return fields["puzzle"]


def evaluated_cells(puzzle: str, solution: str, completion: str) -> tuple[int, int]:
    """Right and all originally empty cells by d1's evaluation script: its score is their quotient over a test set.

    In turn: digits and spaces between code fences after the first answer tag; the first answer block; what follows its
    closing tag; 16 digits before a closing tag; 16 digits anywhere.
    """
    text = read(completion)
    return _right_cells(puzzle, solution, re.sub(r"\s", "", _sudoku_answer(text)))


def prefilled(content: str) -> list[dict[str, str]]:
    """The evaluation's prompt: a user message, and the start of the completion."""
    return [*_user(content), {"role": "assistant", "content": "<reasoning>"}]


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _gold_number(gold_text: str) -> float | None:
    """The published reading of the gold text; it knows no minus sign."""
    match = re.match(r"\$?([\d,]+(?:\.\d+)?)", gold_text)
    return _float(match.group(1).replace(",", ""), 0) if match else None


def _float(text: str, which: int) -> float | None:
    """The text as a float, else the number in it with that index; None without one."""
    try:
        return float(text)
    except ValueError:
        numbers = _NUMBER.findall(text)
        return float(numbers[which]) if numbers else None


def _countdown_answer(text: str) -> str:
    answer = last_box(text)
    if answer is None:
        block = first_block(text, "answer")
        answer = text if block is None else block
    answer = answer.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    for match in re.finditer(r"([0-9+\-*/() ]+)(=[0-9. ])?", answer):
        if match.group(2):
            return match.group(1).strip()
    return answer


def _hits(expression: str, numbers: list[int], target: int) -> bool:
    try:
        used = sorted(map(int, re.findall(r"\d+", expression)))
    except ValueError:  # too long for Python to read
        return False
    value = python_value(expression) if used == numbers else None
    return value is not None and abs(value - target) < 1e-5


def _sudoku_answer(text: str) -> str:
    start = text.find("<answer>")
    if start >= 0:
        inside = start + len("<answer>")
        fenced = re.compile(r"```([\d\s]+)```").search(text, inside)
        if fenced and fenced.group(1).strip():
            return fenced.group(1).strip()
        ending = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>").search(text, inside)
        if ending and text[inside : ending.start()].strip():
            return text[inside : ending.start()].strip()
    _, closing, rest = text.partition("</answer>")
    if closing and (rest := re.split(r"<\|eot_id\|>|<\|endoftext\|>", rest, maxsplit=1)[0].strip()):
        return rest
    found = re.search(r"(\d{16})\s*</answer>", text) or re.search(r"\b(\d{16})\b", text)
    return found.group(1) if found else ""


def _right_cells(puzzle: str, solution: str, answer: str) -> tuple[int, int]:
    empty = [cell for cell, clue in enumerate(puzzle) if clue == "0"]
    written = answer[:CELLS].ljust(CELLS, "0")
    return sum(written[cell] == solution[cell] for cell in empty), len(empty)
