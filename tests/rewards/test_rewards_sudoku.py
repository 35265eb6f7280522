"""4x4 Sudoku: generation, verdict, reward components, stored files."""

import time
from pathlib import Path

import pytest

from rewards.errors import ConfigError, DataError
from rewards.tasks.sudoku import Sudoku, grids, solutions

TASK = Sudoku()
PUZZLE = "0321003004002100"
SOLUTION = "4321123434122143"
FIELDS = {"puzzle": PUZZLE, "solution": SOLUTION}


def tagged(text: str) -> str:
    return f"<answer>{text}</answer>"


def is_valid(grid: str) -> bool:
    """The rules, written out independently of the package."""
    rows = [grid[4 * r : 4 * r + 4] for r in range(4)]
    columns = [grid[c::4] for c in range(4)]
    boxes = [grid[i] + grid[i + 1] + grid[i + 4] + grid[i + 5] for i in (0, 2, 8, 10)]
    return all(sorted(unit) == list("1234") for unit in rows + columns + boxes)


def test_the_288_grids() -> None:
    assert len(set(grids())) == 288
    assert all(map(is_valid, grids()))
    assert list(grids()) == sorted(grids())


def test_solutions_keep_the_clues() -> None:
    assert solutions(PUZZLE) == [SOLUTION]
    assert len(solutions("0" * 16)) == 288
    assert solutions("11" + "0" * 14) == []


VERDICTS = [
    (tagged(SOLUTION), True, None, "the solution"),
    (f"<think>hm</think>\n{tagged(SOLUTION)}", True, None, "after thinking"),
    (tagged(rf"\boxed{{{SOLUTION}}}"), True, None, "boxed"),
    (SOLUTION, True, None, "untagged, nothing but the answer"),
    (f"{SOLUTION} is it", False, "characters, not 16", "untagged text that begins with the answer"),
    (tagged(SOLUTION + "1"), False, "17 characters", "one too many"),
    (tagged(SOLUTION[:15]), False, "15 characters", "one too few"),
    (tagged(PUZZLE), False, "other than the digits", "the puzzle itself"),
    (tagged(SOLUTION[:15] + "\uff13"), False, "other than the digits", "a full-width digit"),
    (tagged("1234341221434321"), False, "was changed", "a valid grid that is not this puzzle's"),
    (tagged("4321123444122143"), False, "repeats a digit", "clues kept, rules broken"),
    (tagged(""), False, "no answer", "empty answer"),
    ("", False, "no answer", "empty completion"),
    (f"<think>{tagged(SOLUTION)}</think>", False, "no answer", "only in the thinking"),
    (tagged(SOLUTION) + tagged("1" * 16), False, "was changed", "the last answer is the submission"),
]


@pytest.mark.parametrize(("completion", "correct", "error", "reason"), VERDICTS, ids=[row[3] for row in VERDICTS])
def test_verdict(completion: str, correct: bool, error: str | None, reason: str) -> None:
    grade = TASK.grade(FIELDS, completion)
    assert grade.correct is correct, reason
    assert grade.error is None if error is None else error in (grade.error or "")
    assert tuple(grade.components) == TASK.components


REWARDS = [
    (tagged(SOLUTION), (0.25, 0.25, 0.5, 3.0), "everything"),
    (SOLUTION, (0.0, 0.0, 0.0, 3.0), "no format credit without the tag"),
    (f"{SOLUTION} is it", (0.0, 0.0, 0.0, 0.0), "untagged text is not read from its first 16 characters"),
    (tagged("4321123434122144"), (0.25, 0.0, 0.5, 3.0 * 8 / 9), "one empty cell wrong"),
    (tagged("4321123434122134"), (0.25, 0.25, 0.5, 3.0 * 7 / 9), "two empty cells exchanged: still a permutation"),
    (tagged("1321123434122143"), (0.25, 0.0, 0.5, 3.0 * 8 / 9), "the first cell wrong"),
    (tagged("4421123434122143"), (0.25, 0.0, 0.0, 3.0), "a clue overwritten costs the clues, and the verdict"),
    (tagged(SOLUTION[:8]), (0.0, 0.0, 0.0, 3.0 * 4 / 9), "a short answer: the cells beyond its end are wrong"),
    (tagged(SOLUTION[8:]), (0.0, 0.0, 0.0, 0.0), "the last half is not slid to the last cells"),
    (tagged(SOLUTION + "9"), (0.0, 0.0, 0.0, 3.0), "what follows the 16th character is not read"),
    (tagged("x" * 16), (0.25, 0.0, 0.0, 0.0), "16 characters of anything"),
    (tagged(""), (0.0, 0.0, 0.0, 0.0), "empty"),
]


