"""A judge beside the graders of a run: one more part of any task's reward, and a completion without a score is none."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.errors import ConfigError, DataError
from rewards.judge.judged import load_task
from rewards.judge.reply import JudgeFailed
from rewards.judge.settings import UNJUDGED, JudgeSettings, read_settings
from rewards.task import BUILT_IN, get_task
from rollout.grading import GraderPool
from tests.support.judges import JudgeServer, body, chat, echoes, hang, judge_server
from tests.support.judges import settings as quick

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"question": "What is 6 * 7?", "answer": "42"}
RIGHT, WRONG = "<think>Six sevens.</think><answer>42</answer>", "<answer>41</answer>"
KEY = "sk-very-secret-1234"

OWN = """
from rewards.task import Grade, Task

class Own(Task):
    name = "own"
    components = ("judge",)
    def problems(self, split, *, seed, size, path=None):
        return []
    def messages(self, fields):
        return []
    def validate_fields(self, fields):
        pass
    def grade(self, fields, completion):
        return Grade(True, {"judge": 1.0})
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    with judge_server() as judge:
        yield judge


def pool(settings: JudgeSettings, task: str = "gsm8k", workers: int = 1) -> GraderPool:
    return GraderPool(task, workers=workers, timeout_s=settings.timeout_s + 3, judge=settings)


def test_the_judge_s_part_stands_beside_the_task_s(server: JudgeServer) -> None:
    server.faults = [body(chat("5")), body(chat("2"))]
    graders = pool(quick(server, weight=2.0, fields=("answer",)))
    assert graders.components == ("think_tag", "answer_tag", "correct", "judge")
    good, bad, empty = graders.collect([graders.submit(FIELDS, text) for text in (RIGHT, WRONG, " <|endoftext|>")])
    graders.close()
    assert (good.correct, good.components) == (
        True,
        {"think_tag": 0.5, "answer_tag": 0.5, "correct": 3.0, "judge": 2.0},
    )
    assert (bad.correct, bad.components["judge"], bad.reward) == (False, 0.5, 1.0)
    assert bad.error == get_task("gsm8k").grade(FIELDS, WRONG).error, "the verdict is the task's own"
    assert empty.components["judge"] == 0.0 and len(server.asked) == 2, "nothing isn't judged"
    shown = server.asked[0]["messages"][1]["content"]
    assert "user: What is 6 * 7?" in shown and RIGHT in shown and "\n42\n[end of field answer" in shown


def test_a_completion_without_a_score_is_no_zero(server: JudgeServer) -> None:
    server.faults = [body(chat("9")), body(b"", 404), hang(9)]
    graders = pool(quick(server, timeout_s=1.0))
    failed = graders.collect([graders.submit(FIELDS, f"{RIGHT}{number}") for number in range(4)])
    graders.close()
    assert failed.pop().invalid is None, "the next one is judged again"
    for grade, told in zip(failed, ("wrote 9", "status 404", "no score within 1 s"), strict=True):
        assert grade.invalid == "task raised JudgeFailed" and told in (grade.error or "")
        assert not grade.failed and str(grade.reward) == "nan", "it is dropped, and cannot be added up by accident"


def test_the_verdict_can_be_the_judge_s(server: JudgeServer) -> None:
    server.faults = [body(chat("4")), body(chat("3"))]
    task = load_task("open_prompts", quick(server, right_from=4.0))
    good, bad = (task.grade({"prompt": "Tell a joke."}, text) for text in ("Knock knock.", "No."))
    assert (good.correct, good.components, good.error) == (True, {"judge": 0.75}, None)
    assert (bad.correct, bad.components) == (
        False,
        {"judge": 0.5},
    ) and bad.error == "the judge's score is 3, less than 4"


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_any_task_can_be_judged_and_stays_itself(name: str, server: JudgeServer) -> None:
    plain, judged = get_task(name), load_task(name, quick(server, right_from=4.0))
    assert isinstance(judged, type(plain)) and judged.name == name
    assert judged.components == (*plain.components, "judge") and judged.default_sources == plain.default_sources
    assert judged.time_limit_s == plain.time_limit_s + 6.0
    assert get_task(name).components == plain.components, "the task itself is left as it was"


