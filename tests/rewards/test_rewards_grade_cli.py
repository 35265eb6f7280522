"""``python -m rewards.grade`` as a real process: one line out for every line in, whatever the line holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.grade import MAX_LINE_BYTES

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"id": "a", "completion": "<answer>(3+5)*2=16</answer>", "numbers": [3, 5, 2], "target": 16}


def run(
    *arguments: str, stdin: bytes = b"", path: Path | None = None
) -> tuple[subprocess.CompletedProcess[bytes], list[dict]]:
    environment = {"PYTHONPATH": f"{ROOT}{':' + str(path) if path else ''}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "rewards.grade", *arguments],
        input=stdin,
        capture_output=True,
        timeout=60,
        env=environment,
    )
    if arguments == ("--help",):
        return done, []
    return done, [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]


def test_right_and_wrong_lines() -> None:
    wrong = {**GOOD, "id": 2, "completion": "<answer>3*5+2=16</answer>"}
    done, records = run("--task", "countdown", stdin=(json.dumps(GOOD) + "\n" + json.dumps(wrong)).encode())
    assert done.returncode == 0 and done.stderr == b"2 graded, 1 of them right (0.500)\n"
    assert records[0] == {
        "id": "a",
        "correct": True,
        "reward": pytest.approx(4.0),
        "components": {"one_equals": 0, "right_side": 1 / 3, "left_side": 1 / 3, "numbers": 1 / 3, "value": 3.0},
        "error": None,
    }
    assert (records[1]["id"], records[1]["correct"], records[1]["reward"]) == (2, False, pytest.approx(1.0))
    assert "is 17, not 16" in records[1]["error"]


def test_sudoku_with_and_without_a_solution() -> None:
    line = {"id": 1, "completion": "<answer>4321123434122143</answer>", "puzzle": "0321003004002100"}
    lines = [line, {**line, "solution": "4321123434122143"}, {**line, "solution": "1" * 16}]
    _, records = run("--task", "sudoku", stdin="\n".join(map(json.dumps, lines)).encode())
    assert [record["reward"] for record in records] == [4.0, 4.0, 0.0]
    assert "does not solve" in records[2]["error"]


def without(field: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD.items() if key != field}).encode()


def changed(**fields: object) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


BAD = [
    (b"not json", None, "not usable as JSON"),
    (b"", None, "not usable as JSON"),
    (b"[1]", None, "not a JSON object"),
    (b"null", None, "not a JSON object"),
    (b"\xff\xfe", None, "not UTF-8"),
    (b"[" * 100_000, None, "nested too deeply"),
    (without("completion"), "a", "completion is missing"),
    (without("target"), "a", "target must be an integer"),
    (without("numbers"), "a", "numbers must be a list"),
    (changed(completion=5), "a", "completion must be a string"),
    (changed(completion=None), "a", "completion must be a string"),
    (changed(numbers="3,5,2"), "a", "numbers must be a list"),
    (changed(numbers=[3, 5, 2.5]), "a", "each of numbers"),
    (changed(numbers=[3, 5, 10**50]), "a", "each of numbers"),
    (changed(target="16"), "a", "target must be"),
    (changed(fields=[3, 5, 2]), "a", "fields must be an object"),
    (changed(id=[1]), None, "id must be"),
    (changed(target=float("nan")), None, "NaN is not a JSON number"),
    (changed(target=float("inf")), None, "Infinity is not a JSON number"),
    (changed(target=0).replace(b'"target": 0', b'"target": 1e999'), "a", "target must be"),
    (changed(id=0).replace(b'"id": 0', b'"id": 1e999'), None, "id must be"),
    (changed(target=0).replace(b'"target": 0', b'"target": ' + b"9" * 5000), None, "a number has 5000 digits"),
]


def test_bad_lines_are_reported_and_not_fatal() -> None:
    good = json.dumps(GOOD).encode()
    lines = [good] + [line for bad, _, _ in BAD for line in (bad, good)]
    done, records = run("--task", "countdown", stdin=b"\n".join(lines))
    assert done.returncode == 0 and len(records) == len(lines)
    (said,) = done.stderr.decode().splitlines()
    assert said.startswith(
        f"{len(BAD) + 1} graded, {len(BAD) + 1} of them right (1.000); {len(BAD)} lines could not be"
    )
    assert "(line 2: not usable as JSON" in said
    assert all(record["correct"] and record["id"] == "a" for record in records[::2])
    for number, (record, (line, known_id, error)) in enumerate(zip(records[1::2], BAD, strict=True)):
        assert (record["correct"], record["reward"], record["components"]) == (False, 0, {}), line[:60]
        assert record["id"] == known_id and error in record["error"], (line[:60], record)
        assert f"line {2 * number + 2}: " in record["error"] and len(record["error"]) < 400


def test_the_fields_may_be_an_object_of_their_own() -> None:
    """As in a run's completions.jsonl: other keys of the line are then no fields, whatever their names."""
    fields = {"numbers": [3, 5, 2], "target": 16}
    line = {"id": "a", "completion": GOOD["completion"], "target": 17, "fields": fields}
    done, records = run(
        "--task", "countdown", stdin="\n".join(map(json.dumps, [line, {**line, "fields": {}}])).encode()
    )
    assert [record["correct"] for record in records] == [True, False]
    assert "line 2: numbers must be a list" in records[1]["error"], "nothing is taken from beside it"


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (without("target") + b"\n" + b"nonsense", "none of 2 lines could be graded; line 1: target must be an integer"),
        (b"", "no line came in"),
    ],
)
def test_a_file_of_which_nothing_can_be_graded_fails(stdin: bytes, said: str) -> None:
    done, records = run("--task", "countdown", stdin=stdin)
    assert done.returncode == 1 and len(records) == len(stdin.splitlines())
    assert done.stderr.decode().startswith(f"error: {said}") and len(done.stderr.splitlines()) == 1


