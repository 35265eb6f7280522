"""Countdown: generation, verdict, reward components, stored files."""

import time
from collections import Counter
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest

from rewards.errors import ConfigError, DataError
from rewards.tasks.arithmetic import evaluate
from rewards.tasks.countdown import Countdown, CountdownInOrder, expressions, in_order

TASK = Countdown()
IN_ORDER = CountdownInOrder()
FIELDS = {"numbers": [3, 5, 2], "target": 16}
THIRD = 1 / 3


def tagged(text: str) -> str:
    return f"<answer>{text}</answer>"


VERDICTS = [
    (tagged("(3+5)*2"), True, None, "without a right-hand side"),
    (tagged("(3+5)*2=16"), True, None, "with the target"),
    (tagged(" ( 5 + 3 ) * 2 =  16 "), True, None, "spaces"),
    (tagged("2*(5+3)=16"), True, None, "another order"),
    (tagged("-(-3-5)*2"), True, None, "negation is an operation"),
    (tagged("02*(3+5)"), True, None, "leading zeros"),
    (tagged(r"(3+5)\times 2 = 16"), True, None, "the LaTeX product"),
    (tagged("(3+5)\u00d72"), True, None, "the product sign"),
    (tagged(r"\boxed{(3+5)*2=16}"), True, None, "boxed"),
    (f"<think>3*5=15</think>{tagged('(3+5)*2=16')}", True, None, "after thinking"),
    ("(3+5)*2=16", True, None, "untagged, nothing but the answer"),
    (tagged("(3+5)\u00b72"), True, None, "the middle dot"),
    (tagged("(3\uff0b5)\u22172"), True, None, "other signs of Unicode"),
    (tagged(r"\left(3+5\right)*2 = 16"), True, None, "LaTeX's sized parentheses"),
    (tagged("$(3+5)*2$"), True, None, "dollar signs"),
    (tagged(r"\[ (3+5) \cdot 2 \]"), True, None, "displayed"),
    (tagged("(3+5)*2 = 16."), True, None, "a full stop"),
    (tagged("(3+5) x 2"), True, None, "a letter for the product"),
    (tagged("(3+5)\u22122"), False, "is 6, not 16", "the minus of Unicode"),
    (tagged("(3+5)*2 = 1$6"), False, "right-hand side", "digits that a sign parts"),
    (tagged("\n\\boxed{(3+5)*2\n"), True, None, "a box that the tag closes"),
    ("Take (3+5)*2=16", False, "not allowed", "untagged, with words"),
    (tagged("(3+5)*2=17"), False, "right-hand side", "a wrong right-hand side"),
    (tagged("(3+5)*2="), False, "right-hand side", "an empty right-hand side"),
    (tagged("(3+5)*2=8*2"), False, "right-hand side", "a computed right-hand side"),
    (tagged("(3+5)*2=16.0"), False, "right-hand side", "a decimal right-hand side"),
    (tagged("(3+5)*2=\u0661\u0666"), False, "right-hand side", "a right-hand side in other digits"),
    (tagged("(3+5)*2=16=16"), False, "more than one '='", "two equals signs"),
    (tagged("16=(3+5)*2"), False, "numbers used are [16]", "the wrong way round"),
    (tagged("16"), False, "numbers used are [16]", "the target alone"),
    (tagged("3*5+2"), False, "is 17, not 16", "another value"),
    (tagged("3*5+2=16"), False, "is 17, not 16", "another value with the target claimed"),
    (tagged("2*3+5+5"), False, "numbers used", "a number twice"),
    (tagged("3*5+1"), False, "numbers used", "a number that was not given"),
    (tagged("(3+5)*2+0"), False, "numbers used", "an extra nought"),
    (tagged("35/2"), False, "numbers used", "digits joined"),
    (tagged("(3+5)**2"), False, "where a number should be", "a power"),
    (tagged("2^(5-3)*4"), False, "not allowed", "a caret"),
    (tagged("(3+5)2"), False, "no operator", "an implied product"),
    (tagged(r"\frac{3+5}{2}"), False, "not allowed", "a LaTeX fraction is not read"),
    (tagged("5/(3-3)"), False, "divides by zero", "division by zero"),
    (tagged("\u0663+5*2"), False, "not allowed", "unicode digits"),
    (tagged("9**9**9"), False, "where a number should be", "nested powers"),
    (tagged("="), False, "no number", "only an equals sign"),
    (tagged("=16"), False, "no number", "only a right-hand side"),
    (tagged(""), False, "no answer", "an empty answer"),
    ("", False, "no answer", "an empty completion"),
    (tagged("(3+5)*2") + tagged("3"), False, "numbers used", "the last answer is the submission"),
]


