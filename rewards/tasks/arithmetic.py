"""Exact, bounded arithmetic on untrusted text: ``+ - * / ( )`` over unsigned integers, in rationals.

An own tokenizer and an operator-precedence loop with explicit stacks: nothing is evaluated as code, nothing recurses,
and every bound below is checked before work is done. A minus where an operand is expected negates it (``-3+8``,
``2*-(3)``); it is an operation, not part of a literal. There are no powers, decimals or implied products.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rewards.errors import UnmaskError
from rewards.parsing import shorten

MAX_CHARACTERS = 1000
MAX_TOKENS = 100
MAX_DIGITS = 12
MAX_DEPTH = 32

_TOKEN = re.compile(r"[0-9]+|\s+|.", re.ASCII | re.DOTALL)
_NEGATE = "negate"
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, _NEGATE: 3}
_BINARY: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class ExpressionError(UnmaskError, ValueError):
    """The text is no expression, breaks a bound, or divides by zero; the message is one clause saying which."""


@dataclass(frozen=True)
class Expression:
    """The exact value, and the literals in the order they were written."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Expression:
    """Parses and evaluates. Raises ExpressionError."""
    values: list[Fraction] = []
    pending: list[str] = []  # operators and open parentheses that wait for their right side
    numbers: list[int] = []
    depth = 0
    operand_next = True
    for token in _tokens(text):
        if token.isdigit():
            if not operand_next:
                raise ExpressionError(f"there is no operator before {token}")
            numbers.append(int(token))
            values.append(Fraction(numbers[-1]))
            operand_next = False
        elif token == "(":
            depth += 1
            if not operand_next:
                raise ExpressionError("there is no operator before an opening parenthesis")
            if depth > MAX_DEPTH:
                raise ExpressionError(f"parentheses are nested deeper than {MAX_DEPTH}")
            pending.append(token)
        elif operand_next and token == "-":
            pending.append(_NEGATE)
        elif operand_next:
            raise ExpressionError(f"{token!r} stands where a number should be")
        elif token == ")":
            depth -= 1
            if depth < 0:
                raise ExpressionError("a closing parenthesis has no opening one")
            _apply_pending(values, pending, 0)
            pending.pop()
        else:
            _apply_pending(values, pending, _PRECEDENCE[token])
            pending.append(token)
            operand_next = True
    if operand_next:
        raise ExpressionError("it ends where a number should be" if numbers else "there is no number in it")
    if depth:
        raise ExpressionError("a parenthesis is not closed")
    _apply_pending(values, pending, 0)
    return Expression(values.pop(), tuple(numbers))


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"it has {len(text)} characters, more than {MAX_CHARACTERS}")
    tokens = [token for token in _TOKEN.findall(text) if token[0] not in " \t\n\r\f\v"]
    if len(tokens) > MAX_TOKENS:
        raise ExpressionError(f"it has more than {MAX_TOKENS} numbers and operators")
    for token in tokens:
        if token[0] in "0123456789":
            if len(token) > MAX_DIGITS:
                raise ExpressionError(f"a number has {len(token)} digits, more than {MAX_DIGITS}")
        elif token not in "+-*/()":
            raise ExpressionError(f"{shorten(token)} is not allowed in an expression")
    return tokens


def _apply_pending(values: list[Fraction], pending: list[str], precedence: int) -> None:
    """Applies waiting operators of at least this precedence, back to the last open parenthesis."""
    while pending and pending[-1] != "(" and _PRECEDENCE[pending[-1]] >= precedence:
        name = pending.pop()
        right = values.pop()
        if name == _NEGATE:
            values.append(-right)
            continue
        if name == "/" and right == 0:
            raise ExpressionError("it divides by zero")
        values.append(_BINARY[name](values.pop(), right))
