"""MBPP and HumanEval: the program in a completion, problems and splits, verdicts on references and on mutants."""

import ast
import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from learner.settings.run import load_config
from rewards.errors import ConfigError, DataError
from rewards.sandbox.runner import run_program
from rewards.task import get_task
from rewards.tasks.code import LIMITS, MAX_CHARACTERS, MAX_FIELD, code_in
from rewards.tasks.humaneval import HumanEval
from rewards.tasks.mbpp import Mbpp
from rollout.grading import GraderPool
from tests.support.sandboxed import family, running

MBPP, HUMANEVAL = Mbpp(), HumanEval()
ADD: dict[str, Any] = {"text": "Write a function to add.", "tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}
ADD_RIGHT = "def add(a, b):\n    return a + b"
DOUBLE: dict[str, Any] = {
    "prompt": "from typing import List\n\ndef helper(x):\n    return 2 * x\n\n"
    'def double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    y = helper(2)\n    assert candidate(2) == y\n",
}


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


EXTRACTIONS = [
    (fenced("x = 1"), "x = 1\n", "fence", "a Python block"),
    (fenced("x = 1", ""), "x = 1\n", "fence", "a block without a language"),
    (fenced("x = 1", "py") + fenced("x = 2", "text"), "x = 1\n", "fence", "Python before a later block"),
    (fenced("x = 1") + fenced("x = 2", "Python"), "x = 2\n", "fence", "the last Python block"),
    (fenced("x = 1", "text") + fenced("x = 2", ""), "x = 2\n", "fence", "the last of others"),
    (fenced("x = 1") + "```python\nx = 2", "x = 1\n", "fence", "a complete one before one that is cut off"),
    ("```python\nx = 1\n```python\nx = 2\n```", "x = 2\n", "fence", "a Python fence always opens"),
    ("So ```python\nx = 1\n```", "x = 1\n", "fence", "not at the start of its line"),
    ("```python x = 1```", "x = 1", "fence", "on one line"),
    ("```python\r\nx = 1\r\n```", "x = 1\n", "fence", "Windows line ends"),
    ("<answer>\nx = 1\n</answer>", "x = 1", "answer", "an answer tag"),
    ("<answer>x = 1</answer>" + fenced("x = 2"), "x = 2\n", "fence", "a fence before a tag"),
    ("<answer>" + fenced("x = 2") + "</answer>", "x = 2\n", "fence", "a fence in a tag"),
    ("<think>" + fenced("x = 1") + "</think>x = 2", "x = 2", "text", "not what was thought"),
    ("I say ```python\nx = 1\n", "x = 1\n", "open fence", "cut off"),
    ("    return 1\n", "    return 1\n", "text", "a continuation"),
    ("<think>so</think>    return 1\n", "    return 1\n", "text", "a continuation after thinking"),
    ("", "", "text", "nothing"),
    ("```", "", "open fence", "a lone fence"),
    ("``````", "", "open fence", "a long one"),
    ("``` ```", "", "fence", "an empty block"),
    ("``` python\nx = 1\n```", "x = 1\n", "fence", "a space before the language"),
    ("````python\nx = 1\n````", "x = 1\n", "fence", "four backticks"),
    ("````python\nx = '```'\n````", "x = '```'\n", "fence", "a longer fence is not closed by a shorter one"),
    ("~~~python\nx = 1\n~~~", "x = 1\n", "fence", "tildes"),
    ("```python:add.py\nx = 1\n```", "x = 1\n", "fence", "a label"),
    ("```{.python}\nx = 1\n```", "x = 1\n", "fence", "attributes"),
    ("1. So:\n   ```python\n   if 1:\n       x = 1\n   ```", "if 1:\n    x = 1\n", "fence", "in a list"),
    ("x = 1\n```", "x = 1\n", "text", "a stray closing fence"),
    ("x = 1\n```\nThis sets x.", "x = 1\n", "text", "and words behind it"),
    ('```python\ndef x():\n    """\n    ```\n    x()\n    ```\n    """\n```',
     'def x():\n    """\n    ```\n    x()\n    ```\n    """\n', "fence", "a fence in a docstring"),
    (fenced("x = 1") + fenced("print(x)"), "x = 1\n", "fence", "usage after it"),
    (fenced("print(x)") + fenced("x = 1"), "x = 1\n", "fence", "usage before it"),
    (fenced("import math") + fenced("x = math.e"), "import math\n\nx = math.e\n", "fence", "imports of their own"),
    (fenced("x = y()") + fenced("def y():\n    return 1"), "x = y()\n\ndef y():\n    return 1\n", "fence", "a helper"),
    (fenced("x = = 1") + fenced("x = 2"), "x = 2\n", "fence", "a broken draft is left out"),
    (fenced("y = 1") + fenced("print(y)"), "y = 1\n\nprint(y)\n", "fence", "all of them where none defines the name"),
    (fenced("print(x)") + "```python\nx = 1", "x = 1", "open fence", "cut off, and the one that defines the name"),
    (fenced("pip install x", "bash") + fenced("x = 1", ""), "x = 1\n", "fence", "another language"),
    ("x = 1<|eot_id|><|endoftext|>", "x = 1", "text", "special tokens at the end"),
    ("<|im_start|>" + fenced("x = 1<|mdm_mask|>") + "<|im_end|>", "x = 1\n", "fence", "and anywhere"),
    ("<think>" + fenced("x = 1"), "", "text", "thinking that is not closed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("completion", "text", "place"), [row[:3] for row in EXTRACTIONS], ids=[r[3] for r in EXTRACTIONS]
)
def test_the_program_in_a_completion(completion: str, text: str, place: str) -> None:
    code = code_in(completion, ["x"])
    assert (code.text, code.place) == (text, place)


@pytest.mark.parametrize("piece", ["```", "```python\n", "<answer>", "<think>", "x\n", "`", "\ud800"])
def test_extraction_is_bounded(piece: str) -> None:
    begin = time.perf_counter()
    for repeats in (1, 1000, 2_000_000 // len(piece)):
        assert len(code_in(piece * repeats, ["x"]).text) <= MAX_CHARACTERS
    assert time.perf_counter() - begin < 2.0


def test_mbpp_verdicts_and_rewards() -> None:
    right = MBPP.grade(ADD, fenced(ADD_RIGHT))
    assert (right.correct, right.components, right.error) == (
        True,
        {"format": 0.25, "tests": 0.75, "passed": 1.0},
        None,
    )
    bare = MBPP.grade(ADD, ADD_RIGHT)
    assert bare.correct and bare.components["format"] == 0, "right, without credit for the form"
    half = MBPP.grade(ADD, fenced("def add(a, b):\n    return 4"))
    assert not half.correct and half.components == {"format": 0.25, "tests": 0.375, "passed": 0.0}
    assert "failed: wrong: assert add(1, 2) == 3" in (half.error or "")
    broken = MBPP.grade(ADD, fenced("def add(a, b) return a"))
    assert broken.reward == 0 and "SyntaxError" in (broken.error or "")
    for completion in ("", "   ", "```python\n\n```"):
        assert MBPP.grade(ADD, completion).error == "there is no program"
    prose = MBPP.grade(ADD, "The answer is 3.")
    assert prose.reward == 0 and not prose.correct


CHEATS = [
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "class Same:\n    def __eq__(self, other): return True\ndef add(a, b): return Same()",
    "def add(a, b):\n    raise SystemExit(0)",
    "import builtins\nbuiltins.AssertionError = StopIteration\ndef add(a, b): return 0",
]


@pytest.mark.parametrize("program", CHEATS)
def test_cheats_earn_nothing_but_the_form(program: str) -> None:
    grade = MBPP.grade(ADD, fenced(program))
    assert not grade.correct and grade.components["tests"] == grade.components["passed"] == 0


CONTINUATIONS = [
    ("    return 2 * x\n", True, "the body"),
    ("return 2 * x", True, "its first indentation is missing"),
    ("y = x\n    return helper(y)\n", True, "only its first"),
    ("    return 2 * x\n\nprint(double(5))\nx = [", True, "what follows the body is cut off"),
    (fenced("return helper(x)"), True, "a body in a fence"),
    (fenced("    return helper(x)"), True, "an indented body in a fence"),
    (fenced("def double(x):\n    return helper(x)"), True, "the function, with a helper of the prompt"),
    (
        fenced("from __future__ import annotations\ndef double(x: List[int]):\n    return x + x"),
        True,
        "a future import",
    ),
    (fenced("def other(x):\n    return 2 * x"), False, "another function"),
    ("    return x\n", False, "a wrong body"),
    ("The function doubles.", False, "prose"),
]


@pytest.mark.parametrize(("completion", "right"), [row[:2] for row in CONTINUATIONS], ids=[r[2] for r in CONTINUATIONS])
def test_humaneval_completions(completion: str, right: bool) -> None:
    grade = HUMANEVAL.grade(DOUBLE, completion)
    assert grade.correct is right, grade


def test_humaneval_counts_the_assertions() -> None:
    grade = HUMANEVAL.grade(DOUBLE, "    return 4\n")
    assert grade.components["tests"] == 0.375 and not grade.correct


BAD_FIELDS = [
    (MBPP, ADD, {"text": None}, "text must be text"),
    (MBPP, ADD, {"tests": []}, "at least one assert"),
    (MBPP, ADD, {"tests": "assert add(1) == 1"}, "tests must be a list"),
    (MBPP, ADD, {"tests": ["assert add(("]}, "is not Python"),
    (MBPP, ADD, {"tests": ["assert True"]}, "call no function"),
    (MBPP, ADD, {"setup": 5}, "setup must be text"),
    (MBPP, ADD, {"imports": [5]}, "imports must be a list"),
    (HUMANEVAL, DOUBLE, {"prompt": ""}, "prompt must be text"),
    (HUMANEVAL, DOUBLE, {"prompt": "def f(:"}, "beginning of a Python function"),
    (HUMANEVAL, DOUBLE, {"entry_point": "a b"}, "entry_point must be a function"),
    (HUMANEVAL, DOUBLE, {"test": "assert True"}, r"defines check\(candidate\)"),
    (HUMANEVAL, DOUBLE, {"test": "def check(candidate):\n    pass"}, "holds no assertion"),
]

DEEP = "1" + "+1" * 330
"""Python's parser takes it, what writes it down again doesn't."""
HUGE = "0x" + "f" * 5000
"""As a number it has more digits than Python writes."""
HOSTILE_FIELDS: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (HUMANEVAL, DOUBLE, {"test": f"def check(candidate):\n    assert {DEEP}"}, "line 2 of it .* recursion"),
    (HUMANEVAL, DOUBLE, {"test": f"x = {DEEP}\ndef check(candidate):\n    assert 1"}, "line 1 of it .* recursion"),
    (HUMANEVAL, DOUBLE, {"test": f"def check(candidate):\n    assert {HUGE}"}, "line 2 of it .* integer string"),
]
NO_PYTHON = [
    "x = '\0'",
    "x = '\ud800'",
    "(" * 250 + "1" + ")" * 250,
    "9" * 5000,
    "-" * 100_000 + "1",
    "a." * 99_999 + "a",
]
for text in NO_PYTHON:
    HOSTILE_FIELDS += [
        (MBPP, ADD, {"tests": [f"assert add({text})"]}, "is not Python"),
        (MBPP, ADD, {"imports": [text]}, "is not Python"),
        (HUMANEVAL, DOUBLE, {"test": f"def check(candidate):\n    assert {text}"}, "test "),
        (HUMANEVAL, DOUBLE, {"prompt": f"def double(x):\n    y = {text}\n"}, "prompt must be the beginning"),
    ]


@pytest.mark.parametrize(("task", "fields", "change", "message"), HOSTILE_FIELDS)
def test_fields_that_break_the_parser(task: Any, fields: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        task.validate_fields({**fields, **change})
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_what_breaks_them() -> None:
    """The control: why those are caught."""
    for text, error in ((DEEP, RecursionError), (HUGE, ValueError)):
        with pytest.raises(error):
            ast.unparse(ast.parse(text))
    for text in NO_PYTHON:
        with pytest.raises((SyntaxError, ValueError, RecursionError, MemoryError)):
            ast.parse(text)


@pytest.mark.parametrize(
    ("task", "fields", "name"),
    [(MBPP, ADD, name) for name in ("text", "tests", "setup", "imports")]
    + [(HUMANEVAL, DOUBLE, name) for name in ("prompt", "entry_point", "test")],
)
def test_a_field_is_only_so_long(task: Any, fields: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    monkeypatch.setattr(ast, "parse", lambda text: parsed.append(text))
    long = "x" * (MAX_FIELD // 2 + 1)
    value = [long, long] if name in ("tests", "imports") else long * 2
    with pytest.raises(DataError, match=f"{name} has [0-9]+ characters, the most is {MAX_FIELD}"):
        task.validate_fields({**fields, name: value})
    assert not any(long in text for text in parsed), "it is not even looked at"
    monkeypatch.undo()
    fits = "#" * MAX_FIELD
    if name in ("prompt", "test", "setup"):
        task.validate_fields({**fields, name: f"{fields.get(name, '')}{fits}"[:MAX_FIELD]})
    if name in ("tests", "imports"):
        task.validate_fields({**fields, name: [*fields.get(name, ()), "#" * (MAX_FIELD // 2)]})
        with pytest.raises(DataError, match="characters, the most is"):
            task.validate_fields({**fields, name: [""] * (MAX_FIELD + 2)})


@pytest.mark.parametrize(("task", "fields", "change", "message"), BAD_FIELDS)
def test_fields_that_make_no_problem(task: Any, fields: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task.grade({**fields, **change}, "x")
    task.validate_fields(fields)


def test_mbpp_splits(shared: Path) -> None:
    path = str(shared / "data" / "mbpp.jsonl.gz")
    train = MBPP.problems("train", seed=0, size=10**6, path=path)
    test = MBPP.problems("test", seed=0, size=10**6, path=path)
    assert (len(train), len(test)) == (374, 500), "the published split; prompts and validation are in neither"
    assert {problem.fields["task_id"] for problem in test} == set(range(11, 511))
    MBPP.check_disjoint(train, test)
    sanitized = MBPP.problems("test", seed=0, size=10**6, path=str(shared / "data" / "mbpp_sanitized.jsonl.gz"))
    assert len(sanitized) == 257
    with pytest.raises(DataError, match="share"):
        MBPP.check_disjoint(sanitized, test)
    content = MBPP.messages(train[0].fields)[0]["content"]
    assert train[0].fields["text"] in content and train[0].fields["tests"][0] in content
    assert "code" not in train[0].fields, "the reference solution does not go to the graders"


def test_humaneval_is_a_test_set(shared: Path) -> None:
    path = str(shared / "data" / "HumanEval.jsonl.gz")
    problems = HUMANEVAL.problems("test", seed=0, size=10**6, path=path)
    assert len(problems) == 164 and problems[0].fields.keys() == {"prompt", "entry_point", "test"}
    assert problems[0].fields["prompt"].strip() in HUMANEVAL.messages(problems[0].fields)[0]["content"]
    with pytest.raises(ConfigError, match="no training problems"):
        HUMANEVAL.problems("train", seed=0, size=5)
    assert len(HUMANEVAL.problems("train", seed=0, size=5, path=path)) == 5


def rows(shared: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(shared / "data" / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def references(shared: Path, name: str) -> list[tuple[Any, dict[str, Any], str]]:
    """(task, row, reference solution), the function's body indented for HumanEval."""
    if name == "HumanEval.jsonl.gz":
        return [(HUMANEVAL, row, row["canonical_solution"]) for row in rows(shared, name)]
    return [(MBPP, row, row["code"]) for row in rows(shared, name)]


SPECIAL = {
    126,
    367,
    533,
    596,
    601,
    927,
    82,
    "HumanEval/32",
    "HumanEval/33",
    "HumanEval/38",
    "HumanEval/53",
    "HumanEval/151",
}
"""A function called sum, trees built by the tests, modules, classes and types in the tests, helpers of the prompt."""


def test_some_reference_solutions_pass(shared: Path) -> None:
    found = [item for name in ("mbpp.jsonl.gz", "HumanEval.jsonl.gz") for item in references(shared, name)]
    chosen = [item for item in found if item[1]["task_id"] in SPECIAL] + found[20:1100:120]
    assert len(chosen) > len(SPECIAL)
    for task, row, solution in chosen:
        completion = solution if task is HUMANEVAL else fenced(solution)
        grade = task.grade(row, completion)
        assert grade.correct, (row["task_id"], grade)
        assert grade.reward == (1.75 if task is HUMANEVAL else 2.0)


def mutant(task: Any, row: dict[str, Any], solution: str) -> str:
    """The solution with a last word: what it returns, changed."""
    if task is HUMANEVAL:
        solution, name = row["prompt"] + solution, row["entry_point"]
    else:
        name = next(name for name in task.wanted(row) if f"def {name}" in solution)
    return f"{solution}\n_real = {name}\ndef {name}(*a):\n    return [_real(*a)]\n"


def test_mutants_of_them_fail(shared: Path) -> None:
    found = references(shared, "mbpp_sanitized.jsonl.gz")[::60] + references(shared, "HumanEval.jsonl.gz")[::40]
    for task, row, solution in found:
        assert not task.grade(row, fenced(mutant(task, row, solution))).correct, row["task_id"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbpp_sanitized.jsonl.gz", "HumanEval.jsonl.gz"])
def test_all_reference_solutions_pass_and_their_mutants_fail(shared: Path, name: str) -> None:
    patient = replace(LIMITS, seconds=200.0, cpu_seconds=60)  # the slowest took 2 to 7 s of CPU time
    for task, row, solution in references(shared, name):
        written = row["prompt"] + solution if task is HUMANEVAL else solution
        passed = run_program(task.job(row, code_in(fenced(written), task.wanted(row))), patient)
        assert passed.status == "passed", (row["task_id"], passed)
        failed = run_program(task.job(row, code_in(fenced(mutant(task, row, solution)), task.wanted(row))), patient)
        assert failed.status != "passed", row["task_id"]


def test_as_a_co_process_nothing_is_left_of_a_killed_grader() -> None:
    pool = GraderPool("mbpp", workers=1, timeout_s=MBPP.time_limit_s)
    try:
        assert pool.collect([pool.submit(ADD, fenced(ADD_RIGHT))])[0].correct
        [grader] = [pid for pid in family(os.getpid()) if b"rewards.grade" in command(pid)]
        busy = pool.submit(ADD, fenced("import os\nos.fork()\nwhile True: pass"))
        deadline = time.monotonic() + 10
        while len(family(grader)) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        processes = family(grader)
        assert len(processes) == 6, "grader, outer, server, judge, and the program twice"
    finally:
        pool.close()  # in the middle of the run: SIGKILL
    assert busy.cancelled()
    deadline = time.monotonic() + 10
    while any(map(running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, processes))


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_the_graders_time_limit_must_leave_room_for_the_tasks_own() -> None:
    assert MBPP.time_limit_s > LIMITS.seconds
    with pytest.raises(
        ConfigError, match="grade_timeout_s=2 is less than a verdict of the task mbpp may take; set it to 18"
    ):
        GraderPool("mbpp", workers=1, timeout_s=2.0)
    with pytest.raises(ConfigError, match="set it to 18 or more"):
        load_config(["task.name=mbpp"])
    assert load_config(["task.name=mbpp", "rollout.grade_timeout_s=18"]).task.name == "mbpp"
    assert load_config([]).rollout.grade_timeout_s == 2.0, "which is enough for the other tasks"


def test_without_a_sandbox_there_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion then counts neither as right nor as wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "rewards.grade", "--task", "mbpp"],
        input=json.dumps({**ADD, "id": 1, "completion": ADD_RIGHT}).encode(),
        capture_output=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
        env={"PATH": "/usr/bin:/bin", "UNMASK_CODE_RUNNER": "nowhere:Runner"},
    )
    assert done.returncode == 2 and done.stdout == b""
    assert b"UNMASK_CODE_RUNNER=nowhere:Runner can't be used" in done.stderr
    monkeypatch.setenv("UNMASK_CODE_RUNNER", "nowhere:Runner")
    with pytest.raises(ConfigError, match="can't be used"):
        MBPP.grade(ADD, ADD_RIGHT)
    pool = GraderPool("mbpp", workers=1, timeout_s=MBPP.time_limit_s)
    try:
        with pytest.raises(ConfigError, match="graders of mbpp can't start on this machine"):
            pool.collect([pool.submit(ADD, ADD_RIGHT)])
    finally:
        pool.close()


def test_the_tasks_are_known() -> None:
    assert isinstance(get_task("mbpp"), Mbpp) and isinstance(get_task("humaneval"), HumanEval)
