"""The arithmetic parser: exact, bounded, and right by an independent evaluation."""

import random
import sys
import time
from fractions import Fraction

import pytest

from rewards.tasks import arithmetic
from rewards.tasks.arithmetic import ExpressionError, evaluate

VALUES = [
    ("7", Fraction(7)),
    ("1+2*3", Fraction(7)),
    ("(1+2)*3", Fraction(9)),
    ("10-3-2", Fraction(5)),
    ("24/4/3", Fraction(2)),
    ("2*6/4", Fraction(3)),
    ("1/3+1/3+1/3", Fraction(1)),
    (" ( ( 7 ) ) \n", Fraction(7)),
    ("-3+8", Fraction(5)),
    ("-3*-5", Fraction(15)),
    ("-(3-8)", Fraction(5)),
    ("8--3", Fraction(11)),
    ("2*-3+1", Fraction(-5)),
    ("007", Fraction(7)),
    ("0*5", Fraction(0)),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_value(text: str, value: Fraction) -> None:
    assert evaluate(text).value == value


FAULTS = [
    ("", "no number", "empty"),
    ("   ", "no number", "only spaces"),
    ("9**9**9", "where a number should be", "powers"),
    ("9//2", "where a number should be", "floor division"),
    ("+3", "where a number should be", "unary plus"),
    ("3+", "ends where", "trailing operator"),
    ("-", "no number", "an operator alone"),
    ("3 5", "no operator before 5", "two numbers side by side"),
    ("3(5)", "no operator before", "implied product"),
    ("(3)(5)", "no operator before", "implied product of parentheses"),
    ("(3)5", "no operator before 5", "a number after a parenthesis"),
    ("()", "where a number should be", "empty parentheses"),
    ("(3+5", "not closed", "unclosed"),
    ("3+5)", "no opening", "unopened"),
    (")3+5(", "where a number should be", "backwards"),
    ("1/0", "divides by zero", "division by zero"),
    ("1/(3-3)", "divides by zero", "division by a computed zero"),
    ("0/0", "divides by zero", "nought by nought"),
    ("3.0", "not allowed", "decimals"),
    ("1e9", "not allowed", "exponents"),
    ("1_000", "not allowed", "underscores"),
    ("0x10", "not allowed", "hexadecimal"),
    ("\u0663+5", "not allowed", "Arabic-Indic digits"),
    ("\uff13+5", "not allowed", "full-width digits"),
    ("3\u00b2", "not allowed", "superscripts"),
    ("3\u2212\u0031", "not allowed", "the minus sign that is not ASCII"),
    ("3\u00a0+5", "not allowed", "a no-break space"),
    ("3\x00+5", "not allowed", "NUL"),
    ("\ud800", "not allowed", "a lone surrogate"),
    ("__import__('os')", "not allowed", "code"),
    ("9" * 13, "13 digits", "a literal over the bound"),
    ("1+" * 100 + "1", "more than 100", "too many tokens"),
    ("(" * 33 + "1" + ")" * 33, "nested deeper", "too deep"),
    ("(" * 10_000 + "1" + ")" * 10_000, "20001 characters", "ten thousand parentheses"),
    ("1" * 1_000_000, "1000000 characters", "a million characters"),
]


@pytest.mark.parametrize(("text", "fault", "reason"), FAULTS, ids=[row[2] for row in FAULTS])
def test_fault(text: str, fault: str, reason: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ExpressionError, match=fault):
        evaluate(text)
    assert time.perf_counter() - started < 0.5, reason


def test_numbers_are_the_literals_in_order() -> None:
    assert evaluate("-(12-3)*007/12").numbers == (12, 3, 7, 12)


def test_the_largest_expressions_inside_the_bounds_are_quick() -> None:
    literal = "9" * arithmetic.MAX_DIGITS
    terms = arithmetic.MAX_TOKENS // 2
    for text in ("*".join([literal] * terms), "+".join([f"1/{literal}"] * (terms // 2)), "-" * 98 + "1"):
        started = time.perf_counter()
        evaluate(text)
        assert time.perf_counter() - started < 0.5


def test_depth_does_not_use_the_call_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "MAX_DEPTH", 10**6)
    monkeypatch.setattr(arithmetic, "MAX_TOKENS", 10**6)
    monkeypatch.setattr(arithmetic, "MAX_CHARACTERS", 10**6)
    depth = 10 * sys.getrecursionlimit()
    assert evaluate("(" * depth + "1" + ")" * depth).value == 1


def _random_tree(rng: random.Random, leaves: int) -> tuple[str, Fraction | None, list[int]]:
    """An expression's text, fully parenthesised, its value computed on the way (None: divides by zero), its numbers."""
    if leaves == 1:
        number = rng.randrange(0, 30)
        return (
            (str(number), Fraction(number), [number])
            if rng.random() < 0.8
            else (f"-{number}", Fraction(-number), [number])
        )
    split = rng.randrange(1, leaves)
    left_text, left, left_numbers = _random_tree(rng, split)
    right_text, right, right_numbers = _random_tree(rng, leaves - split)
    sign = rng.choice("+-*/")
    value = None
    if left is not None and right is not None and not (sign == "/" and right == 0):
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else None}[sign]
    return f"({left_text} {sign} {right_text})", value, left_numbers + right_numbers


def test_random_trees_agree_with_their_value() -> None:
    rng = random.Random(0)
    zero_divisions = 0
    for _ in range(2000):
        text, value, numbers = _random_tree(rng, rng.randrange(1, 9))
        if value is None:
            zero_divisions += 1
            with pytest.raises(ExpressionError, match="divides by zero"):
                evaluate(text)
        else:
            parsed = evaluate(text)
            assert (parsed.value, list(parsed.numbers)) == (value, numbers), text
    assert zero_divisions > 20, "the case is drawn often enough to mean something"


def test_precedence_agrees_with_python_on_flat_expressions() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        numbers = [rng.randrange(1, 20) for _ in range(rng.randrange(2, 7))]
        signs = [rng.choice("+-*/") for _ in numbers[1:]]
        text = str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:], strict=True))
        # Independent: split at + and -, multiply out each term from the left.
        total, term = Fraction(0), Fraction(numbers[0])
        for sign, number in zip(signs, numbers[1:], strict=True):
            if sign in "+-":
                total, term = total + term, Fraction(number if sign == "+" else -number)
            else:
                term = term * number if sign == "*" else term / number
        assert evaluate(text).value == total + term, text
