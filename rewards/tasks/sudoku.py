"""4x4 Sudoku: fill a 16-digit string (rows top to bottom, 0 for an empty cell) by the rules.

Reward components (AGRPO's table, 4.0 in all): with an answer tag, ``length`` 0.25 for exactly 16 characters, then
``permutation`` 0.25 for four of each digit and ``clues`` 0.5 for every clue kept; ``cells`` 3.0 times the share of the
originally empty cells that agree with the solution, cell by cell from the first (cells beyond the end of a short answer
are wrong, what follows the 16th character is not read). Untagged text gets ``cells`` only when it is 16 characters.

The verdict asks more and less: exactly 16 digits, all rules, all clues; but any valid completion is right, not only the
stored solution. Full reward implies the verdict, the verdict does not imply full reward on a puzzle with several
solutions. Without a stored solution, ``cells`` uses the valid completion nearest to the answer.
"""

import random
import re
from collections.abc import Mapping
from functools import cache
from itertools import permutations, product
from typing import Any, ClassVar

from rewards.errors import ConfigError, DataError
from rewards.layout import Cell, Layout, characters, place_of
from rewards.parsing import Submission, shorten, submission
from rewards.task import AnswerPair, Grade, Problem, Split, Task
from rewards.tasks.hub import problems_from_source

CELLS = 16
_PUZZLE = re.compile(r"[0-4]{16}")


class Sudoku(Task):
    """Fields: ``puzzle`` and, for grading optional, ``solution``; both 16-digit strings. Generated puzzles have one
    solution; whole solution grids go to train or to test."""

    name: ClassVar[str] = "sudoku"
    components: ClassVar[tuple[str, ...]] = ("length", "permutation", "clues", "cells")
    largest: ClassVar[Mapping[str, float]] = {"length": 0.25, "permutation": 0.25, "clues": 0.5, "cells": 3.0}

    TEST_GRIDS: ClassVar[int] = 64
    """Of the 288 grids, those whose puzzles are test puzzles; the other 224 are for training."""
    BLANKS: ClassVar[tuple[int, int]] = (7, 10)
    """Fewest and most empty cells of a generated puzzle."""
    PUZZLES_PER_GRID: ClassVar[int] = 500
    """Bounds ``size``. Every grid has thousands of such puzzles, so rejection sampling stays quick."""

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        if path is not None:
            return problems_from_source(path, task=self.name, size=size, convert=self._fields_from_row)
        grids = self._split_grids(split, seed)
        if not 1 <= size <= len(grids) * self.PUZZLES_PER_GRID:
            raise ConfigError(
                f"sudoku: size is {size}; the {split} split can have 1 to {len(grids) * self.PUZZLES_PER_GRID} problems"
            )
        rng = random.Random(f"sudoku/{seed}/{split}/puzzles")
        seen: set[str] = set()
        problems: list[Problem] = []
        while len(problems) < size:
            solution = grids[len(problems) % len(grids)]
            puzzle = self._new_puzzle(solution, rng)
            if puzzle not in seen:
                seen.add(puzzle)
                problem_id = f"sudoku-{split}-{seed}-{len(problems)}"
                problems.append(Problem(problem_id, {"puzzle": puzzle, "solution": solution}))
        return problems

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Puzzle: {fields['puzzle']}"}]

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        puzzle, solution = fields["puzzle"], fields.get("solution")
        answer = submission(completion)
        error = _fault(puzzle, answer.text)
        whole = answer.tagged and len(answer.text) == CELLS
        components = {
            "length": 0.25 * whole,
            "permutation": 0.25 * (whole and sorted(answer.text) == sorted("1234" * 4)),
            "clues": 0.5 * (whole and not _changed_clues(puzzle, answer.text)),
            "cells": 3.0 * _share_of_cells(puzzle, [solution] if solution else solutions(puzzle), answer),
        }
        return Grade(error is None, components, error)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        puzzle, solution = fields.get("puzzle"), fields.get("solution")
        if not (isinstance(puzzle, str) and _PUZZLE.fullmatch(puzzle)):
            raise DataError(
                f"puzzle must be 16 digits from 0 (empty) to 4, not {shorten(puzzle)}; "
                "leading zeros count, so keep the column as text"
            )
        if solution is None:
            if not solutions(puzzle):
                raise DataError(f"puzzle {puzzle} has no solution; correct its clues")
        elif not isinstance(solution, str) or solution not in _grid_set() or _changed_clues(puzzle, solution):
            raise DataError(f"solution {shorten(solution)} does not solve puzzle {puzzle}; correct one of the two")

    def demonstrations(self, fields: dict[str, Any]) -> AnswerPair:
        """The wrong rule: every row's blanks get the digits missing from that row in ascending order, with no look at
        columns and boxes. It is right by accident on some puzzles."""
        puzzle, wrong = fields["puzzle"], ""
        for row in (puzzle[start : start + 4] for start in range(0, CELLS, 4)):
            missing = iter(sorted(set("1234") - set(row)))
            wrong += "".join(cell if cell != "0" else next(missing) for cell in row)
        return AnswerPair(f"<answer>{fields['solution']}</answer>", f"<answer>{wrong}</answer>")

    def expected(self, fields: dict[str, Any]) -> str:
        return fields.get("solution") or solutions(fields["puzzle"])[0]

    def layout(self, fields: dict[str, Any], completion: str, *, correct: bool) -> Layout:
        """The grid: clues, and what was written into each cell. Without a stored solution, or where the answer is
        another one, a cell is right that agrees with the valid completion nearest to the answer."""
        puzzle, answer = fields["puzzle"], submission(completion)
        text = answer.text[:CELLS] if answer.tagged or len(answer.text) == CELLS else ""
        place = place_of(text, completion)
        written = [] if place is None else list(characters(text, place[0]))
        known = fields.get("solution")
        references = [known] if known and not correct else solutions(puzzle)
        nearest = max(references, key=lambda grid: sum(map(str.__eq__, grid, text)))
        cells = []
        for at, clue in enumerate(puzzle):
            given = "" if clue == "0" else clue
            if at >= len(written):
                cells.append(Cell(given, "clue" if given else None))
            elif given == written[at][0]:
                cells.append(Cell(given, "clue", *written[at][1:]))
            else:
                right = not given and written[at][0] == nearest[at]
                cells.append(Cell(given, "right" if right else "wrong", *written[at][1:]))
        return Layout("grid", tuple(cells), columns=4)

    def leak_key(self, fields: dict[str, Any]) -> str:
        """The solution grid."""
        return fields["solution"]

    def _split_grids(self, split: Split, seed: int) -> list[str]:
        shuffled = list(grids())
        random.Random(f"sudoku/{seed}/split").shuffle(shuffled)
        return shuffled[: self.TEST_GRIDS] if split == "test" else shuffled[self.TEST_GRIDS :]

    def _new_puzzle(self, solution: str, rng: random.Random) -> str:
        # The number of blanks is drawn once, before the retries: otherwise uniqueness would favour few blanks.
        blanks = rng.randint(*self.BLANKS)
        while True:
            empty = set(rng.sample(range(CELLS), blanks))
            puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(solution))
            if _matching_grids(puzzle).bit_count() == 1:
                return puzzle

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        puzzle: Any = row.get("puzzle", row.get("Puzzle"))
        solution: Any = row.get("solution", row.get("Solution"))
        self.validate_fields({"puzzle": puzzle, "solution": solution})
        if solution is None:
            found = solutions(puzzle)
            if len(found) > 1:
                raise DataError(f"puzzle {puzzle} has {len(found)} solutions; store one beside it")
            solution = found[0]
        return {"puzzle": puzzle, "solution": solution}


