"""Graders as co-processes: verdicts, time limits, crashes, big completions, and that they die with their owner."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.errors import ConfigError
from rollout.grading import GradeResult, GraderPool

COUNTDOWN = {"numbers": [3, 5, 8], "target": 16}

# A user's task whose grader does as the completion says.
MOODY = """
import os, subprocess, sys, time
from rewards.task import Grade, Task

class Moody(Task):
    name = "moody"
    components = ("first", "second")
    def problems(self, split, *, seed, size, path=None):
        return []
    def messages(self, fields):
        return []
    def validate_fields(self, fields):
        pass
    def grade(self, fields, completion):
        mood = completion.split(":")[0]
        if mood == "sleep":
            time.sleep(float(completion.split(":")[1]))
        if mood == "hang_once" and not os.path.exists(fields["flag"]):
            open(fields["flag"], "w").close()
            time.sleep(600)
        if mood == "child":
            child = subprocess.Popen(["sleep", "600"])
            open(completion.split(":")[1], "w").write(str(child.pid))
            time.sleep(600)
        if mood == "die":
            os._exit(3)
        if mood == "die_once" and not os.path.exists(fields["flag"]):
            open(fields["flag"], "w").close()
            os._exit(3)
        if mood == "print":
            print("not a verdict")
        if mood == "write":
            os.write(1, b"not a verdict\\n")
            sys.__stdout__.write("nor this\\n")
            subprocess.run(["echo", "nor that"], check=True)
        if mood == "raise":
            raise RuntimeError("a bug in the task")
        if mood == "nan":
            return Grade(True, {"first": float("nan"), "second": 1.0})
        if mood == "huge":
            return Grade(True, {"first": 1e300, "second": 1.0})
        if mood == "missing":
            return Grade(True, {"first": 1.0})
        return Grade(True, {"second": 0.25, "first": float(os.getpid())})
"""


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GraderPool]:
    (tmp_path / "moody_task.py").write_text(MOODY)
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = GraderPool("moody_task:Moody", workers=1, timeout_s=1.0)
    yield pool
    pool.close()
    sys.modules.pop("moody_task", None)


def grade(pool: GraderPool, completion: str, **fields: object) -> GradeResult:
    return pool.collect([pool.submit(fields, completion)])[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_verdicts_in_order_of_submission() -> None:
    pool = GraderPool("countdown", workers=2, timeout_s=10.0)
    try:
        answers = ["<answer>(8-3)*5=25</answer>", "<answer>8+5+3=16</answer>", "x" * 2_000_000, "\ud800 \u0663"] * 5
        results = pool.collect([pool.submit(COUNTDOWN, answer) for answer in answers])
        assert [result.correct for result in results] == [False, True, False, False] * 5
        assert tuple(results[1].components) == pool.components
        assert results[1].reward > results[0].reward
        assert not any(result.timed_out or result.crashed or result.invalid for result in results)
    finally:
        pool.close()


def test_slow_verdict_is_killed_twice_and_the_next_one_is_fine(moody: GraderPool) -> None:
    first = int(grade(moody, "fine").components["first"])
    begin = time.monotonic()
    slow = grade(moody, "sleep:600")
    assert time.monotonic() - begin < 5.0
    assert slow.timed_out and not slow.correct and not slow.invalid
    assert slow.fault is not None and (slow.fault.cause, slow.fault.graded) == ("hung", False)
    assert slow.components == {"first": 0.0, "second": 0.0}
    assert gone_within(first, 5.0)
    after = grade(moody, "fine")
    assert after.correct and int(after.components["first"]) != first
    inside = grade(moody, "sleep:0.3")
    assert not inside.timed_out and inside.fault is None, "the control: inside the limit"


def test_what_a_grader_started_dies_with_it(moody: GraderPool, tmp_path: Path) -> None:
    assert grade(moody, f"child:{tmp_path / 'pid'}").timed_out
    assert gone_within(int((tmp_path / "pid").read_text()), 5.0)


@pytest.mark.parametrize("cause, mood", [("died", "die_once"), ("hung", "hang_once")])
def test_a_lost_grader_costs_no_verdict(cause: str, mood: str, moody: GraderPool, tmp_path: Path) -> None:
    verdict = grade(moody, mood, flag=str(tmp_path / "flag"))
    assert verdict.correct and verdict.error is None and not verdict.failed and not verdict.missing
    assert verdict.fault is not None and (verdict.fault.cause, verdict.fault.graded) == (cause, True)


def test_a_completion_over_which_two_graders_die_is_wrong(moody: GraderPool) -> None:
    dead = grade(moody, "die")
    assert dead.crashed and not dead.correct and dead.reward == 0.0
    assert dead.error == "the grader ended with code 3"
    assert dead.fault is not None and (dead.fault.cause, dead.fault.graded) == ("died", False)
    assert grade(moody, "fine").fault is None


@pytest.mark.parametrize(
    ("completion", "invalid"),
    [
        ("nan", "reward component first is not a finite number"),
        ("huge", "reward component first is not a finite number"),
        ("missing", "reward component second is missing"),
        ("raise", "task raised RuntimeError"),
        ("print", None),
        ("write", None),
        ("fine", None),
    ],
)
def test_unusable_rewards_are_invalid(moody: GraderPool, completion: str, invalid: str | None) -> None:
    result = grade(moody, completion)
    assert result.invalid == invalid and not result.failed
    assert tuple(result.components) == ("first", "second")
    if completion == "raise":
        assert result.error == "task raised RuntimeError: a bug in the task"


def test_close_ends_a_busy_grader_and_cancels_the_rest(moody: GraderPool) -> None:
    pid = int(grade(moody, "fine").components["first"])
    futures = [moody.submit({}, "sleep:600") for _ in range(3)]
    begin = time.monotonic()
    moody.close()
    assert time.monotonic() - begin < 5.0
    assert all(future.cancelled() or future.done() for future in futures)
    assert gone_within(pid, 5.0)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 1 worker"):
        GraderPool("countdown", workers=0, timeout_s=1.0)
    with pytest.raises(ConfigError, match="nothing_like_it"):
        GraderPool("nothing_like_it", workers=1, timeout_s=1.0)


@pytest.mark.parametrize("mood", ["fine", "sleep:600"])
def test_graders_die_with_a_killed_owner(tmp_path: Path, mood: str) -> None:
    """Idle ones see the end of their input; busy ones are killed by the kernel."""
    (tmp_path / "moody_task.py").write_text(MOODY)
    owner = f"""
import time
from rollout.grading import GraderPool
pool = GraderPool("moody_task:Moody", workers=1, timeout_s=600.0)
print(int(pool.submit({{}}, "fine").result(timeout=60).components["first"]), flush=True)
pool.submit({{}}, {mood!r})
time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", owner],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
    )
    try:
        assert process.stdout is not None
        grader = int(process.stdout.readline())
        time.sleep(0.3)
        assert alive(grader)
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert gone_within(grader, 5.0)
