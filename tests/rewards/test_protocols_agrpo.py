"""AGRPO's published graders on hard cases, mistakes included; beside each verdict what the strict grader says."""

import hashlib
import time
from collections.abc import Iterator

import pytest

from rewards.errors import DataError
from rewards.maths import symbolic
from rewards.protocols.math_verify_raw import finding, verified
from rewards.task import Grade, get_task
from rewards.tasks.sudoku import solutions

SUDOKU = {"puzzle": "0321003004002100", "solution": "4321123434122143"}


def tagged(answer: str, thought: str = "a") -> str:
    return f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"


HOSTILE = [
    "<answer>9**9**9**9 = 3</answer>\n9**9 **9**9=3",
    "<answer>" * 3000,
    "\\boxed{" * 4000,
    "<answer>" + "{" * 60_000 + "</answer>",
    "<answer>" + "1" * 100_000 + "=1</answer>",
    "=" * 50_000 + "\n" * 50_000,
    "<think>" * 10_000 + "</think>" * 10_000,
    "\x00\ud800<answer>\u0663=3</answer>",
]


@pytest.mark.parametrize("name", ["gsm8k_agrpo", "math_agrpo", "countdown_agrpo", "sudoku_agrpo"])
def test_hostile_texts_get_a_verdict_in_time(name: str) -> None:
    fields = {"question": "q", "problem": "q", "answer": "3", "numbers": [9, 9, 9, 9], "target": 3, **SUDOKU}
    task = get_task(name)
    task.prepare()
    for text in HOSTILE:
        started = time.monotonic()
        grade = task.grade(fields, text)
        assert set(grade.components) == set(task.components)
        assert time.monotonic() - started < 3.0, text[:30]  # a second, and room for a busy machine


