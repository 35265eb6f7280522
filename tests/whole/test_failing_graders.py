"""A run whose grader fails on every completion ends with the grader's own reason, told once."""

import pytest

from services.store import schema
from tests.support import store_rows
from tests.support.real_runs import Runs, iterations

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

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
    "task, said, kind",
    [
        ("Exits", "16 of 16 verdicts of the evaluation failed; the last one: the grader ended with code 3", "grader"),
        ("Raises", "16 of 16 verdicts of the evaluation failed; the last one: task raised KeyError: 'boom'", "grader"),
        ("Refuses", "iteration 1 has no usable group left; dropped so far: task raised KeyError (", "dropped"),
    ],
)
def test_a_grader_that_always_fails(task: str, said: str, kind: str, runs: Runs) -> None:
    (runs.folder / "failing_tasks.py").write_text(TASKS)
    settings = [f"task.name=failing_tasks:{task}", "evaluation.step_divisors=[1]", "evaluation.problems=16"]
    with runs.started(task, *settings, forked=False) as run:
        assert run.wait() == 1, run.output()
    assert run.output().count(said) == 1, run.output()
    assert "Traceback" not in run.output()
    assert iterations(runs[task]) in ([], [0]), "nothing is learned"
    engine = schema.open_engine(runs[task].store_url, create=False)
    texts = [event["text"] for event in store_rows.list_events(engine, task) if event["kind"] == kind]
    engine.dispose()
    assert texts and ("KeyError: 'boom'" in texts[0] or "ended with code 3" in texts[0])