@pytest.mark.parametrize(("completion", "correct", "error", "reason"), VERDICTS, ids=[row[3] for row in VERDICTS])
def test_verdict(completion: str, correct: bool, error: str | None, reason: str) -> None:
    grade = TASK.grade(FIELDS, completion)
    assert grade.correct is correct, reason
    assert grade.error is None if error is None else error in (grade.error or "")
    assert tuple(grade.components) == TASK.components
    assert grade.components["value"] == (3.0 if correct else 0.0), "the large component follows the verdict"


REWARDS = [
    (tagged("(3+5)*2=16"), (0.0, THIRD, THIRD, THIRD, 3.0), "everything"),
    (tagged("(3+5)*2"), (0.0, 0.0, 0.0, 0.0, 3.0), "right, but no equals sign: no format credit"),
    ("(3+5)*2=16", (0.0, 0.0, 0.0, 0.0, 3.0), "right, but no tag: no format credit"),
    (tagged("3*5+2=16"), (0.0, THIRD, THIRD, THIRD, 0.0), "well formed, wrong value"),
    (tagged("3*5+2=17"), (0.0, 0.0, THIRD, THIRD, 0.0), "well formed, its own value on the right"),
    (tagged("(3+5)*2=17"), (0.0, 0.0, THIRD, THIRD, 0.0), "right value, wrong right-hand side: not 3.0"),
    (tagged("3+5=16"), (0.0, THIRD, THIRD, 0.0, 0.0), "a number missing"),
    (tagged("three 3 5 2=16"), (0.0, THIRD, 0.0, THIRD, 0.0), "words on the left"),
    (tagged("3 5 2=16"), (0.0, THIRD, THIRD, THIRD, 0.0), "no expression, allowed characters"),
    (tagged("=16"), (0.0, THIRD, 0.0, 0.0, 0.0), "an empty left side is no left side"),
    (tagged("(3+5)*2=16=16"), (-0.5, THIRD, THIRD, THIRD, 0.0), "two equals signs"),
    (tagged("(3+5)*2=8*2=16"), (-0.5, THIRD, THIRD, THIRD, 0.0), "a chain: first left side, last right side"),
    (tagged("x=y=z"), (-0.5, 0.0, 0.0, 0.0, 0.0), "below nothing"),
    (tagged("\u0663+5*2=\u0661\u0666"), (0.0, 0.0, 0.0, 0.0, 0.0), "other digits are not digits"),
    (tagged("=" * 5000), (0.0, 0.0, 0.0, 0.0, 0.0), "too long to be looked at"),
    ("", (0.0, 0.0, 0.0, 0.0, 0.0), "nothing"),
]


@pytest.mark.parametrize(("completion", "components", "reason"), REWARDS, ids=[row[2] for row in REWARDS])
def test_components(completion: str, components: tuple[float, ...], reason: str) -> None:
    grade = TASK.grade(FIELDS, completion)
    assert tuple(grade.components.values()) == pytest.approx(components), reason
    assert grade.reward == pytest.approx(sum(components))


