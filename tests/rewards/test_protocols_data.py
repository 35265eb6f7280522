"""The real data through every task: counts, fields, leaks between the splits, and prompts of real problems."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewards.errors import DataError
from rewards.grade import grade_line
from rewards.task import BUILT_IN, Problem, Split, Task, get_task

ALL = 10**6

# task, split, file, problems, why
COUNTS: list[tuple[str, Split, str, int, str]] = [
    ("gsm8k", "train", "gsm8k_train.jsonl.gz", 7473, "all"),
    ("gsm8k_agrpo", "test", "gsm8k_test.jsonl.gz", 1319, "all"),
    ("gsm8k_d1", "train", "gsm8k_train.jsonl.gz", 7473, "all"),
    ("gsm8k_spg", "test", "gsm8k_test.jsonl.gz", 1319, "all"),
    ("math", "train", "math_train.jsonl.gz", 7498, "two rows have an empty box for an answer"),
    ("math", "test", "math500_test.jsonl.gz", 500, "all"),
    ("math_agrpo", "train", "math_train.jsonl.gz", 5192, "levels 1 to 4, less two boxes without braces"),
    ("math_agrpo", "test", "math500_test.jsonl.gz", 500, "all levels"),
    ("math_d1", "train", "math_train.jsonl.gz", 7498, "all levels"),
    ("math_spg", "train", "math_test_rest.jsonl.gz", 4500, "the rest of PRM800K's split"),
    ("countdown", "test", "countdown_cd3_test.jsonl", 256, "all"),
    ("countdown_agrpo", "train", "countdown_train20k.jsonl.gz", 9953, "three numbers"),
    ("countdown_d1", "test", "countdown_cd3_test.jsonl", 256, "all"),
    ("sudoku", "train", "sudoku_4x4_train20k.csv.gz", 20000, "all"),
    ("sudoku_agrpo", "train", "sudoku_4x4_train20k.csv.gz", 20000 - 6164, "without grids of SPG's test set"),
    ("sudoku_spg", "train", "sudoku_4x4_train20k.csv.gz", 20000 - 6164, "without grids of SPG's test set"),
    ("sudoku_d1", "train", "sudoku_4x4_train20k.csv.gz", 20000, "all"),
    ("sudoku_d1", "test", "sudoku_4x4_test_d1.csv", 500, "all"),
    ("sudoku_spg", "test", "sudoku_4x4_test_spg.csv", 256, "all"),
    ("sudoku_agrpo", "test", "sudoku_4x4_test_spg.csv", 256, "all"),
]


@pytest.fixture(scope="module")
def problems(shared: Path) -> Callable[[str, Split, str], list[Problem]]:
    """Reads a file of the shared data through a task, each once."""
    known: dict[tuple[str, Split, str], list[Problem]] = {}

    def read(task: str, split: Split, name: str) -> list[Problem]:
        key = task, split, name
        if key not in known:
            known[key] = get_task(task).problems(split, seed=0, size=ALL, path=str(shared / "data" / name))
        return known[key]

    return read


@pytest.mark.parametrize(("task", "split", "name", "count", "why"), COUNTS)
def test_files(problems: Any, task: str, split: Split, name: str, count: int, why: str) -> None:
    """The rows of a file, and a line for ``rewards.grade`` made from one of them."""
    read = problems(task, split, name)
    line = {"id": 7, "completion": "<answer>nothing</answer>", **read[-1].fields}
    record = grade_line(get_task(task), json.dumps(line).encode(), 1)
    assert (record["id"], record["correct"]) == (7, False) and "line" not in record["error"]
    assert tuple(record["components"]) == get_task(task).components
    assert len(read) == count == len({problem.id for problem in read}), why
    for problem in read[:: max(1, count // 100)]:
        get_task(task).validate_fields(problem.fields)
        assert get_task(task).messages(problem.fields)[0]["content"]


# task, train file, test file, training problems dropped (data/README.md)
LEAKS = [
    ("sudoku", "sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_spg.csv", 6164),
    ("sudoku", "sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_d1.csv", 15959),
    ("sudoku_agrpo", "sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_spg.csv", 0),
    ("sudoku_spg", "sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_spg.csv", 0),
    ("sudoku_d1", "sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_d1.csv", 0),
    ("sudoku_d1", "sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_spg.csv", 6),
    ("countdown", "countdown_train20k.jsonl.gz", "countdown_cd3_test.jsonl", 13),
    ("countdown_agrpo", "countdown_train20k.jsonl.gz", "countdown_cd3_test.jsonl", 13),
    ("math", "math_train.jsonl.gz", "math500_test.jsonl.gz", 0),
    ("math_agrpo", "math_train.jsonl.gz", "math500_test.jsonl.gz", 0),
    ("gsm8k", "gsm8k_train.jsonl.gz", "gsm8k_test.jsonl.gz", 0),
]


@pytest.mark.parametrize(("task", "train", "test", "dropped"), LEAKS)
def test_leaks(problems: Any, task: str, train: str, test: str, dropped: int) -> None:
    before, held_out = problems(task, "train", train), problems(task, "test", test)
    after = get_task(task).without_leaks(before, held_out)
    assert len(before) - len(after) == dropped
    get_task(task).check_disjoint(after, held_out)
    if dropped:
        with pytest.raises(DataError, match="share"):
            get_task(task).check_disjoint(before, held_out)


def test_the_leak_counts_can_differ(problems: Any) -> None:
    """The checks above can fail: the same grids, by puzzle and by solution, and an identical pair of splits."""
    train = problems("sudoku_d1", "train", "sudoku_4x4_train20k.csv.gz")
    test = problems("sudoku_d1", "test", "sudoku_4x4_test_d1.csv")
    assert len(get_task("sudoku").without_leaks(train, test)) == 20000 - 15959 != len(train)
    assert get_task("math").without_leaks(problems("math", "train", "math_train.jsonl.gz")[:3], []) != []
    assert get_task("sudoku").without_leaks(test, test) == []


def test_math_train_repeats_problems_but_none_of_math_500(problems: Any) -> None:
    train, task = problems("math", "train", "math_train.jsonl.gz"), get_task("math")
    assert len(train) - len({task.leak_key(problem.fields) for problem in train}) == 3
    near = [p.fields["problem"] for p in train if "all the roots of $z^4 - z^2 + 1 = 0$" in p.fields["problem"]]
    assert len(near) == 1, "it differs from a test problem by one sign, and stays"


def test_d1_keeps_the_gold_text_and_marks_the_evaluation(problems: Any) -> None:
    train = problems("gsm8k_d1", "train", "gsm8k_train.jsonl.gz")
    raw = [problem.fields["raw_answer"] for problem in train if "raw_answer" in problem.fields]
    assert len(raw) == 79 and all("," in text for text in raw)
    assert not any("evaluation" in problem.fields for problem in train)
    test = problems("gsm8k_spg", "test", "gsm8k_test.jsonl.gz")
    assert all(problem.fields["evaluation"] is True for problem in test)
    assert get_task("gsm8k_spg").messages(test[0].fields)[-1]["content"] == "<reasoning>"


def test_gold_answers_are_right_and_the_published_mistakes_show(problems: Any) -> None:
    """Every gold answer of GSM8K's test set, in a box, by the strict and by the published verdicts."""
    test = problems("gsm8k_spg", "test", "gsm8k_test.jsonl.gz")
    right = dict.fromkeys(("gsm8k", "gsm8k_agrpo", "gsm8k_d1"), 0)
    for problem in test:
        for name in right:
            completion = rf"<answer>\boxed{{{problem.fields['answer']}}}</answer>"
            right[name] += get_task(name).grade(problem.fields, completion).correct
    assert right == {"gsm8k": 1319, "gsm8k_agrpo": 1317, "gsm8k_d1": 1317}, "the two negative answers"


def test_generated_problems_serve_the_puzzle_protocols() -> None:
    for name in ("countdown_agrpo", "countdown_d1", "sudoku_agrpo", "sudoku_d1", "sudoku_spg"):
        task = get_task(name)
        train, test = (task.problems(split, seed=0, size=20) for split in ("train", "test"))
        task.check_disjoint(train, test)
        assert task.source("train", None) is None
        assert ("evaluation" in test[0].fields) == name.endswith(("_d1", "_spg"))


def test_every_task_loads_and_names_itself() -> None:
    for name in BUILT_IN:
        task = get_task(name)
        assert isinstance(task, Task) and task.name == name
        assert task.components or name == "open_prompts", "what has no part of its own is for a judge"
        assert name.replace("_", "").isalnum(), "names end up in paths"
        for source in task.default_sources.values():
            assert source.startswith("hub:")
