r"""Whether an answer is the gold answer in another spelling: a table of hard cases, each with its reason."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.maths import symbolic
from rewards.maths.algebra import Inexact, rational, residue
from rewards.maths.answer_forms import MAX_CHARACTERS
from rewards.maths.equivalence import Verdict, counts, equivalent
from rewards.maths.expression import Unreadable, parse
from rewards.maths.latex import key, tokenize
from tests.support.equivalence_cases import KILLERS, PIECES, RIGHT, WRONG

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def helper() -> None:
    assert symbolic.start()


def decided(gold: str, answer: str) -> Verdict:
    """The verdict, asked again where a loaded machine was too slow for the symbolic comparison."""
    for _ in range(5):
        verdict = equivalent(gold, answer)
        if verdict.how != "timeout":
            break
    return verdict


@pytest.mark.parametrize(("gold", "answer", "reason"), RIGHT)
def test_right(gold: str, answer: str, reason: str) -> None:
    assert decided(gold, answer).correct, reason


@pytest.mark.parametrize(("gold", "answer", "reason"), WRONG)
def test_wrong(gold: str, answer: str, reason: str) -> None:
    assert not decided(gold, answer).correct, reason


def test_the_table_is_big_and_has_no_row_twice() -> None:
    rows = [(gold, answer) for gold, answer, _ in RIGHT + WRONG]
    assert len(rows) >= 150 and len(set(rows)) == len(rows)


def test_how_verdicts_are_reached_and_counted() -> None:
    counts.clear()
    ways = [
        ("42", "42.", "text"),
        ("42", "43", "number"),
        ("x^2-1", "(x-1)(x+1)", "algebra"),
        (r"\sqrt{2}", "1.41421356", "algebra"),
        (r"\sin 1", r"\sin 2", "approximation"),
        ("(1,2)", "[1,2]", "form"),
        ("5", "x" * (MAX_CHARACTERS + 1), "none"),
        (r"\sqrt{2+\sqrt{3}}", r"\frac{\sqrt6+\sqrt2}{2}", "symbolic"),
    ]
    for gold, answer, how in ways:
        assert decided(gold, answer).how == how, (gold, answer)
    assert {how for _, _, how in ways} <= set(counts)


def test_the_symbolic_path_can_be_left_out() -> None:
    assert equivalent("2", r"\sqrt{2+\sqrt{4}}", by_symbols=False) == Verdict(False, "approximation")
    assert decided("2", r"\sqrt{2+\sqrt{4}}").correct, "the control"


# --- algebra modulo a prime


@pytest.mark.parametrize(
    ("one", "other"),
    [("(x+1)^2", "x^2+2x+1"), (r"\sqrt{12}", r"2\sqrt3"), ("i^3", "-i"), (r"(\sqrt2+\sqrt3)^2", r"5+2\sqrt6")],
)
def test_equal_expressions_have_equal_residues(one: str, other: str) -> None:
    assert residue(parse(tokenize(one))) == residue(parse(tokenize(other)))
    assert residue(parse(tokenize(one))) != residue(parse(tokenize(other + "+1"))), "the control"


def test_residues_refuse_what_is_not_exact() -> None:
    for text in (r"\sin 1", r"\sqrt{x}", "2^x", r"\sqrt[3]{2}", r"\frac{1}{0}", "9^{9^{9^9}}", "10000!"):
        with pytest.raises(Inexact):
            residue(parse(tokenize(text)))


def test_numbers_are_exact_and_bounded() -> None:
    assert rational(parse(tokenize("0.1+0.2"))) == rational(parse(tokenize("0.3")))
    assert rational(parse(tokenize("2^{99999999}"))) is None


def test_keys_keep_numbers_apart() -> None:
    assert key(tokenize("1 2")) != key(tokenize("12"))
    assert key(tokenize(r"x \, y")) == key(tokenize("xy"))


# --- anything at all


def test_soup_is_graded_in_bounded_time() -> None:
    rng = random.Random(0)
    slowest = 0.0
    for _ in range(1500):
        gold, answer = ("".join(rng.choices(PIECES, k=rng.randrange(1, 12))) for _ in range(2))
        begin = time.process_time()
        equivalent(gold, answer)
        slowest = max(slowest, time.process_time() - begin)
        itself = equivalent(answer, answer)
        assert itself.correct or itself.how == "none", "anything that is an answer equals itself"
    assert slowest < 0.5


def test_random_characters_are_graded() -> None:
    rng = random.Random(1)
    for size in (1, 10, 100, 1000):
        for _ in range(200):
            text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))) for _ in range(size))
            assert not equivalent("5", text + "x").correct


@pytest.mark.parametrize("gold", ["5", r"\sqrt{2+\sqrt{3}}", "x+1", "(1,2)", "2,3"])
def test_killers_are_wrong_and_quick(gold: str) -> None:
    for text in KILLERS:
        begin = time.process_time()
        assert not equivalent(gold, text).correct or (gold, text[0]) == ("5", "-")
        assert time.process_time() - begin < 0.5, text[:40]


# --- the helper process


NUMBER = ("number", 3)


def test_a_question_that_overruns_is_stopped_and_the_next_is_answered() -> None:
    tower = ("number", 9)
    for _ in range(3):
        tower = ("^", ("number", 9), tower)
    begin = time.monotonic()
    assert symbolic.ask([(tower, NUMBER)]) == "timeout"
    assert time.monotonic() - begin < 10.0  # a busy machine may have the helper overrun as well, and start again
    answers = [symbolic.ask([(NUMBER, NUMBER)]) for _ in range(5)]
    assert "equal" in answers and set(answers) <= {"equal", "timeout"}


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_helper_that_dies_or_hangs_costs_no_answer(signum: int) -> None:
    assert symbolic._helper._popen is not None
    os.kill(symbolic._helper._popen.pid, signum)
    assert symbolic.ask([(NUMBER, NUMBER)]) == "equal"


def test_the_helper_ends_with_its_owner() -> None:
    code = (
        "import os; from rewards.maths import symbolic; symbolic.start(); "
        "print(symbolic._helper._popen.pid, flush=True); os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    helper = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 20
    while helper.exists() and "\nState:\tZ" not in (helper / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not helper.exists() or "\nState:\tZ" in (helper / "status").read_text()


def test_unreadable_expressions_say_why() -> None:
    for text in ("1 2", "4{10}", "2^3 4", "(1", "", r"\frac{1}", r"\foo", "word" * 3):
        with pytest.raises(Unreadable):
            parse(tokenize(text))