def test_values_are_exact() -> None:
    fields = {"numbers": [3, 8, 8, 3], "target": 24}
    assert TASK.grade(fields, tagged("8/(3-8/3)=24")).correct, "in floating point this is not 24"
    assert 8 / (3 - 8 / 3) != 24.0
    large = {"numbers": [10**9, 10**9, 1], "target": 1}
    assert not TASK.grade(large, tagged("(1000000000*1000000000+1)/(1000000000*1000000000)")).correct
    near = {"numbers": [999_999_999, 10**9, 1], "target": 1}
    assert not TASK.grade(near, tagged("999999999/1000000000*1=1")).correct


def test_negative_targets_and_noughts() -> None:
    assert TASK.grade({"numbers": [3, 5], "target": -2}, tagged("3-5=-2")).correct
    assert TASK.grade({"numbers": [0, 5], "target": 0}, tagged("0/5=0")).correct
    assert not TASK.grade({"numbers": [0, 5], "target": 0}, tagged("5/0=0")).correct


BAD_FIELDS = [
    ({"target": 5}, "numbers must be a list", "missing numbers"),
    ({"numbers": [1, 2, 3]}, "target must be an integer", "missing target"),
    ({"numbers": "1,2,3", "target": 6}, "numbers must be a list", "numbers as text"),
    ({"numbers": [], "target": 6}, "numbers must be a list of 1 to 16", "no numbers"),
    ({"numbers": [1] * 17, "target": 6}, "numbers must be a list of 1 to 16", "too many numbers"),
    ({"numbers": [1, 2, "3"], "target": 6}, "each of numbers", "a number as text"),
    ({"numbers": [1, 2, 3.0], "target": 6}, "each of numbers", "a float"),
    ({"numbers": [1, 2, True], "target": 6}, "each of numbers", "a boolean"),
    ({"numbers": [1, 2, -3], "target": 6}, "each of numbers", "a negative number"),
    ({"numbers": [1, 2, 10**4000], "target": 6}, "each of numbers", "a huge number"),
    ({"numbers": [1, 2, 3], "target": 6.0}, "target must be", "a float target"),
    ({"numbers": [1, 2, 3], "target": "6"}, "target must be", "a text target"),
    ({"numbers": [1, 2, 3], "target": True}, "target must be", "a boolean target"),
    ({"numbers": [1, 2, 3], "target": float("nan")}, "target must be", "not a number"),
    ({"numbers": [1, 2, 3], "target": 10**4000}, "target must be", "a huge target"),
]


@pytest.mark.parametrize(("fields", "message", "reason"), BAD_FIELDS, ids=[row[2] for row in BAD_FIELDS])
def test_bad_fields(fields: dict, message: str, reason: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        TASK.grade(fields, tagged("1+2+3"))
    assert len(str(caught.value)) < 200


HARD = [
    "9**9**9",
    "9" * 1_000_000,
    "(" * 10_000 + "1" + ")" * 10_000,
    tagged("(" * 10_000 + "1" + ")" * 10_000),
    tagged("1/0"),
    tagged("\u0663+\uff15*\u00b2"),
    tagged("=" * 1_000_000),
    tagged("-" * 1_000_000),
    tagged("*".join(["9" * 12] * 50)),
    tagged("=" + "9" * 990),
    tagged("9" * 990 + "="),
    tagged(r"\times" * 5_000),
    "\0" * 1_000_000,
    tagged("\0"),
    "<|endoftext|>" * 500,
    r"\boxed{" * 4000 + "}" * 4000,
    "{" * 1_000_000,
    tagged(r"\boxed{" + "{" * 16_000),
    "<answer></answer>" * 100_000,
    "<think>" * 200_000,
    tagged("\ud800"),
]


@pytest.mark.parametrize("completion", HARD, ids=[f"{i}-{text[:18]!r}" for i, text in enumerate(HARD)])
def test_hard_completions_are_wrong_and_quick(completion: str) -> None:
    started = time.perf_counter()
    grade = TASK.grade(FIELDS, completion)
    seconds = time.perf_counter() - started
    print(f"{1000 * seconds:.1f} ms")  # 50 ms is the bound; the assertion leaves room for a busy machine
    assert seconds < 0.5
    assert not grade.correct and grade.error and len(grade.error) < 400


def reachable(numbers: list[int]) -> set[Fraction]:
    """An independent solver for three numbers: both shapes of tree, every order, every pair of operators."""
    operators = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}
    found = set()
    for (a, b, c), f, g in product(permutations(map(Fraction, numbers)), operators.values(), operators.values()):
        for tree in (lambda: g(f(a, b), c), lambda: g(a, f(b, c))):  # noqa: B023 (called at once)
            try:
                found.add(tree())
            except ZeroDivisionError:
                continue
    return found


