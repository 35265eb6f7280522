"""A run whose grader fails on every completion ends with the grader's own reason, told once."""

import pytest

from services.store.faults import FAULT
from tests.support.real_runs import Runs, iterations, store_events

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(900)]

TASKS = """
import os
from rewards.task import Problem
from rewards.tasks.sudoku import Sudoku

class Exits(Sudoku):
    def grade(self, fields, completion):
        if completion:
            os._exit(3)
        return super().grade(fields, completion)

class Raises(Sudoku):
    def grade(self, fields, completion):
        raise KeyError("boom")

class Refuses(Sudoku):  # training problems alone
    def problems(self, split, **how):
        return [Problem(p.id, {**p.fields, "split": split}) for p in super().problems(split, **how)]
    def grade(self, fields, completion):
        if fields.get("split") == "train":
            raise KeyError("boom")
        return super().grade(fields, completion)
"""


@pytest.mark.parametrize(
    "task, said, cause",
    [
        ("Exits", "16 of 16 verdicts of the evaluation failed; the last one: the grader ended with code 3", "died"),
        ("Raises", "16 of 16 verdicts of the evaluation failed; the last one: task raised KeyError: 'boom'", "failed"),
        ("Refuses", "iteration 1 has no usable group left; dropped so far: task raised KeyError (", "failed"),
    ],
)
def test_a_grader_that_always_fails(task: str, said: str, cause: str, runs: Runs) -> None:
    (runs.folder / "failing_tasks.py").write_text(TASKS)
    settings = [f"task.name=failing_tasks:{task}", "evaluation.step_divisors=[1]", "evaluation.problems=16"]
    with runs.started(task, *settings, forked=False) as run:
        assert run.wait() == 1, run.output()
    assert run.output().count(said) == 1, run.output()
    assert "Traceback" not in run.output()
    assert iterations(runs[task]) in ([], [0]), "nothing is learned"
    faults = [event for event in store_events(runs[task]) if event["kind"] == FAULT]
    assert {(event["data"]["part"], event["data"]["cause"]) for event in faults} == {("grader", cause)}
    assert "KeyError: 'boom'" in faults[0]["text"] or "ended with code 3" in faults[0]["text"]
