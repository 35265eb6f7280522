r"""Values of expressions (``rewards.maths.expression``): equality decided exactly wherever that is cheap.

Several ways, each total and bounded:

- ``rational``: the exact value as a Fraction, when it is a constant made of rationals.
- ``residue``: the value in the field of integers modulo PRIME, each variable (``\pi`` and ``e`` among them) at a fixed
  arbitrary point, ``i`` and the roots of integers as elements whose squares they are. Equal expressions of that kind
  have equal residues; unequal ones by accident with a probability around 2^-130 (Schwartz and Zippel's lemma). Big
  powers cost nothing there: ``2^{2008}-2`` is a modular power.
  With ``opaque``, what is none (roots, logarithms, binomials of names) has a residue that depends on those of its
  operands and on nothing else: then equal residues still mean equal values, and unequal ones mean nothing.
- ``approximation``: complex floats at some points, for everything else (nested roots, trigonometry, logarithms). It
  only ever tells expressions apart; whether those that agree are equal is for ``rewards.maths.symbolic``. Names are
  real and of either sign; where one is negative, what has no real value has none.
"""

import cmath
import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache

from rewards.maths.expression import Node

MAX_BITS = 6000
"""Of a numerator or denominator."""
MAX_FACTORIAL = 1000
MAX_RADICAND = 10**8

PRIME = 9222428634403621994265291800273042839412761
"""One more than a multiple of 8 and of all odd primes below 100, so that -1 and these primes have roots modulo it."""

_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "log": lambda z: cmath.log(z) / math.log(10), "ln": cmath.log,
    "exp": cmath.exp, "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "sinh": cmath.sinh,
    "cosh": cmath.cosh, "tanh": cmath.tanh, "abs": abs, "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z), "cot": lambda z: cmath.cos(z) / cmath.sin(z),
    "floor": lambda z: math.floor(_real(z)), "ceiling": lambda z: math.ceil(_real(z)),
}  # fmt: skip
_POINTS = 8
_POSITIVE_POINTS = 2
"""The first of them, where all names are positive."""
_SMALL_PRIMES = [q for q in range(2, 10_000) if all(q % d for d in range(2, math.isqrt(q) + 1))]


class Inexact(Exception):
    """The value can't be had in this way."""


def rational(node: Node) -> Fraction | None:
    """The exact value, None when it is not a rational constant or is too big."""
    try:
        return _rational(node)
    except (Inexact, ZeroDivisionError):
        return None


def residue(node: Node, point: int = 0, *, opaque: bool = False) -> int:
    """The value modulo PRIME, with the variables at one of many points. Raises Inexact for what has none."""
    try:
        return _residue(node, point, opaque)
    except (ZeroDivisionError, ValueError):
        raise Inexact from None


def approximation(node: Node) -> list[complex | None]:
    """The values at some points, None where there is none. Raises Inexact when that is so where all names are
    positive."""
    values = [_value_at(node, point) for point in range(_POINTS)]
    if None in values[:_POSITIVE_POINTS]:
        raise Inexact
    return values


def _value_at(node: Node, point: int) -> complex | None:
    try:
        value = _approximate(node, point)
    except (ArithmeticError, ValueError, TypeError, RecursionError, Inexact):
        return None
    return value if cmath.isfinite(value) else None


def _rational(node: Node) -> Fraction:
    operation = node[0]
    if operation == "number":
        return node[1]
    if operation == "negate":
        return -_rational(node[1])
    if operation not in ("+", "*", "/", "^", "!"):
        raise Inexact
    left = _rational(node[1])
    if operation == "!":
        return Fraction(math.factorial(_factorial_operand(left)))
    right = _rational(node[2])
    if operation == "^":
        bits = max(left.numerator.bit_length(), left.denominator.bit_length())
        if right.denominator != 1 or abs(right) * bits > MAX_BITS:
            raise Inexact
        return left ** int(right)
    value = left + right if operation == "+" else left * right if operation == "*" else left / right
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Inexact
    return value


def _residue(node: Node, point: int, opaque: bool) -> int:
    operation = node[0]
    if operation == "number":
        return node[1].numerator * pow(node[1].denominator, -1, PRIME) % PRIME
    if operation == "name":
        return _position(node[1], point)
    if operation == "i":
        return _imaginary_unit()
    if operation == "negate":
        return -_residue(node[1], point, opaque) % PRIME
    if operation == "+":
        return (_residue(node[1], point, opaque) + _residue(node[2], point, opaque)) % PRIME
    if operation == "*":
        return _residue(node[1], point, opaque) * _residue(node[2], point, opaque) % PRIME
    if operation == "/":
        return _residue(node[1], point, opaque) * pow(_residue(node[2], point, opaque), -1, PRIME) % PRIME
    try:
        if operation == "!":
            return _residue(("number", _rational(node)), point, opaque)
        if operation == "root":
            return _root(_rational(node[1]), _rational(node[2]))
        if operation == "^":
            exponent = _rational(node[2])
            if exponent == Fraction(1, 2):
                return _residue(("root", ("number", Fraction(2)), node[1]), point, opaque)
            if exponent.denominator != 1:
                raise Inexact
            base = _residue(node[1], point, opaque)
            if base == 0 and exponent <= 0:
                raise Inexact
            return pow(base, int(exponent), PRIME)
        raise Inexact
    except Inexact:
        if not opaque:
            raise
        parts = [_residue(part, point, opaque) if isinstance(part, tuple) else part for part in node]
        return _position(str(parts), 0)