@pytest.fixture(scope="module")
def unhurried() -> Iterator[None]:
    """Time for math-verify on a busy machine: the tests below ask what it finds, not how fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symbolic, "WALL_LIMIT_S", 30.0)
        patch.setattr(symbolic, "CPU_LIMIT_S", 5.0)
        symbolic._helper._kill()
        finding.cache_clear()
        yield
    symbolic._helper._kill()


# gold, completion, published verdict, strict verdict, thinking + answer + correctness, why
GSM8K = [
    ("1234", tagged(r"\boxed{1234}"), True, True, 4.0, "plain"),
    ("1234", tagged(r"\boxed{1,234}"), False, True, 4.0, "the verdict reads the digits before the comma, 1"),
    ("1", tagged(r"\boxed{1,234}"), True, False, 1.0, "and so takes 1,234 for 1"),
    ("-5", tagged(r"\boxed{-5}"), False, True, 4.0, "a run of digits has no sign"),
    ("5", tagged(r"\boxed{-5}"), True, False, 1.0, "and so -5 is 5"),
    ("3.5", tagged(r"\boxed{3.50}"), False, True, 4.0, "nor a point: 3"),
    ("5", tagged(r"\boxed{2 + 3 = 5}"), False, True, 4.0, "the first number of an equation"),
    ("18", tagged(r"The answer is \boxed{18} dollars, of 20."), True, True, 4.0, "the box, not what is around it"),
    ("18", tagged("$18 per day"), True, True, 4.0, "no box: the tag"),
    ("18", "20 - 2 = 18", False, None, None, "untagged: the first number of the text"),
    ("20", "20 - 2 = 18", True, False, None, "which is right by accident"),
    ("18", "<answer>7</answer> no, wait <answer>18</answer>", False, True, 0.5, "the first answer block counts"),
    ("7", "<answer>7</answer> no, wait <answer>18</answer>", True, False, 3.5, "the first answer block counts"),
    ("18", tagged("18", r"a draft: <answer>5</answer>"), False, True, 1.0, "a draft inside the thinking is graded"),
    ("18", "<THINK>a</THINK><Answer>18</ANSWER>", True, True, 4.0, "tags in any case"),
    ("18", tagged(r"\boxed{18 \boxed{"), True, None, 1.0, "a box never closed is no box: the tag's first number"),
    ("18", tagged(r"\boxed{}18"), True, None, 1.0, "an empty box is no box"),
    ("18", r"<answer>\boxed{18}", True, None, 3.0, "a tag never closed: the box of the whole text"),
    ("18", "", False, False, 0.0, "nothing"),
    ("18", tagged("eighteen"), False, True, 1.0, "no digits"),
]


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize(("gold", "completion", "published", "strict", "reward", "why"), GSM8K)
def test_gsm8k(gold: str, completion: str, published: bool, strict: bool | None, reward: float, why: str) -> None:
    fields = {"question": "q", "answer": gold}
    grade = get_task("gsm8k_agrpo").grade(fields, completion)
    assert grade.correct == published and (grade.error is None) == published, why
    assert reward is None or grade.reward == pytest.approx(reward), why
    assert strict is None or get_task("gsm8k").grade(fields, completion).correct == strict, why


MATH = [
    (r"\frac{1}{2}", tagged(r"\boxed{0.5}"), True, 4.0, "math-verify knows values"),
    (r"\frac{1}{2}", tagged(r"\boxed{\dfrac12}"), True, 4.0, "and LaTeX"),
    (r"\frac{1}{2}", tagged(r"\boxed{2}"), False, 1.0, "wrong"),
    (r"\frac{1}{2}", r"it is \boxed{\frac{1}{2}}", True, 3.0, "untagged text is graded"),
    ("6", tagged(r"\boxed{5} \boxed{6}"), False, 1.0, "the first box decides"),
    ("6", r"<answer>6</answer><answer>5</answer>", True, 3.5, "the first answer block decides"),
]


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize(("gold", "completion", "published", "reward", "why"), MATH)
def test_math(gold: str, completion: str, published: bool, reward: float, why: str) -> None:
    grade = get_task("math_agrpo").grade({"problem": "p", "answer": gold}, completion)
    assert (grade.correct, grade.reward) == (published, pytest.approx(reward)), why


@pytest.mark.usefixtures("unhurried")
def test_math_verify_rounds_and_the_strict_grader_does_not() -> None:
    fields, completion = {"problem": "p", "answer": r"\frac{1}{3}"}, tagged(r"\boxed{0.333333}")
    assert get_task("math_agrpo").grade(fields, completion).correct
    assert not get_task("math").grade(fields, completion).correct


# completion, published verdict, strict verdict, format, correctness, why; numbers 3, 5, 2, target 16
COUNTDOWN = [
    ("<answer>(3+5)*2 = 16</answer>", True, True, 1.0, 3.0, "plain"),
    ("<answer>(3+5)*2 = 17</answer>", True, False, 2 / 3, 3.0, "the right side is ignored"),
    ("<answer>(3+5)*2 =</answer>", True, False, 2 / 3, 3.0, "even when it is empty"),
    ("<answer>(3+5)*2</answer>", False, True, 0.0, 0.0, "without = it is wrong"),
    ("<answer>16 = (3+5)*2</answer>", False, False, 1 / 3, 0.0, "the left side must be the expression"),
    ("<answer>(3+5)*2 = 8*2 = 16</answer>", True, False, 0.5, 3.0, "a chain costs 0.5 and is right"),
    ("<answer>3*5+2 = 16</answer>", False, False, 1.0, 0.0, "full format, wrong value"),
    ("<answer>3+5+8 = 16</answer>", False, False, 2 / 3, 0.0, "other numbers"),
    ("(3+5)*2 = 16", True, None, 0.0, 0.0, "untagged: right for the verdict, no reward"),
    ("a\n(3+5)*2 = 16\nso x = 16", False, None, 0.0, 0.0, "the last line with = counts"),
    ("<answer>first\n3*5+2=17\n(3+5)*2=16</answer>", True, False, 1 / 6, 0.0, "reward: first =, verdict: last"),
    (r"<answer>\boxed{(3+5)*2=16}</answer>", True, True, 1 / 3, 0.0, "the verdict opens the box, the reward does not"),
    ("<answer>==(3+5)*2=16</answer>", True, False, -0.5 + 1 / 3, 0.0, "signs at a line's start are passed over"),
]


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize(("completion", "published", "strict", "form", "correctness", "why"), COUNTDOWN)
def test_countdown(
    completion: str, published: bool, strict: bool | None, form: float, correctness: float, why: str
) -> None:
    fields = {"numbers": [3, 5, 2], "target": 16}
    grade = get_task("countdown_agrpo").grade(fields, completion)
    assert grade.correct == published, why
    assert grade.components == {"format": pytest.approx(form), "correctness": correctness}, why
    assert strict is None or get_task("countdown").grade(fields, completion).correct == strict, why


S = SUDOKU["solution"]
NO_CLUES = "".join(digit if clue == "0" else "9" for clue, digit in zip(SUDOKU["puzzle"], S, strict=True))
SUDOKU_CASES = [
    (f"<answer>{S}</answer>", True, True, 1.0, 3.0, "plain"),
    (f"<answer>{S}9</answer>", True, False, 0.0, 3.0, "what follows the 16th character is cut, the format is lost"),
    (S, True, None, 0.0, 3.0, "untagged"),
    (f"{S} is the solution", True, False, 0.0, 3.0, "untagged: the first 16 characters"),
    (f"The solution is {S}", False, False, 0.0, 0.0, "untagged: the first 16 characters"),
    ("<answer>2143</answer>", False, False, 0.0, 3.0 * 2 / 9, "a short answer is moved to the last row"),
    ("<answer>4" + "9" * 3 + "12993999341299" + "</answer>", False, False, None, None, "18 characters"),
    (f"<answer>{NO_CLUES}</answer>", True, False, 0.25, 3.0, "every clue overwritten"),
    (f"<answer>\n{S[:4]}\n{S[4:8]}\n{S[8:12]}\n{S[12:]}\n</answer>", False, None, 0.0, None, "a row a line"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "published", "strict", "form", "correctness", "why"), SUDOKU_CASES)
def test_sudoku(
    completion: str, published: bool, strict: bool | None, form: float | None, correctness: float | None, why: str
) -> None:
    grade = get_task("sudoku_agrpo").grade(SUDOKU, completion)
    assert grade.correct == published, why
    assert form is None or grade.components["format"] == form, why
    assert correctness is None or grade.components["correctness"] == pytest.approx(correctness), why
    assert strict is None or get_task("sudoku").grade(SUDOKU, completion).correct == strict, why


def test_sudoku_wants_the_stored_solution() -> None:
    stored, other, *_ = solutions("1234000000000000")
    fields, answer = {"puzzle": "1234000000000000", "solution": stored}, f"<answer>{other}</answer>"
    assert (
        get_task("sudoku").grade(fields, answer).correct and not get_task("sudoku_agrpo").grade(fields, answer).correct
    )
    with pytest.raises(DataError, match="solution is missing"):
        get_task("sudoku_agrpo").grade({"puzzle": SUDOKU["puzzle"]}, answer)


def test_a_solved_puzzle_scores_nothing_where_the_source_divides_by_zero() -> None:
    solved = {"puzzle": S, "solution": S}
    assert get_task("sudoku_agrpo").grade(solved, f"<answer>{S}</answer>") == Grade(
        False, {"format": 1.0, "correctness": 0.0}, f"0 of 0 empty cells of '{S}' are right"
    )


def test_prompts_are_the_published_texts() -> None:
    """Fingerprints of the texts in the official repository (made from them, not from ours)."""
    prompts = {
        "gsm8k_agrpo": {"question": "Q"},
        "math_agrpo": {"problem": "Q"},
        "countdown_agrpo": {"numbers": [3, 5, 2], "target": 16},
        "sudoku_agrpo": SUDOKU,
    }
    for name, fields in prompts.items():
        system, user = get_task(name).messages(fields)
        assert (system["role"], user["role"]) == ("system", "user")
        assert "<think>" in system["content"] and "<answer>" in system["content"], name
        assert fingerprint(system["content"]) == FINGERPRINTS[name], name
        assert user["content"] == USERS[name]


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


USERS = {
    "gsm8k_agrpo": "Q",
    "math_agrpo": "Q",
    "countdown_agrpo": "Target: 16\nNumbers: [3, 5, 2]",
    "sudoku_agrpo": "Puzzle: 0321003004002100",
}
FINGERPRINTS = {
    "gsm8k_agrpo": "b5bfce86f90b1220",
    "math_agrpo": "b5bfce86f90b1220",
    "countdown_agrpo": "dbb490008b112323",
    "sudoku_agrpo": "45b564f29a7ae650",
}


@pytest.mark.usefixtures("unhurried")
def test_the_short_way_for_integers_is_math_verifys_answer() -> None:
    from math_verify import parse, verify

    for gold, answer in [("18", "18"), ("18", "19"), ("-5", "5"), ("-5", "-5"), ("0", "0"), ("123456789", "123456788")]:
        for form in ("${}$", "{}"):
            texts = form.format(gold), form.format(answer)
            assert verified(*texts) == verify(parse(texts[0]), parse(texts[1])), texts
    assert verified("$18$", "$18.0$") and verified("$18$", r"$\frac{36}{2}$") and not verified("$18$", "$18.5$")