def test_what_cannot_be_judged(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="a reward part 'judge' of its own"):
        load_task("own_task:Own", quick(server))
    with pytest.raises(ConfigError, match="only a judge can grade task open_prompts"):
        load_task("open_prompts", UNJUDGED)
    with pytest.raises(ConfigError, match="no verdict of its own; set task.judge.right_from"):
        load_task("open_prompts", quick(server))
    with pytest.raises(ConfigError, match="rubric is missing"):
        load_task("gsm8k", quick(server, rubric=None))
    with pytest.raises(ConfigError, match="rollout.grade_timeout_s=5 is less than .* set it to 7 or more"):
        GraderPool("gsm8k", workers=1, timeout_s=5.0, judge=quick(server))
    with pytest.raises(DataError, match="no field proof"):
        load_task("gsm8k", quick(server, fields=("proof",))).grade(FIELDS, RIGHT)
    assert not server.asked


def test_open_prompts_from_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "reference": "b"}, {"instruction": "c", "output": "d"}, {"question": "e"}]
    rows += [{"instruction": "Sum up.", "input": "f", "output": "g"}, {"instruction": "h", "input": "", "output": "i"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task("open_prompts")
    problems = task.problems("train", seed=0, size=9, path=str(tmp_path / "rows.jsonl"))
    assert [(p.fields["prompt"], p.fields["reference"]) for p in problems] == [
        *(("a", "b"), ("c", "d"), ("e", None), ("Sum up.\n\nf", "g"), ("h", "i"))
    ]
    with pytest.raises(ConfigError, match="set task.train_path"):
        task.problems("train", seed=0, size=9)
    for bad in ({"prompt": ""}, {"prompt": 3}, {"prompt": "a", "reference": 3}):
        with pytest.raises(DataError):
            task.grade(bad, "a")


def test_the_key_stays_out_of_command_lines_and_messages(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.faults = [echoes(400)]
    graders = pool(quick(server, key_variable="JUDGE_KEY"))
    failed, good = graders.collect([graders.submit(FIELDS, text) for text in (RIGHT, WRONG)])
    children = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if b"rewards.grade" in _read(path)]
    graders.close()
    assert failed.invalid and "repeats the key" in (failed.error or "") and good.invalid is None
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    out, err = capfd.readouterr()
    assert children and KEY not in out + err + repr(failed) + repr(children)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_key_that_is_missing_ends_the_run(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    graders = pool(quick(server, key_variable="JUDGE_KEY"))
    with pytest.raises(ConfigError, match="can't start on this machine"):
        graders.collect([graders.submit(FIELDS, RIGHT)])
    graders.close()


def grade_file(*arguments: str, lines: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "rewards.grade", "--task", "gsm8k", *arguments],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


def test_a_file_is_judged(server: JudgeServer) -> None:
    server.faults = [body(chat("5")), body(chat("x"))]
    lines = [{"id": 1, "completion": RIGHT, "fields": FIELDS}, {"id": 2, "completion": WRONG, "fields": FIELDS}]
    done = grade_file("--judge", quick(server).model_dump_json(), lines=lines)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["components"]["judge"] == 1.0 and first["correct"]
    assert second["components"] == {} and "task raised JudgeFailed: judge tiny at" in second["error"]
    assert "1 graded, 1 of them right (1.000); 1 lines could not be graded" in done.stderr


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ("{", "the judge's settings can't be used"),
        ('{"modell": "m"}', "modell: Extra inputs"),
        ('{"model": "m", "lowest": 1.5}', "lowest: Input should be a valid integer"),
        ('{"model": "m"}', "task.judge.rubric is missing"),
    ],
)
def test_settings_that_cannot_be_used(judge: str, told: str) -> None:
    done = grade_file("--judge", judge, lines=[])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr


def test_settings_survive_the_command_line(server: JudgeServer) -> None:
    given = quick(server, request={"stop": ["\n"], "seed": None}, fields=("answer",), rubric='\u00e9 "quoted"\n$x')
    assert read_settings(given.model_dump_json()) == given


def test_graders_judge_beside_each_other(server: JudgeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed: what a judged completion takes through the graders, next to one that only the task grades."""
    costs = {}
    for name, graders in (("judged", pool(quick(server))), ("task alone", GraderPool("gsm8k", workers=1, timeout_s=5))):
        graders.collect([graders.submit(FIELDS, RIGHT)])
        begin = time.perf_counter()
        grades = graders.collect([graders.submit(FIELDS, f"{RIGHT}{number}") for number in range(100)])
        costs[name] = 10 * (time.perf_counter() - begin)
        graders.close()
        assert all(grade.correct for grade in grades)
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {cost:.2f} ms" for name, cost in costs.items()) + " a completion")
    assert server.most_at_once == 1, "one grader asks one question at a time"


def test_a_judge_raises_where_the_task_is_graded_in_this_process(server: JudgeServer) -> None:
    server.faults = [body(chat("none"))]
    with pytest.raises(JudgeFailed):
        load_task("gsm8k", quick(server)).grade(FIELDS, RIGHT)
