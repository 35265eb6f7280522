"""Runs beside a judge: its score is learned from, a completion without one is dropped and told, and no key is left."""

import json
from pathlib import Path

import pytest

from learner.reporting.metrics_file import read_rows
from services.store.faults import FAULT
from tests.support.evaluations import call
from tests.support.judges import body, by_text, chat, judge_server, slowly
from tests.support.published import write_published
from tests.support.real_runs import Runs, store_events, summary
from tests.whole.test_recipes import SMALLER

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

KEY = "sk-very-secret-1234"


def test_a_judged_run(runs: Runs) -> None:
    with judge_server() as server:
        server.usual = slowly(0.05, by_text("12345123451234512345x"))  # so that graders that ask at once are seen to
        server.faults = [body(chat("3"))]  # the first is a trial
        judge = [f"task.judge.url={server.url}", "task.judge.model=tiny", "task.judge.rubric=It has many ones."]
        more = ["task.judge.key_variable=JUDGE_KEY", "task.judge.timeout_s=20", "rollout.grade_timeout_s=30"]
        arguments = [*judge, *more, "run.iterations=3", "evaluation.problems=4", "rollout.graders_per_actor=3"]
        with runs.started("judged", *arguments, forked=False, JUDGE_KEY=KEY) as run:
            assert run.wait() == 0, run.output()
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}" and server.most_at_once > 1
    rows = [row for row in read_rows(runs["judged"].metrics_path) if "loss" in row]
    assert all(0 < row["reward/judge"] < 1 for row in rows)
    events = store_events(runs["judged"])
    faults = [event for event in events if event["kind"] == FAULT]
    assert {(event["data"]["part"], event["data"]["cause"]) for event in faults} == {("judge", "failed")}
    dropped = [event["text"] for event in faults if event["data"].get("groups") == 1]
    assert dropped and all("JudgeFailed: judge tiny at" in text and "wrote 'x'" in text for text in dropped)
    assert rows[-1]["ledger/dropped/task raised JudgeFailed"] == len(dropped)
    assert [each for each in events if each["kind"] == "judge" and "its scores are numbers as written" in each["text"]]
    files = [path for path in (*runs["judged"].path.rglob("*"), *runs.cache.rglob("*"), run._output) if path.is_file()]
    assert len(files) > 20 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_judge_that_does_not_answer(runs: Runs) -> None:
    judge = ["task.judge.url=http://127.0.0.1:9/v1", "task.judge.model=tiny", "task.judge.rubric=Any."]
    with runs.started("unanswered", *judge, "task.judge.tries=1", "rollout.grade_timeout_s=62", forked=False) as run:
        assert run.wait() == 2, run.output()
    assert "error: judge tiny at http://127.0.0.1:9/v1: ConnectError" in run.output() and "Ray" not in run.output()


@pytest.mark.heavy
def test_a_judged_evaluation(tmp_path: Path, tiny_model: str) -> None:
    """Completions without a score are counted, and keep the mean of the judge's part from being one."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(6)))
    grid = ("decode.step_divisors=[1]", "decode.position_rules=[low_confidence]", "decode.thresholds=[]")
    data = (f"task.train_path={rows}", f"data.path={rows}", f"model.path={tiny_model}", "task.name=gsm8k")
    judge = ("task.judge.model=tiny", "task.judge.rubric=Any.", "task.judge.timeout_s=20", "rollout.grade_timeout_s=30")
    with judge_server() as server:
        server.faults = [body(chat("3")), body(chat("3")), body(chat("x"))]  # the first is a trial of the judge
        where = (f"task.judge.url={server.url}", f"out={tmp_path / 'out'}", "statistics.resamples=50")
        more = {"UNMASK_CACHE": str(tmp_path / "cache")}
        answer = call("recipe=smoke", *data, *judge, *where, *grid, "rollout.actors=1", **more)
    assert answer.returncode == 0, answer.stderr
    assert "its scores are numbers as written" in answer.stdout + answer.stderr
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    (cell,) = report["cells"]
    assert cell["base"]["grader_failures"] == 1 and cell["base"]["components"]["judge"] is None
    assert report["settings"]["judge"]["rubric"] == "Any."


def test_the_recipe_runs(tmp_path: Path, shared: Path) -> None:
    write_published(tmp_path / "model", "llada", max_sequence_length=8192)
    runs = Runs(tmp_path, tmp_path / "cache", settings=[each for each in SMALLER if "grade_timeout" not in each])
    data = (f"task.train_path={shared}/data/gsm8k_train.jsonl.gz", f"task.test_path={shared}/data/gsm8k_test.jsonl.gz")
    with judge_server() as server:
        server.usual = by_text("12345")
        told = runs.train(
            "judged",
            "recipe=llada_gsm8k_judged",
            f"model.path={tmp_path / 'model'}",
            f"task.judge.url={server.url}",
            *data,
        )
    assert summary(runs["judged"])["iterations"] == 2, told
    (row, *_) = [row for row in read_rows(runs["judged"].metrics_path) if "loss" in row]
    assert {"reward/think_tag", "reward/answer_tag", "reward/correct", "reward/judge"} <= row.keys()
    shown = json.dumps(server.asked[-1]["messages"])
    assert "[end of field answer" in shown and "How good is the explanation" in shown
