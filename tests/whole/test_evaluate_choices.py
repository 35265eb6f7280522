"""Multiple choice is evaluated as any task is: rows of a file, a model that knows nothing, and verdicts."""

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.task import get_task
from tests.support.evaluations import call

ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "ctx": "A boy",
        "activity_label": "Hands",
        "endings": ["sits.", "is.", "runs.", "eats."],
        "label": "1",
    },
    "commonsense_qa": {"question": "Where?", "choices": {"label": ["A", "B"], "text": ["in", "on"]}, "answerKey": "B"},
}


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("name", ROWS)
def test_multiple_choice_is_evaluated(name: str, tmp_path: Path, tiny_model: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(ROWS[name]) + "\n" for _ in range(3)))
    answer = call(
        *(
            "recipe=smoke",
            f"task.name={name}",
            f"task.train_path={rows}",
            f"data.path={rows}",
            f"model.path={tiny_model}",
        ),
        *("decode.step_divisors=[1]", "decode.position_rules=[low_confidence]", "decode.thresholds=[]"),
        *("statistics.resamples=50", f"out={tmp_path / 'out'}", "rollout.actors=1"),
    )
    assert answer.returncode == 0, answer.stderr
    (cell,) = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert set(cell["base"]["components"]) == {"think_tag", "answer_tag", "correct"}
    _, line = (json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    task = get_task(name)
    (problem, *_) = task.problems("test", seed=0, size=1, path=str(rows))
    for row in line["problems"]:
        assert row["correct"] == [int(task.grade(problem.fields, text).correct) for text in row["completions"]]
