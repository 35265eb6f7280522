r"""SPG's protocols (github.com/facebookresearch/SPG, commit a1c7120): d1's, with the differences named here.

Not repeated: the cut of prompts to their last 200 tokens (1500 for Sudoku), the choice of the checkpoint by its score
on the test set. Countdown is d1's without a change: ``countdown_d1``.
"""

from typing import Any, ClassVar

from rewards.protocols.agrpo import in_spg_test
from rewards.protocols.d1 import SUDOKU_SYSTEM, Gsm8kD1, MathD1, SudokuD1, prefilled
from rewards.protocols.sudoku_examples import EXAMPLES
from rewards.tasks.sudoku import Sudoku

_EXAMPLES = "\n\n".join(
    f"Question:\nSolve the following Sudoku puzzle: {puzzle}\nAnswer:\n"
    f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{solution}\n</answer>"
    for puzzle, reasoning, solution in EXAMPLES
)


class Gsm8kSpg(Gsm8kD1):
    r"""GSM8K as SPG has it: ``gsm8k_d1``, but ``xml_count``'s first penalty counts the text after ``\n<answer>\n`` (the
    answer and its closing tag with it, so a right completion loses about 0.02), and the verdict falls back on text
    without a complete answer block: the last number after the last ``<answer>``, or of the whole text.
    """

    name: ClassVar[str] = "gsm8k_spg"
    PENALTY_SPLIT: ClassVar[str] = "\n<answer>\n"
    READS_UNTAGGED: ClassVar[bool] = True


class MathSpg(MathD1):
    """MATH as SPG has it: ``math_d1`` without a change."""

    name: ClassVar[str] = "math_spg"


class SudokuSpg(SudokuD1):
    """4x4 Sudoku as SPG has it: ``sudoku_d1``'s graders, three worked examples before the question, and the new split,
    in which no test puzzle shares its solution grid with a training puzzle.

    Rows of a file whose flag ``solution_in_spg_test`` is 1 are passed over.
    """

    name: ClassVar[str] = "sudoku_spg"

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        gap = "\n\n" if fields.get("evaluation") else "\n"  # the two published scripts differ by this newline
        question = f"Question: Solve the following Sudoku puzzle: {fields['puzzle']}{gap}Answer:\n"
        messages = prefilled(f"{SUDOKU_SYSTEM}\n\n{_EXAMPLES}\n\n{question}")
        return messages if fields.get("evaluation") else messages[:1]

    def leak_key(self, fields: dict[str, Any]) -> str:
        return Sudoku.leak_key(self, fields)

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return None if in_spg_test(row) else super()._fields_from_row(row)
