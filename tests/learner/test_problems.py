"""What a run leaves out of its problems is counted and told."""

import csv
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from learner.settings.run import RunConfig, load_config
from learner.supply.problems import fitting, task_problems
from rewards.errors import ConfigError, DataError
from rewards.reactions import knows_molecules
from rewards.task import Problem, Task, get_task
from rewards.tasks.countdown import expressions
from rollout.models.encoding import encode_prompt
from rollout.models.tokenizer import build_tokenizer

TASK = get_task("countdown")


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(train: list[dict], test: list[dict] | None = None, *settings: str) -> RunConfig:
        for name, rows in (("train", train), ("test", test or [{"nums": [9, 9, 1], "target": 19}])):
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        paths = [f"task.{name}_path={tmp_path / name}.json" for name in ("train", "test")]
        return load_config(["recipe=countdown", *paths, *settings])

    return make


def told_by(config: RunConfig) -> tuple[list[Problem], list[Problem], dict[str, str]]:
    told: dict[str, str] = {}
    train, test = task_problems(config, TASK, on_event=lambda level, kind, text: told.update({kind: text}))
    return train, test, told


def test_problems_without_a_solution_are_left_out(config_of: Callable[..., RunConfig]) -> None:
    rows = [{"nums": [1, 1, 1], "target": 100}, {"nums": [3, 5, 2], "target": 16}, {"nums": [2, 2, 2], "target": 99}]
    train, test, told = told_by(
        config_of(rows, [{"nums": [7, 7, 7], "target": 50}, *rows[:0], {"nums": [9, 9, 1], "target": 19}])
    )
    assert [problem.fields["numbers"] for problem in train] == [[3, 5, 2]]
    assert [problem.fields["numbers"] for problem in test] == [[9, 9, 1]]
    assert told["unsolvable"] == "1 of 2 held-out problems have no solution and are left out"
    with pytest.raises(DataError, match="none of 1 training problems has a solution"):
        told_by(config_of(rows[:1]))


def test_repeated_problems_are_counted(config_of: Callable[..., RunConfig]) -> None:
    rows = [{"nums": [3, 5, 2], "target": 16}] * 40 + [{"nums": [3, 5, 2], "target": 10}]
    train, _, told = told_by(config_of(rows))
    assert len(train) == 41
    assert told == {"duplicates": "39 of 41 training problems ask what another one asks, and are drawn like all others"}


def test_what_decides_verdicts_on_this_machine_is_told() -> None:
    task = get_task("reaction")
    told: dict[str, str] = {}
    config = load_config(["recipe=smoke", "task.name=reaction", "task.train_size=16", "task.test_size=16"])
    task_problems(config, task, on_event=lambda level, kind, text: told.update({kind: text}))
    assert told["verdicts"] == f"right is {told_by_task(task)}" and get_task("countdown").verdicts_by() is None


def told_by_task(task: Task) -> str:
    if not knows_molecules():
        return "the same text, since RDKit isn't installed"
    assert (by := task.verdicts_by()) is not None and by == "the same molecules, by RDKit"
    return by


def test_generated_problems_are_not_looked_through() -> None:
    train, test, told = told_by(load_config(["recipe=smoke", "task.name=countdown"]))
    assert train and test and told == {}


def test_problems_that_are_too_long_are_refused_or_left_out() -> None:
    tokenizer = build_tokenizer()
    problems = [Problem(str(count), {"numbers": [10] * count, "target": 90}) for count in (2, 3, 9)]
    lengths = [len(encode_prompt(tokenizer, TASK.messages(problem.fields))) for problem in problems]
    room = {"completion_length": 24, "longest": 24 + lengths[1]}
    with pytest.raises(ConfigError, match=f"problem 9 has {lengths[2]} tokens.*task.too_long=drop"):
        fitting(problems, TASK, tokenizer, **room)
    assert fitting(problems, TASK, tokenizer, **room, too_long="drop") == problems[:2]
    assert fitting(problems, TASK, tokenizer, completion_length=24, longest=None) == problems
    with pytest.raises(ConfigError, match="none of 3 prompts leaves room"):
        fitting(problems, TASK, tokenizer, completion_length=24, longest=30, too_long="drop")


def test_what_countdown_can_reach_is_what_its_expressions_reach() -> None:
    for numbers in ([1, 1, 1], [3, 5, 2], [7, 3, 9], [2, 8, 8], [5, 0, 3], [9, 4]):
        reached = expressions(numbers)
        for target in range(-20, 101):
            assert TASK.solvable({"numbers": numbers, "target": target}) == (Fraction(target) in reached)


@pytest.mark.parametrize(
    "row",
    [
        'numbers,target\n"[44, 19, 35]",98\n',
        "numbers,target\n[44 19 35],98.0\n",
        'input,output\n"44,19,35",98\n',
        'nums,target\n"[44.0, 19.0, 35.0]",98\n',
    ],
)
def test_countdown_reads_lists_as_pandas_and_numpy_write_them(row: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(row)
    (problem,) = TASK.problems("train", seed=0, size=1, path=str(tmp_path / "a.csv"))
    assert problem.fields == {"numbers": [44, 19, 35], "target": 98}


def test_mbpp_reads_a_csv_of_pandas(tmp_path: Path) -> None:
    with open(tmp_path / "a.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["task_id", "text", "test_list"])
        rows.writerow(["601.0", "Add.", str(["assert add(1, 2) == 3", "assert add('a', \"b'\") == \"ab'\""])])
    (problem,) = get_task("mbpp").problems("train", seed=0, size=1, path=str(tmp_path / "a.csv"))
    assert problem.fields["tests"] == ["assert add(1, 2) == 3", "assert add('a', \"b'\") == \"ab'\""]
    assert problem.fields["task_id"] == 601
