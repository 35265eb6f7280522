"""What Python's ``eval`` makes of an arithmetic text, without running code and in bounded time.

d1 and SPG evaluate Countdown answers with ``eval`` after a check of the characters, so ``**`` and ``//`` count as
operators and the value is a float.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

Number = int | float | complex

MAX_CHARACTERS = 1000
MAX_POWER_BITS = 4096
"""An integer power with more bits is refused; ``eval`` would work it out, or never end."""

_ALLOWED = re.compile(r"[\d+\-*/().\s]+")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: lambda base, exponent: _power(base, exponent),
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def python_value(text: str) -> Number | None:
    """The value; None where ``eval`` fails, gives no number, or would take more than the bounds above."""
    if len(text) > MAX_CHARACTERS or not _ALLOWED.fullmatch(text):
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
        return None


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=left, op=operation, right=right):
            return _OPERATORS[type(operation)](_value(left), _value(right))
        case ast.UnaryOp(op=operation, operand=operand):
            return _OPERATORS[type(operation)](_value(operand))
    raise TypeError("not arithmetic")  # a call such as 2(3), an empty pair of parentheses, ...


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_POWER_BITS:
        raise OverflowError("the power is too large")
    return base**exponent