def test_expressions_find_every_value_and_are_right() -> None:
    for numbers in ([3, 5, 8], [1, 1, 1], [20, 20, 20], [6, 4, 3]):
        found = expressions(numbers)
        assert set(found) == reachable(numbers)
        for value, text in found.items():
            parsed = evaluate(text)
            assert parsed.value == value and sorted(parsed.numbers) == sorted(numbers)


def test_expressions_of_four_numbers() -> None:
    assert evaluate(expressions([3, 3, 8, 8])[Fraction(24)]).value == 24


def test_values_in_order() -> None:
    apply = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for numbers in ([3, 5, 2], [1, 1, 1], [9, 7, 8], [20, 3, 11]):
        found = in_order(numbers)
        a, b, c = numbers
        assert set(found) == {apply[g](apply[f](a, b), c) for f, g in product("+-*", repeat=2)}
        for value, text in found.items():
            assert evaluate(text).value == value
            assert evaluate(text).numbers == tuple(numbers), "as given"
    assert in_order([3, 5, 2])[16] == "(3+5)*2"


def test_generated_problems_in_order() -> None:
    train = IN_ORDER.problems("train", seed=3, size=2400)
    test = IN_ORDER.problems("test", seed=3, size=500)
    IN_ORDER.check_disjoint(train, test)
    assert IN_ORDER.problems("train", seed=3, size=50) == train[:50] != IN_ORDER.problems("train", seed=4, size=50)
    for problems in (train, test):
        assert len({problem.id for problem in problems}) == len(problems)
        assert len({(*problem.fields["numbers"], problem.fields["target"]) for problem in problems}) == len(problems)
        for problem in problems:
            numbers, target = problem.fields["numbers"], problem.fields["target"]
            assert all(1 <= number <= 9 for number in numbers) and 10 <= target <= 99
            assert IN_ORDER.grade(problem.fields, tagged(f"{in_order(numbers)[target]}={target}")).reward == 4.0
    other = IN_ORDER.problems("test", seed=4, size=500)
    assert {IN_ORDER.leak_key(p.fields) for p in test} != {IN_ORDER.leak_key(p.fields) for p in other}, "another split"


def test_a_solution_in_another_order_is_right_too() -> None:
    fields = {"numbers": [3, 5, 2], "target": 16}
    for text in ("(3+5)*2=16", "2*(5+3)=16", "(5+3)*2"):
        assert IN_ORDER.grade(fields, tagged(text)) == TASK.grade(fields, tagged(text))
        assert IN_ORDER.grade(fields, tagged(text)).correct


def test_rows_of_a_file_that_have_no_solution_in_order_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('numbers,target\n"3,5,2",16\n"2,3,8",22\n')  # 22 = 3*8-2
    assert [problem.fields["target"] for problem in IN_ORDER.problems("train", seed=0, size=9, path=str(path))] == [16]
    assert len(TASK.problems("train", seed=0, size=9, path=str(path))) == 2


