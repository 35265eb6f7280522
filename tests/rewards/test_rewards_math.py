r"""MATH: the task around ``rewards.maths.equivalence``, the shared files graded against themselves, the command."""

import gzip
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rewards.errors import DataError
from rewards.maths import equivalence
from rewards.task import Problem, get_task
from rewards.tasks.math import Math
from rewards.throughput import main as throughput
from tests.support.equivalence_cases import KILLERS

ROOT = Path(__file__).resolve().parents[2]
FILES = ("math_train", "math_test_rest", "math500_test")

COMPLETIONS = [  # gold, completion, right, reason
    (r"\frac{3}{4}", r"<think>a</think><answer>\boxed{\frac{3}{4}}</answer>", True, "the prompt's format"),
    (r"\frac{3}{4}", r"<answer>The probability is $\frac{3}{4}$.</answer>", True, "the only formula in the tag"),
    (r"\frac{3}{4}", r"<answer>$\frac{3}{4}$</answer>", True, "LaTeX in the tag"),
    (r"\frac{3}{4}", r"The answer is $\dfrac34$.", True, "a sentence"),
    (r"\frac{3}{4}", r"Thus $p = \boxed{\frac{3}{4}}$ and we are done.", True, "a box in a sentence"),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}", False, "a box that is not closed"),
    (r"\frac{3}{4}", r"$\frac{1}{4}$ is \boxed{\frac14}, so the rest is \boxed{\frac34}", True, "the last box"),
    ("2,3", r"The roots are $\boxed{2}$ and $\boxed{3}$.", True, "two boxes are a list"),
    ("2,3", r"\boxed{x = 2 \text{ or } x = 3}", True, "one box with both"),
    ("3", r"The roots are $\boxed{2}$ and $\boxed{3}$.", False, "and no answer to one of them"),
    ("28_9", r"This is $\boxed{28}$ or $\boxed{28_9}$.", True, "two boxes of the same answer"),
    ("(3,4)", r"So $(x,y) = \boxed{(3,4)}$", True, "a tuple"),
    (r"\text{(B)}", r"The answer is (B).", True, "a choice in a sentence"),
    (r"\text{(B)}", r"\boxed{B}", True, "and in a box"),
    (r"\text{Monday}", "The answer is Monday.", True, "text"),
    (r"[1,2)", r"The answer is $x \in [1,2)$.", True, "an interval"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", True, "a matrix"),
    ("x^2+1", r"\boxed{f(x) = x^2 + 1}", True, "a function's value"),
    ("12", r"\boxed{12\%}", True, "a percentage"),
    ("12", r"I do not know.", False, "no answer"),
    ("12", "So it is 12. " * 1000, True, "repetition of the right conclusion"),
    ("12", r"\boxed{" * 3000 + "12", False, "boxes that never close"),
]


@pytest.fixture(scope="module")
def task() -> Math:
    found = get_task("math")
    assert isinstance(found, Math)
    found.prepare()
    return found


@pytest.mark.parametrize(("gold", "completion", "right", "reason"), COMPLETIONS)
def test_completions(task: Math, gold: str, completion: str, right: bool, reason: str) -> None:
    grade = task.grade({"problem": "?", "answer": gold}, completion)
    assert (grade.correct, grade.error is None) == (right, right), (reason, grade.error)


REPEATED = [  # problem, gold, answer, right
    (r"Evaluate $\frac{6!}{3!}$.", "120", r"\frac{6!}{3!}", False),
    (r"Evaluate $\frac{6!}{3!}$.", "120", r"6\cdot5\cdot4", True),
    (r"Evaluate $\frac{6!}{3!}$.", "120", "120", True),
    ("Expand $(x+1)^2$.", "x^2+2x+1", "(x+1)^2", False),
    ("Expand $(x + 1)^{2}$.", "x^2+2x+1", "1+2x+x^2", True),
    (r"Simplify $\sqrt{50}$.", r"5\sqrt{2}", r"\sqrt{50}", False),
    ("What is $2+3$?", "5", "2+3", False),
    ("What is $2+3$, with 5 the usual guess?", "5", "5.0", True),
    ("Find $x$ if $x - 5 = 0$.", "5", "x=5", True),
]


@pytest.mark.parametrize(("problem", "gold", "answer", "right"), REPEATED)
def test_repeating_the_problem_does_not_solve_it(task: Math, problem: str, gold: str, answer: str, right: bool) -> None:
    grade = task.grade({"problem": problem, "answer": gold}, rf"\boxed{{{answer}}}")
    assert grade.correct == right
    assert right or "repeats the problem" in (grade.error or "")
    assert task.grade({"answer": gold}, rf"\boxed{{{answer}}}").correct, "the control: no problem to compare with"


def test_rows_of_the_published_files(task: Math) -> None:
    row: dict[str, Any] = {
        "problem": "P",
        "solution": r"\boxed{1} so \boxed{\frac12}",
        "level": "Level 3",
        "type": "Algebra",
    }
    assert task.fields_from_row(row) == {"problem": "P", "answer": r"\frac12", "level": 3, "subject": "Algebra"}
    assert task.fields_from_row(row | {"answer": "7", "level": 5})["level"] == 5  # type: ignore[index]
    assert task.fields_from_row(row | {"level": "Level ?"})["level"] is None  # type: ignore[index]
    assert task.fields_from_row(row | {"answer": ""}) is None
    for bad in ({"level": "hard"}, {"level": 6}, {"answer": None, "solution": "none"}, {"problem": ""}):
        with pytest.raises(DataError):
            task.fields_from_row(row | bad)


