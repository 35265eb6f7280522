"""d1's and SPG's published graders on hard cases, mistakes included; beside each verdict the strict grader's."""

import hashlib
import time

import pytest

from rewards.errors import DataError
from rewards.protocols.d1 import evaluated_cells
from rewards.protocols.math_strings import last_box, same_answer
from rewards.protocols.python_value import python_value
from rewards.task import get_task

PUZZLE, SOLUTION = "0321003004002100", "4321123434122143"
SUDOKU = {"puzzle": PUZZLE, "solution": SOLUTION}
CLEAN = "<reasoning>\na\n</reasoning>\n<answer>\n18\n</answer>"

# gold as written, completion, xml_count, soft, strict, integer, correctness, why
GSM8K_REWARDS = [
    (
        "18",
        CLEAN,
        0.5 - 0.001 * len(CLEAN) + 0.001,
        0,
        0,
        0.5,
        2,
        "no newline at the end: the first penalty counts all",
    ),
    ("18", CLEAN + "\n", 0.5, 0, 0.5, 0.5, 2, "with it: strict fires, soft does not, as . stops at a newline"),
    ("18", "<reasoning>a</reasoning><answer>18</answer>", 0, 0.5, 0, 0.5, 2, "one line: soft fires, strict does not"),
    ("18", CLEAN.replace("a\n", "a\nb\n") + "\n", 0.5, 0, 0, 0.5, 2, "two lines of reasoning: no format reward"),
    ("18", CLEAN + "\nmore", 0.5 - 0.004 - 0.004, 0, 0, 0.5, 2, "trailing text is paid twice"),
    ("1,234", "<answer>1234</answer>", 0, 0, 0, 0.5, 0, "a gold with a comma wants the comma"),
    ("1,234", "<answer>1,234</answer>", 0, 0, 0, 0, 2, "which is no integer then"),
    ("18", r"<answer>\boxed{18}</answer>", 0, 0, 0, 0, 0, "a box is never right in training"),
    ("18", "<answer>18.0</answer>", 0, 0, 0, 0, 0, "nor a float"),
    ("18", "18", 0, 0, 0, 0.5, 2, "untagged text is its own answer"),
    ("18", "<answer>5</answer><answer>18", 0, 0, 0, 0.5, 2, "the last tag, closed or not"),
    ("18", "", 0, 0, 0, 0, 0, "nothing"),
]


@pytest.mark.parametrize(("gold", "completion", "xml", "soft", "strict", "integer", "exact", "why"), GSM8K_REWARDS)
def test_gsm8k_rewards(
    gold: str, completion: str, xml: float, soft: float, strict: float, integer: float, exact: float, why: str
) -> None:
    fields = {"question": "q", "answer": gold.replace(",", ""), "raw_answer": gold}
    components = get_task("gsm8k_d1").grade(fields, completion).components
    expected = {
        "xml_count": xml, "soft_format": soft, "strict_format": strict, "integer": integer, "correctness": exact
    }  # fmt: skip
    assert components == pytest.approx(expected), why


def test_spg_changes_the_first_penalty() -> None:
    fields = {"question": "q", "answer": "18"}
    d1, spg = (get_task(name).grade(fields, CLEAN).components for name in ("gsm8k_d1", "gsm8k_spg"))
    assert d1["xml_count"] == pytest.approx(0.5 - 0.001 * len(CLEAN) + 0.001)
    assert spg["xml_count"] == pytest.approx(0.5 - 0.001 * len("18\n</answer>") + 0.001)
    assert {name: d1[name] for name in list(d1)[1:]} == {name: spg[name] for name in list(spg)[1:]}