@cache
def grids() -> tuple[str, ...]:
    """All 288 solved grids, sorted."""
    rows = ["".join(row) for row in permutations("1234")]
    bands = [top + bottom for top, bottom in product(rows, rows) if set(top[:2]) == set(bottom[2:])]
    return tuple(
        upper + lower
        for upper, lower in product(bands, bands)
        if all(len({upper[c], upper[c + 4], lower[c], lower[c + 4]}) == 4 for c in range(4))
    )


def solutions(puzzle: str) -> list[str]:
    """Every solved grid that keeps the puzzle's clues, sorted. ``puzzle``: 16 digits from 0 to 4."""
    matching = _matching_grids(puzzle)
    return [grid for index, grid in enumerate(grids()) if matching >> index & 1]


@cache
def _grid_set() -> frozenset[str]:
    return frozenset(grids())


@cache
def _grids_with(cell: int, digit: str) -> int:
    """Bit i is set when grid i has that digit in that cell."""
    return sum(1 << index for index, grid in enumerate(grids()) if grid[cell] == digit)


def _matching_grids(puzzle: str) -> int:
    matching = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            matching &= _grids_with(cell, digit)
    return matching


def _changed_clues(puzzle: str, text: str) -> list[int]:
    """Cells whose clue a 16-character text does not keep."""
    return [cell for cell, clue in enumerate(puzzle) if clue not in ("0", text[cell])]


def _share_of_cells(puzzle: str, references: list[str], answer: Submission) -> float:
    if not answer.tagged and len(answer.text) != CELLS:
        return 0.0
    empty = [cell for cell, clue in enumerate(puzzle) if clue == "0"]
    if not empty:
        return float(answer.text == puzzle)
    written = answer.text[:CELLS].ljust(CELLS)
    return max(sum(written[cell] == grid[cell] for cell in empty) for grid in references) / len(empty)


def _fault(puzzle: str, text: str) -> str | None:
    """The verdict's reason: None when the text is a valid completion of the puzzle."""
    if not text:
        return "there is no answer"
    if len(text) != CELLS:
        return f"the answer {shorten(text)} has {len(text)} characters, not 16"
    if not set(text) <= set("1234"):
        return f"the answer {shorten(text)} holds something other than the digits 1 to 4"
    if changed := _changed_clues(puzzle, text):
        return f"the clue {puzzle[changed[0]]} in row {changed[0] // 4 + 1}, column {changed[0] % 4 + 1} was changed"
    if text not in _grid_set():
        return f"a row, column or box of {text} repeats a digit"
    return None