def test_generated_problems() -> None:
    train = TASK.problems("train", seed=3, size=1500)
    test = TASK.problems("test", seed=3, size=400)
    assert (len(train), len(test)) == (1500, 400)
    for problems in (train, test):
        assert len({problem.id for problem in problems}) == len(problems)
        keys = Counter((TASK.leak_key(problem.fields), problem.fields["target"]) for problem in problems)
        assert keys.most_common(1)[0][1] == 1, "no numbers and target come twice, in any order"
        for problem in problems:
            numbers, target = problem.fields["numbers"], problem.fields["target"]
            assert len(numbers) == 3 and all(1 <= number <= 20 for number in numbers) and 1 <= target <= 100
            assert TASK.grade(problem.fields, tagged(f"{expressions(numbers)[target]}={target}")).reward == 4.0
    TASK.check_disjoint(train, test)
    assert any(problem.fields["numbers"] != sorted(problem.fields["numbers"]) for problem in train)


def test_generation_depends_on_the_seed_alone() -> None:
    once = TASK.problems("train", seed=3, size=50)
    assert TASK.problems("train", seed=3, size=50) == once
    assert TASK.problems("train", seed=3, size=300)[:50] == once, "a larger size appends"
    assert TASK.problems("train", seed=4, size=50) != once
    # Pinned: a changed generator would silently change every data set and mix old test numbers into training.
    assert once[0].fields == {"numbers": [7, 6, 8], "target": 62}


def test_two_seeds_do_share_number_sets() -> None:
    """Negative control of the leak check: without one split per seed, it fires."""
    with pytest.raises(DataError, match="share"):
        TASK.check_disjoint(TASK.problems("train", seed=3, size=500), TASK.problems("test", seed=4, size=300))


def test_the_leak_check_ignores_order_and_target() -> None:
    problem = TASK.problems("train", seed=3, size=1)[0]
    turned = type(problem)("turned", {"numbers": problem.fields["numbers"][::-1], "target": 1})
    with pytest.raises(DataError, match="turned"):
        TASK.check_disjoint([turned], [problem])
    assert TASK.without_leaks([turned], [problem]) == []


@pytest.mark.parametrize("size", [0, -1, 10**6])
def test_a_size_that_cannot_be_had(size: int) -> None:
    with pytest.raises(ConfigError, match=f"size is {size}"):
        TASK.problems("test", seed=0, size=size)


def test_messages() -> None:
    fields = {"numbers": [3, 5, 8], "target": 16}
    assert TASK.messages(fields) == [{"role": "user", "content": "Numbers: 3,5,8 Target: 16"}]


def test_stored_test_file_is_solvable_and_graded_right(shared: Path) -> None:
    problems = TASK.problems("test", seed=0, size=10**6, path=str(shared / "data" / "countdown_cd3_test.jsonl"))
    assert len(problems) == 256
    assert problems[0].fields == {"numbers": [30, 100, 93], "target": 23}
    for problem in problems:
        numbers, target = problem.fields["numbers"], problem.fields["target"]
        assert target in reachable(numbers)
        text = expressions(numbers)[Fraction(target)]
        assert TASK.grade(problem.fields, tagged(text)).correct
        assert TASK.grade(problem.fields, tagged(f"{text}={target}")).reward == 4.0
        assert not TASK.grade(problem.fields, tagged(f"{text}={target + 1}")).correct
        assert not TASK.grade(problem.fields, tagged(f"{text}+1")).correct


def test_stored_train_file_leaks_and_the_leaks_are_dropped(shared: Path) -> None:
    data = shared / "data"
    train = TASK.problems("train", seed=0, size=10**6, path=str(data / "countdown_train20k.jsonl.gz"))
    test = TASK.problems("test", seed=0, size=10**6, path=str(data / "countdown_cd3_test.jsonl"))
    assert len(train) == 9953, "the rows with three numbers"
    with pytest.raises(DataError, match="countdown-countdown_train20k-"):
        TASK.check_disjoint(train, test)
    clean = TASK.without_leaks(train, test)
    assert len(train) - len(clean) == 13, "the number in the data set's notes"
    TASK.check_disjoint(clean, test)