def _root(index: Fraction, radicand: Fraction) -> int:
    if index != 2:
        raise Inexact
    root = _integer_root(abs(radicand.numerator * radicand.denominator))
    root = root * (_imaginary_unit() if radicand < 0 else 1)
    return root * pow(radicand.denominator, -1, PRIME) % PRIME


def _approximate(node: Node, point: int) -> complex:
    operation = node[0]
    if operation == "number":
        return complex(node[1])
    if operation == "name":
        return math.pi if node[1] == r"\pi" else math.e if node[1] == "e" else _coordinate(node[1], point)
    if operation == "i":
        return 1j
    if operation == "negate":
        return 0 - _approximate(node[1], point)  # keeps the sign of a zero imaginary part
    if operation == "call":
        if node[1] not in _FUNCTIONS:
            raise Inexact
        operand = _approximate(node[2], point)
        if node[1] in ("ln", "log") and point >= _POSITIVE_POINTS and operand.real < 0:
            raise Inexact
        return _FUNCTIONS[node[1]](operand)
    if operation == "!":
        return complex(_rational(node))
    left, right = _approximate(node[1], point), _approximate(node[2], point)
    if operation == "+":
        return left + right
    if operation == "*":
        return left * right
    if operation == "/":
        return left / right
    if operation == "^":
        if point >= _POSITIVE_POINTS and left.real < 0 and right.real % 1:
            raise Inexact
        return left**right
    right += 0j  # no negative zero: it would choose the other branch
    if right.imag == 0 and right.real < 0 and left.real % 2 == 1:
        return -((-right) ** (1 / left))  # the real root, as schools write it
    if point >= _POSITIVE_POINTS and right.real < 0:
        raise Inexact
    return right ** (1 / left)


def _factorial_operand(value: Fraction) -> int:
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise Inexact
    return int(value)


@lru_cache(maxsize=4096)
def _position(name: str, point: int) -> int:
    """Where a variable is put: arbitrary and fixed."""
    return int.from_bytes(hashlib.sha256(f"{name}/{point}".encode()).digest(), "big") % PRIME


def _coordinate(name: str, point: int) -> float:
    """Where a name is put on the real line: from 0.5 to 2.5, and at the later points of either sign."""
    drawn = _position(name, point)
    size = 0.5 + drawn % 2**32 / 2**31
    return -size if point >= _POSITIVE_POINTS and drawn >> 32 & 1 else size


def _real(value: complex) -> float:
    if abs(value.imag) > 1e-12:
        raise Inexact
    return value.real


@cache
def _imaginary_unit() -> int:
    return _root_of_prime(PRIME - 1)


def _integer_root(number: int) -> int:
    """A square root modulo PRIME, multiplicative: the product of fixed roots of the prime factors."""
    exact = math.isqrt(number)
    if exact * exact == number:
        return exact % PRIME
    if number > MAX_RADICAND:
        raise Inexact
    root = 1
    for prime in _SMALL_PRIMES:
        if prime * prime > number:
            break
        while number % prime == 0:
            number //= prime
            root = root * _root_of_prime(prime) % PRIME
    return root * _root_of_prime(number) % PRIME if number > 1 else root


@lru_cache(maxsize=4096)
def _root_of_prime(number: int) -> int:
    """Tonelli and Shanks's algorithm. Raises Inexact for what is no square modulo PRIME."""
    if pow(number, (PRIME - 1) // 2, PRIME) != 1:
        raise Inexact
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    other = next(n for n in range(2, 1000) if pow(n, (PRIME - 1) // 2, PRIME) != 1)
    step, error, root = pow(other, odd, PRIME), pow(number, odd, PRIME), pow(number, (odd + 1) // 2, PRIME)
    while error != 1:
        order, power = 0, error
        while power != 1:
            power, order = power * power % PRIME, order + 1
        shift = pow(step, 1 << (twos - order - 1), PRIME)
        twos, step = order, shift * shift % PRIME
        error, root = error * step % PRIME, root * shift % PRIME
    return root