# gold, completion, d1's verdict, SPG's, the strict one's, why
GSM8K_VERDICTS = [
    ("18", r"<answer>\boxed{18}</answer>", True, True, True, "plain"),
    ("1234", r"\boxed{1,234}", False, False, True, "in a box the comma ends the number: 1"),
    ("1", r"\boxed{1,234}", True, True, False, "so it is 1"),
    ("234", "<answer>1,234</answer>", True, True, False, "in a tag the last number counts: 234"),
    ("18", r"\boxed{...} then \boxed{18}", True, True, True, "a box of dots is passed over"),
    ("5", r"first \boxed{5}, then \boxed{18}", True, True, False, "the first box counts"),
    ("3", r"\boxed{\frac{3}{4}}", True, True, False, "a box ends at its first closing brace: the numerator"),
    ("18", "<answer>3 + 15 = 18</answer>", True, True, True, "the last number of a tag"),
    ("3", r"\boxed{3 + 15 = 18}", True, True, False, "the first number of a box"),
    ("18", "it makes 18", False, True, None, "only SPG reads untagged text"),
    ("18", "<answer>18", False, True, True, "and a tag that is not closed"),
    ("18.5", r"\boxed{18.50}", True, True, True, "floats are equal"),
    ("-10", r"\boxed{-10}", False, False, True, "the gold parser knows no minus sign"),
    ("18", "", False, False, False, "nothing"),
]


@pytest.mark.parametrize(("gold", "completion", "d1", "spg", "strict", "why"), GSM8K_VERDICTS)
def test_gsm8k_verdicts(gold: str, completion: str, d1: bool, spg: bool, strict: bool | None, why: str) -> None:
    fields = {"question": "q", "answer": gold}
    for name, expected in (("gsm8k_d1", d1), ("gsm8k_spg", spg), ("gsm8k", strict)):
        if expected is not None:
            assert get_task(name).grade(fields, completion).correct == expected, (name, why)


# gold, completion, training correctness, format, evaluation verdict, the strict one's, why
MATH = [
    (r"\frac{1}{2}", r"<answer>\boxed{\frac12}</answer>", 2, 0.75, True, True, "cleaned strings are equal"),
    (r"\frac{1}{2}", r"\boxed{0.5}", 2, 0.25, True, True, "0.5 is a special case"),
    (r"\frac{1}{4}", r"\boxed{0.25}", 0, 0.25, False, True, "0.25 is not"),
    (r"\frac{1}{2}", r"\boxed{1/2}", 2, 0.25, True, True, "a/b of integers"),
    (r"\frac{x}{2}", r"\boxed{x/2}", 0, 0.25, False, True, "another / makes the cleaning fail"),
    ("x/2", r"\boxed{x/ 2}", 0, 0.25, False, True, "then raw texts must be equal, spaces and all"),
    ("6", "<answer>6</answer>", 0, 0.75, False, True, "without a box the whole text is the answer"),
    (
        "6",
        r"<answer>6</answer> \boxed{6",
        0,
        0.75,
        True,
        True,
        "a box never closed gives way to the tag, in evaluation",
    ),
    ("6", r"\boxed{5} and \boxed{6}", 2, 0.25, True, None, "the last box"),
    ("6", r"\boxed 6", 2, 0.25, True, True, "a box without braces"),
    ("6", r"\boxed 6 or \boxed{6}", 0, 0.25, False, None, "which wins and reaches to the end"),
    ("6", r"\boxed{x=6}", 2, 0.25, True, True, "short names before = are dropped"),
    ("6", r"\boxed{6\text{ cm}}", 2, 0.25, True, True, "units after a space in \\text"),
    ("6", r"\boxed{6.0}", 0, 0.25, False, True, "strings, not values"),
    ("1234", r"\boxed{1,234}", 0, 0.25, False, True, "nor thousands"),
    ("6", "<answer>\boxed{6}</answer>", 0, 1.0, False, None, "the slip: a backspace and oxed earns the box's reward"),
    ("6", "", 0, 0.25, False, False, "nothing"),
]


@pytest.mark.parametrize(("gold", "completion", "correctness", "form", "verdict", "strict", "why"), MATH)
def test_math(
    gold: str, completion: str, correctness: float, form: float, verdict: bool, strict: bool | None, why: str
) -> None:
    fields = {"problem": "p", "answer": gold}
    grade = get_task("math_d1").grade(fields, completion)
    assert (grade.components, grade.correct) == ({"correctness": correctness, "format": form}, verdict), why
    assert get_task("math_spg").grade(fields, completion) == grade
    assert strict is None or get_task("math").grade(fields, completion).correct == strict, why