@pytest.mark.parametrize(("completion", "components", "reason"), REWARDS, ids=[row[2] for row in REWARDS])
def test_components(completion: str, components: tuple[float, ...], reason: str) -> None:
    grade = TASK.grade(FIELDS, completion)
    assert tuple(grade.components.values()) == pytest.approx(components), reason
    assert grade.reward == pytest.approx(sum(components))


def test_full_reward_implies_the_verdict_and_a_changed_clue_denies_it() -> None:
    assert TASK.grade(FIELDS, tagged(SOLUTION)).reward == 4.0
    overwritten = TASK.grade(FIELDS, tagged("4421123434122143"))
    assert overwritten.components["cells"] == 3.0 and not overwritten.correct and overwritten.reward < 4.0


def test_a_puzzle_without_empty_cells() -> None:
    fields = {"puzzle": SOLUTION, "solution": SOLUTION}
    assert TASK.grade(fields, tagged(SOLUTION)).reward == 4.0
    assert TASK.grade(fields, tagged("1" * 16)).components["cells"] == 0.0


def test_any_valid_completion_is_right() -> None:
    puzzle = "1200340000000000"
    found = solutions(puzzle)
    assert len(found) > 1
    fields = {"puzzle": puzzle, "solution": found[0]}
    other = TASK.grade(fields, tagged(found[1]))
    assert other.correct and other.components["cells"] < 3.0, "the verdict takes it, the stored solution differs"
    without = {"puzzle": puzzle}
    assert [TASK.grade(without, tagged(grid)).reward for grid in found] == [4.0] * len(found)
    assert not TASK.grade(without, tagged(SOLUTION)).correct, "negative control"


BAD_FIELDS = [
    ({}, "puzzle must be 16 digits", "missing"),
    ({"puzzle": "123"}, "puzzle must be 16 digits", "short"),
    ({"puzzle": PUZZLE[1:]}, "leading zeros", "leading zero lost"),
    ({"puzzle": 321003004002100}, "puzzle must be 16 digits", "a number"),
    ({"puzzle": PUZZLE[:15] + "5"}, "puzzle must be 16 digits", "a digit over 4"),
    ({"puzzle": PUZZLE + "\n"}, "puzzle must be 16 digits", "a newline"),
    ({"puzzle": "\u0660" * 16}, "puzzle must be 16 digits", "unicode digits"),
    ({"puzzle": "11" + "0" * 14}, "has no solution", "clues that contradict"),
    ({"puzzle": PUZZLE, "solution": "1" * 16}, "does not solve", "no grid"),
    ({"puzzle": PUZZLE, "solution": "1234341221434321"}, "does not solve", "another puzzle's solution"),
    ({"puzzle": PUZZLE, "solution": 4321123434122143}, "does not solve", "a number as solution"),
    ({"puzzle": PUZZLE, "solution": ""}, "does not solve", "an empty solution"),
]


@pytest.mark.parametrize(("fields", "message", "reason"), BAD_FIELDS, ids=[row[2] for row in BAD_FIELDS])
def test_bad_fields(fields: dict, message: str, reason: str) -> None:
    with pytest.raises(DataError, match=message):
        TASK.grade(fields, tagged(SOLUTION))


HARD = [
    "",
    "9**9**9",
    "\0" * 1_000_000,
    "1" * 1_000_000,
    "(" * 10_000 + ")" * 10_000,
    "<|endoftext|>" * 500,
    "<answer>" * 200_000,
    "<answer></answer>" * 100_000,
    "<think>" * 200_000,
    "<think></think>" * 100_000,
    r"\boxed{" * 200_000,
    r"\boxed{" * 4000 + "}" * 4000,
    "{" * 1_000_000,
    tagged(r"\boxed{" + "{" * 16_000),
    "<" * 1_000_000,
    "\u0661" * 16,
    "\ud800" * 16,
    tagged("\0" * 16),
]


