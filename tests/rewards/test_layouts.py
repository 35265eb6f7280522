"""What pages show of an answer: its parts stand where they say, and marks agree with the verdict."""

import pytest

from rewards.layout import Layout
from rewards.task import BUILT_IN, get_task

PUZZLE, SOLUTION = "0321003004002100", "4321123434122143"
WRONG = SOLUTION[:4] + "4" + SOLUTION[5:]

CASES = {
    "sudoku": ({"puzzle": PUZZLE, "solution": SOLUTION}, f"<answer>{SOLUTION}</answer>"),
    "countdown": ({"numbers": [3, 5, 2], "target": 16}, "<think>08</think><answer>(3+5)*2=16</answer>"),
    "gsm8k": ({"question": "?", "answer": "14"}, r"so 56/4 = 14 <answer>\boxed{14}</answer>"),
    "commonsense_qa": ({"question": "?", "options": ["a", "b"], "answer": "B"}, "<answer>B</answer>"),
    "mbpp": ({"text": "add", "tests": ["assert add(1, 2) == 3"]}, "```python\ndef add(a, b):\n    return a + b\n```"),
}


def shown(layout: Layout | None, completion: str) -> str:
    """What the layout shows once everything is written."""
    assert layout is not None
    return "|".join(cell.text if cell.start is None else completion[cell.start : cell.end] for cell in layout.cells)


def marks(layout: Layout | None) -> str:
    assert layout is not None
    return "".join((cell.mark or "-")[0] for cell in layout.cells)


@pytest.mark.parametrize("name", CASES)
def test_parts_stand_where_they_say_and_a_right_answer_has_no_wrong_part(name: str) -> None:
    fields, completion = CASES[name]
    task = get_task(name)
    layout = task.layout(fields, completion, correct=True)
    assert layout is not None and "w" not in marks(layout) and "r" in marks(layout)
    assert [shown(layout, completion).replace("|", "")] == [
        {"mbpp": "def add(a, b):\n    return a + b", "sudoku": SOLUTION, "countdown": "(3+5)*2=16"}.get(name)
        or {"gsm8k": "14", "commonsense_qa": "B"}[name]
    ]
    assert "w" in marks(task.layout(fields, completion, correct=False)) or name == "sudoku", "control"
    assert (task.expected(fields) is None) == (name == "mbpp")


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_largest_values_are_of_components_and_any_text_has_a_layout_or_none(name: str) -> None:
    task = get_task(name)
    assert set(task.largest) <= set(task.components)
    base = next((case for case in CASES if issubclass(type(task), type(get_task(case)))), None)
    for text in ("", "<answer></answer>", "<answer>" * 3, "no", "1" * 20_000):
        if base is not None:
            layout = task.layout(CASES[base][0], text, correct=False)
            assert layout is None or len(layout.cells) <= 100


def test_a_grid_says_which_cells_are_clues_right_and_wrong() -> None:
    task = get_task("sudoku")
    fields = {"puzzle": PUZZLE, "solution": SOLUTION}

    def of(text: str, correct: bool = False) -> Layout | None:
        return task.layout(fields, text, correct=correct)

    found = of(f"<answer>{WRONG}</answer>")
    assert found is not None and (found.kind, found.columns) == ("grid", 4)
    assert marks(found) == "".join("c" if clue != "0" else "r" for clue in PUZZLE[:4]) + "wrcr" + "rcrr" + "ccrr"
    changed = f"<answer>{SOLUTION[0]}4{SOLUTION[2:]}</answer>"
    assert marks(of(changed))[1] == "w", "a clue that was changed"
    assert marks(of(f"<answer>{SOLUTION[:5]}</answer>")) == "rcccr-c--c--cc--", "a short answer leaves cells empty"
    assert marks(of("I don't know")) == "".join("c" if clue != "0" else "-" for clue in PUZZLE), "no answer"


def test_of_several_solutions_the_nearest_counts() -> None:
    task = get_task("sudoku")
    fields = {"puzzle": "0" * 16}
    assert "w" not in marks(task.layout(fields, SOLUTION, correct=True))
    assert marks(task.layout(fields, WRONG, correct=False)).count("w") == 1


@pytest.mark.parametrize(
    ("answer", "correct", "wanted"),
    [
        ("(3+5)*2=16", True, "-r-r--r-r"),
        ("3+5+2=16", False, "r-r-r-w"),
        ("3+3=16", False, "r-w-w"),
        ("7*2=14", False, "w-r-w"),
        ("(3+5)*2", True, "-r-r--r"),
    ],
)
def test_an_expression_says_which_numbers_were_given(answer: str, correct: bool, wanted: str) -> None:
    fields = CASES["countdown"][0]
    assert marks(get_task("countdown").layout(fields, f"<answer>{answer}</answer>", correct=correct)) == wanted