def test_leak_keys_of_the_shared_splits(task: Math, shared: Path) -> None:
    train, test = (_problems(task, shared, name) for name in ("math_train", "math500_test"))
    assert len(train) == 7498, "two rows of 7,500 have an empty box"
    assert len(task.without_leaks(train, test)) == len(train)
    with pytest.raises(DataError):
        task.check_disjoint([*train, test[0]], test)


@pytest.mark.slow
def test_gold_answers_are_right_and_others_wrong(task: Math, shared: Path) -> None:
    """Every gold answer equals itself, in a box, in a tag, in a sentence. Among random pairs of different golds, only
    those are taken for each other that the rules name: the same value in another spelling."""
    golds = [problem.fields["answer"] for name in FILES for problem in _problems(task, shared, name)]
    for gold in sorted(set(golds)):
        for completion in (rf"\boxed{{{gold}}}", f"<answer>${gold}$</answer>", f"The answer is ${gold}$."):
            assert task.grade({"answer": gold}, completion).correct, completion
    rng = random.Random(0)
    distinct = sorted(set(golds))
    accepted = []
    for _ in range(40_000):
        one, other = rng.sample(distinct, 2)
        if equivalence.equivalent(one, other).correct:
            accepted.append((one, other))
    assert 0 < len(accepted) < 20 and all(_plain(one) == _plain(other) for one, other in accepted), accepted


@pytest.mark.slow
def test_gold_solutions_are_right_but_for_those_with_several_answers(task: Math, shared: Path) -> None:
    """12 of the 12,498 solutions end with several boxes of different values, of which the files keep the last as the
    gold answer: by our rule all of them are the answer."""
    wrong = []
    for name in FILES:
        with gzip.open(shared / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                fields = task.fields_from_row(row)
                if fields is not None and not task.grade(fields, row["solution"]).correct:
                    wrong.append(row["solution"])
    assert len(wrong) == 12 and all(solution.count(r"\boxed") > 1 for solution in wrong)


def test_killers_through_the_command_line(task: Math) -> None:
    golds = ["5", r"\sqrt{2+\sqrt{3}}", r"(1,2)"]
    texts = [rf"\boxed{{{killer}}}" for killer in KILLERS] + [killer * 100 for killer in KILLERS] + ["x" * 100_000]
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.grade", "--task", "math"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdin and process.stdout
    slowest = 0.0
    try:
        process.stdin.write(json.dumps({"answer": "5", "completion": "5"}).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["correct"], "started"
        for number, text in enumerate(texts):
            line = json.dumps({"id": number, "answer": golds[number % 3], "completion": text})
            begin = time.monotonic()
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
            slowest = max(slowest, time.monotonic() - begin)
            assert reply["id"] == number and (not reply["correct"] or text[7] == "-"), text[:60]
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert slowest < 1.0


def test_a_numerically_different_answer_is_not_compared_by_symbols(task: Math) -> None:
    gold = {"answer": r"\sqrt{2+\sqrt{3}}"}
    equivalence.counts.clear()
    wrong = task.grade(gold, r"\boxed{\sqrt{2+\sqrt{5}}}")
    assert not wrong.correct and "(approximation)" in (wrong.error or "")
    assert set(equivalence.counts) == {"approximation"}
    task.grade(gold, r"\boxed{\frac{\sqrt6+\sqrt2}{2}}")
    assert {"symbolic", "timeout"} & set(equivalence.counts), "the control"


@pytest.mark.slow
def test_throughput_figures(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shared / "data"
    files = [str(data / "gsm8k_test.jsonl.gz"), str(data / "math500_test.jsonl.gz")]
    assert throughput(["--gsm8k", files[0], "--math", files[1], "--size", "600"]) == 0
    for line in capsys.readouterr().out.splitlines():
        figures = json.loads(line)
        assert figures["right_found"] == figures["wrong_refused"] == 1.0
        assert figures["per_cpu_second"] > 2000 and figures["slow_share"] < 0.02, figures


def _problems(task: Math, shared: Path, name: str) -> list[Problem]:
    return task.problems("train", seed=0, size=10**6, path=str(shared / "data" / f"{name}.jsonl.gz"))


def _plain(gold: str) -> float | str:
    """The number that a gold answer is, without looks and units, else its text: by means of its own."""
    text = re.sub(r"\\[dtc]frac", "frac", gold.replace(r"\frac", "frac"))
    text = re.sub(
        r"[\s$%\\!]|\^\{?\\circ\}?|_.*|(\\text|\\mbox).*|.*=", "", re.sub(r"\\(text|mbox).*|\^\{?\\circ\}?", "", text)
    )
    number = re.fullmatch(r"(-?)(\d*\.?\d*)(?:frac\{?(\d+?)\}?\{?(\d+)\}?)?", text)
    if number is None:
        return text.replace("{", "").replace("}", "")
    sign, whole, above, below = number.groups()
    value = float(whole or 0) + (int(above) / int(below) if above else 0)
    return -value if sign else value