@pytest.mark.parametrize("completion", HARD, ids=[repr(text[:18]) for text in HARD])
def test_hard_completions_are_wrong_and_quick(completion: str) -> None:
    started = time.perf_counter()
    grade = TASK.grade({"puzzle": "0" * 16}, completion)
    seconds = time.perf_counter() - started
    print(f"{1000 * seconds:.1f} ms")  # 50 ms is the bound; the assertion leaves room for a busy machine
    assert seconds < 0.5
    assert not grade.correct and grade.error and len(grade.error) < 300


def test_generated_problems() -> None:
    train = TASK.problems("train", seed=3, size=600)
    test = TASK.problems("test", seed=3, size=200)
    assert (len(train), len(test)) == (600, 200)
    for problems, grid_count in ((train, 224), (test, 64)):
        puzzles = [problem.fields["puzzle"] for problem in problems]
        assert len(set(puzzles)) == len(puzzles) and len({problem.id for problem in problems}) == len(problems)
        assert len({problem.fields["solution"] for problem in problems}) == grid_count, "every grid is used"
        assert {puzzle.count("0") for puzzle in puzzles} == {7, 8, 9, 10}
        for problem in problems:
            assert solutions(problem.fields["puzzle"]) == [problem.fields["solution"]]
            assert TASK.grade(problem.fields, tagged(problem.fields["solution"])).reward == 4.0
    TASK.check_disjoint(train, test)


def test_generation_depends_on_the_seed_alone() -> None:
    once = TASK.problems("train", seed=3, size=50)
    assert TASK.problems("train", seed=3, size=50) == once
    assert TASK.problems("train", seed=3, size=300)[:50] == once, "a larger size appends"
    assert TASK.problems("train", seed=4, size=50) != once
    # Pinned: a changed generator would silently change every data set and mix old test puzzles into training.
    assert once[0].fields == {"puzzle": "1000023001402000", "solution": "1324423131422413"}


@pytest.mark.parametrize("size", [0, -1, 10**6])
def test_a_size_that_cannot_be_had(size: int) -> None:
    with pytest.raises(ConfigError, match=f"size is {size}"):
        TASK.problems("test", seed=0, size=size)


def test_messages() -> None:
    assert TASK.messages(FIELDS) == [{"role": "user", "content": f"Puzzle: {PUZZLE}"}]


def test_stored_test_files(shared: Path) -> None:
    several = 0
    for name, count in (("sudoku_4x4_test_d1.csv", 500), ("sudoku_4x4_test_spg.csv", 256)):
        problems = TASK.problems("test", seed=0, size=10**6, path=str(shared / "data" / name))
        assert len(problems) == count
        for problem in problems:
            assert TASK.grade(problem.fields, tagged(problem.fields["solution"])).reward == 4.0
            others = [grid for grid in solutions(problem.fields["puzzle"]) if grid != problem.fields["solution"]]
            several += bool(others)
            for grid in others:
                grade = TASK.grade(problem.fields, tagged(grid))
                assert grade.correct and grade.components["cells"] < 3.0
            assert not TASK.grade(problem.fields, tagged(problem.fields["puzzle"])).correct
    assert several == 124, "puzzles of the d1 file with more than one solution, as its notes say"


def test_stored_train_file_leaks_and_the_leaks_are_dropped(shared: Path) -> None:
    data = shared / "data"
    train = TASK.problems("train", seed=0, size=10**6, path=str(data / "sudoku_4x4_train20k.csv.gz"))
    test = TASK.problems("test", seed=0, size=10**6, path=str(data / "sudoku_4x4_test_spg.csv"))
    assert len(train) == 20_000
    with pytest.raises(DataError, match="sudoku-sudoku_4x4_train20k-"):
        TASK.check_disjoint(train, test)
    clean = TASK.without_leaks(train, test)
    assert len(train) - len(clean) == 6164, "the number in the data set's notes"
    TASK.check_disjoint(clean, test)