def test_strings_as_published() -> None:
    assert last_box(r"\fbox{3}") == r"\fbox{3}" and last_box(r"\boxed{a{b}c} }") == "a{b}c" and last_box("x") == "x"
    for one, other in [(r"\sqrt3", r"\sqrt{3}"), (r"\frac12x", r"\frac{1}{2}x"), (r"50\%", "50"), (r"90^\circ", "90")]:
        assert same_answer(one, other), (one, other)
    assert not same_answer("a/b/c/", "a / b/c/ x") and not same_answer(r"\sqrt", r"\sqrt ")
    assert same_answer(r"\sqrt", r"\sqrt"), "what can't be cleaned is compared raw"


# completion, training score, evaluation verdict, the strict one's, why; numbers 3, 5, 2, target 16
COUNTDOWN = [
    ("<answer>(3+5)*2</answer>", 1.0, False, True, "right in training; in evaluation the tag is never read"),
    (r"<answer>\boxed{(3+5)*2}</answer>", 0.1, True, True, "and the other way round with a box"),
    ("<answer>(3+5)*2=16</answer>", 0.1, True, True, "an = costs the training reward"),
    (r"\boxed{(3+5)*2=99}", 0.0, True, False, "what stands right of = is ignored"),
    (r"\boxed{(3+5) \times 2}", 0.0, True, True, "LaTeX operators, in evaluation"),
    ("<answer>nonsense</answer>", 0.1, False, False, "0.1 for the tag alone"),
    ("<answer>1+1</answer>", 0.1, False, False, "with wrong numbers"),
    ("(3+5)*2", 0.0, True, True, "no tag; the whole text is an expression"),
    ("so (3+5)*2=16, done", 0.0, True, None, "or has one in it"),
    ("3+5=8, so (3+5)*2=16", 0.0, False, None, "but only the first counts"),
    ("<answer>5**2-3</answer>", 0.1, False, False, "a power with the wrong value"),
    ("<answer>(3+5)*2</answer><answer>3</answer>", 0.1, False, False, "the last block"),
    (r"\boxed{(3+5)*2 <answer>(3+5)*2</answer>", 1.0, True, True, "a box never closed gives way to the tag"),
    ("", 0.0, False, False, "nothing"),
]


@pytest.mark.parametrize(("completion", "score", "verdict", "strict", "why"), COUNTDOWN)
def test_countdown(completion: str, score: float, verdict: bool, strict: bool | None, why: str) -> None:
    fields = {"numbers": [3, 5, 2], "target": 16}
    grade = get_task("countdown_d1").grade(fields, completion)
    assert (grade.components, grade.correct) == ({"score": score}, verdict), why
    assert strict is None or get_task("countdown").grade(fields, completion).correct == strict, why


def test_python_decides_what_an_expression_is_worth() -> None:
    power = {"numbers": [2, 3, 1], "target": 8}
    assert get_task("countdown_d1").grade(power, "<answer>2**3*1</answer>").reward == 1.0
    assert not get_task("countdown").grade(power, "<answer>2**3*1</answer>").correct
    assert [python_value(text) for text in ("7//2", "1/3", "2**-1", " -(3) ")] == [3, 1 / 3, 0.5, -3]
    for text in ["", "()", "2(3)", "1/0", "2,3", "a", "08", "1 2", "9**9**9**9", "(" * 500, "-" * 999 + "11", "..."]:
        assert python_value(text) is None, text


# completion, training share of the 9 empty cells, cells right by the evaluation script, why
SUDOKU_CASES = [
    (f"<answer>{SOLUTION}</answer>", 1, 9, "plain"),
    (f"<answer>\n{SOLUTION[:8]}\n{SOLUTION[8:]}\n</answer>", 1, 9, "white space is taken out"),
    (f"<answer>{'|'.join(SOLUTION)}</answer>", 1, 2, "training keeps the digits, evaluation only drops white space"),
    (f"<answer>{SOLUTION[:8]}</answer>", 4 / 9, 4, "a short answer is filled up on the right"),
    (f"<answer>{SOLUTION}99</answer>", 1, 9, "a long one is cut"),
    (SOLUTION, 0, 9, "untagged: only the evaluation finds 16 digits"),
    (f"<answer>```\n{SOLUTION}\n```</answer>", 1, 9, "a code fence comes first"),
    (f"<answer>1</answer><answer>{SOLUTION}</answer>", 1, 0, "training: last block, evaluation: first"),
    (f"<answer></answer>{SOLUTION}", 0, 9, "an empty block: what follows it"),
    (f"{SOLUTION} </answer>", 0, 9, "16 digits before a closing tag"),
    ("", 0, 0, "nothing"),
]