def test_the_format_that_help_shows_is_the_one_that_is_read() -> None:
    done, _ = run("--help")
    examples = [line for line in done.stdout.splitlines() if line.startswith(b'  {"id"')]
    assert len(examples) == 3
    graded, records = run("--task", "countdown", stdin=b"\n".join(examples[:2]))
    assert graded.stderr.startswith(b"2 graded, 1 of them right") and records[0]["reward"] == pytest.approx(4.0)


def test_odd_but_good_lines() -> None:
    lines = [
        b"\xef\xbb\xbf" + without("id") + b"\r",  # a BOM, no id, a carriage return
        changed(note="extra fields are ignored", id=None),
        changed(id=2.5),
        changed(completion="\ud800\x00"),
        changed(id="\ud800"),
    ]
    done, records = run("--task", "countdown", stdin=b"\n".join(lines))
    assert [record["id"] for record in records] == [None, None, 2.5, "a", "\ud800"]
    assert [record["correct"] for record in records] == [True, True, True, False, True]
    assert done.returncode == 0


def test_a_line_over_the_limit_is_one_bad_line() -> None:
    good = json.dumps(GOOD).encode()
    _, records = run("--task", "countdown", stdin=good + b"\n" + b"x" * (MAX_LINE_BYTES * 2 + 5) + b"\n" + good + b"\n")
    assert [record["correct"] for record in records] == [True, False, True]
    assert "longer than" in records[1]["error"]


@pytest.mark.parametrize("arguments", [[], ["--task", "sudku"], ["--task", "no_such_module:X"]])
def test_a_missing_or_unknown_task_is_one_sentence_and_status_2(arguments: list[str]) -> None:
    done, records = run(*arguments, stdin=json.dumps(GOOD).encode())
    assert done.returncode == 2 and records == []
    assert len(done.stderr.splitlines()) == 1 and b"task" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.timeout(60)
def test_as_a_co_process_every_line_is_answered_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.grade", "--task", "countdown"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},  # without PYTHONUNBUFFERED, which would hide lines held back
    )
    assert process.stdin and process.stdout
    try:
        for number in range(5):  # would block until the timeout above if lines were held back
            process.stdin.write(json.dumps({**GOOD, "id": number}).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == number
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    command = f"yes '{json.dumps(GOOD)}' | head -20000 | {sys.executable} -m rewards.grade --task countdown | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, cwd=ROOT)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


USER_TASKS = """
from rewards.errors import DataError
from rewards.task import Grade, Task
print("printed at import")

class Base(Task):
    name = "own"
    components = ("a", "b")
    def problems(self, split, *, seed, size, path=None): return []
    def messages(self, fields): return []
    def validate_fields(self, fields): pass

class Own(Base):
    def grade(self, fields, completion):
        print("printed while grading")
        if completion == "nan": return Grade(True, {"a": float("nan"), "b": 1.0})
        if completion == "overflow": return Grade(True, {"a": 1.7e308, "b": 1.7e308})
        if completion == "raise": raise RuntimeError("x" * 10_000)
        if completion == "data": raise DataError("field q is missing")
        if completion == "nothing": return None
        if completion == "text": return Grade(True, {"a": "high"})
        return Grade(True, {"a": 1, "b": 2.5}, error=None)
"""


def test_a_users_task_cannot_break_the_output(tmp_path: Path) -> None:
    (tmp_path / "own_grader.py").write_text(USER_TASKS)
    kinds = ["nan", "overflow", "raise", "data", "nothing", "text", "fine"]
    stdin = "\n".join(json.dumps({"id": kind, "completion": kind}) for kind in kinds).encode()
    done, records = run("--task", "own_grader:Own", stdin=stdin, path=tmp_path)
    assert done.returncode == 0 and b"printed" in done.stderr and b"printed" not in done.stdout
    by_id = {record["id"]: record for record in records}
    assert list(by_id) == kinds
    assert by_id["nan"]["reward"] is None and by_id["nan"]["components"] == {"a": None, "b": 1.0}
    assert "not a finite number (components a)" in by_id["nan"]["error"]
    assert by_id["overflow"]["reward"] is None and "finite" in by_id["overflow"]["error"]
    assert "task raised RuntimeError" in by_id["raise"]["error"] and len(by_id["raise"]["error"]) < 400
    assert "field q is missing" in by_id["data"]["error"]
    for kind in ("raise", "data", "nothing", "text"):
        assert (by_id[kind]["correct"], by_id[kind]["reward"]) == (False, 0)
    assert by_id["fine"] == {
        "id": "fine", "correct": True, "reward": 3.5, "components": {"a": 1.0, "b": 2.5}, "error": None
    }  # fmt: skip


def test_grading_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, rewards.grade; from rewards.task import get_task; get_task('sudoku'); get_task('countdown'); "
        "assert 'rewards.tasks.countdown' in sys.modules; print(sorted({'torch', 'numpy', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, cwd=ROOT, text=True)
    assert done.stdout.strip() == "[]", done.stderr