@pytest.mark.parametrize(("completion", "share", "cells", "why"), SUDOKU_CASES)
def test_sudoku(completion: str, share: float, cells: int, why: str) -> None:
    for name in ("sudoku_d1", "sudoku_spg"):
        grade = get_task(name).grade(SUDOKU, completion)
        assert grade.components == {"cells": pytest.approx(share)}, why
        assert grade.correct == (cells == 9)
    assert evaluated_cells(PUZZLE, SOLUTION, completion) == (cells, 9), why


def test_sudoku_ignores_clues_and_other_solutions() -> None:
    no_clues = "".join(digit if clue == "0" else "9" for clue, digit in zip(PUZZLE, SOLUTION, strict=True))
    assert get_task("sudoku_d1").grade(SUDOKU, f"<answer>{no_clues}</answer>").correct
    assert not get_task("sudoku").grade(SUDOKU, f"<answer>{no_clues}</answer>").correct
    with pytest.raises(DataError, match="solution is missing"):
        get_task("sudoku_d1").grade({"puzzle": PUZZLE}, "")
    assert get_task("sudoku_d1").grade({"puzzle": SOLUTION, "solution": SOLUTION}, SOLUTION).correct is False


PROMPTS = {
    "gsm8k_d1": ({"question": "Q"}, "07f00bb728cba4ad", "9765343fa56d9a33"),
    "gsm8k_spg": ({"question": "Q"}, "07f00bb728cba4ad", "9765343fa56d9a33"),
    "math_d1": ({"problem": "Q"}, "46856e38ee329f3d", "42a060f686122676"),
    "math_spg": ({"problem": "Q"}, "46856e38ee329f3d", "42a060f686122676"),
    "countdown_d1": ({"numbers": [3, 5, 2], "target": 16}, "cc3f784dbbd41420", "474d64781280ca1c"),
    "sudoku_d1": ({"puzzle": PUZZLE}, "34657847a3271ade", "34657847a3271ade"),
    "sudoku_spg": ({"puzzle": PUZZLE}, "73afa78610a28300", "4bad6df5c574477e"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_published_texts(name: str) -> None:
    """Fingerprints of the official repositories' texts (made from them, not from ours), training and evaluation."""
    fields, training, evaluation = PROMPTS[name]
    (user,) = get_task(name).messages(fields)
    assert user["role"] == "user" and "<reasoning>" in user["content"] and "</answer>" in user["content"]
    assert fingerprint(user["content"]) == training
    asked, begun = get_task(name).messages(fields | {"evaluation": True})
    assert (fingerprint(asked["content"]), begun) == (evaluation, {"role": "assistant", "content": "<reasoning>"})


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


HOSTILE = [
    "<answer>" * 8000,
    "<answer>```" + " " * 60_000,
    ("<answer>" + " " * 500) * 300 + "```",
    "\\boxed{" * 9000,
    "\\boxed " * 9000,
    "<reasoning></reasoning><answer>" * 3000,
    "<reasoning>" + "</reasoning>" * 6000,
    "1" * 100_000,
    "(" * 50_000,
    "3+" * 50_000,
    "12345678901234567 " * 5000 + "</answer>",
    "\\frac" * 9000 + "/" * 5000,
    "<answer>9**9**9**9</answer>",
    "\x00\ud800\u0663",
]


@pytest.mark.parametrize("name", PROMPTS)
def test_hostile_texts_get_a_verdict_in_time(name: str) -> None:
    fields = {"question": "q", "problem": "q", "answer": "3", "numbers": [9, 9, 9, 9], "target": 3, **SUDOKU}
    for text in HOSTILE:
        started = time.process_time()
        assert set(get_task(name).grade(fields, text).components) == set(get_task(name).components)
        assert time.process_time() - started < 0.5, text[:30]
