r"""Reads an expression, made of the tokens of ``rewards.maths.latex``, into a tree. Total and bounded.

Spelling rules: numbers side by side are no product, whatever braces they are in; an integer before a proper fraction
of integers is a mixed number (``1\frac{2}{3}`` is 5/3); ``1/2x`` is read from left to right; ``i`` is the imaginary
unit; a run of at most four letters is a product. What has no arithmetic here (``\binom{n}{2}``, ``\gcd``) is a function
of which nothing is known, an accented letter is a name.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rewards.errors import UnmaskError
from rewards.maths.latex import OPENERS, is_number

MAX_TOKENS = 400
MAX_DEPTH = 40
MAX_BINOMIAL = 1000

FUNCTIONS = frozenset({
    "sin", "cos", "tan", "sec", "csc", "cot", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln",
    "exp",
})  # fmt: skip

Node = tuple[Any, ...]
"""(operation, operands...): number, name, i, negate, +, *, /, ^, !, root (index, radicand), call (function, it...)."""

_GREEK = frozenset({
    r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\varepsilon", r"\theta", r"\lambda", r"\mu",
    r"\nu", r"\rho", r"\sigma", r"\tau", r"\phi", r"\varphi", r"\omega", r"\psi", r"\pi", r"\ell", r"\infty",
})  # fmt: skip
_ROUNDED = {r"\lfloor": "floor", r"\lceil": "ceiling"}
_ACCENTS = frozenset({r"\overline", r"\vec", r"\hat", r"\tilde", r"\dot", r"\ddot", r"\overrightarrow", r"\widehat"})
_OF_SEVERAL = frozenset({"gcd", "lcm", "max", "min"})
_FIRST = _GREEK | _ACCENTS | {"(", "[", "{", r"\frac", r"\sqrt", r"\radical", r"\binom", *_ROUNDED}
"""What a factor begins with, beside numbers, letters, functions and bars."""


class Unreadable(UnmaskError):
    """The tokens are no expression that is read here, or break a bound."""


def parse(tokens: Sequence[str]) -> Node:
    """The tree of an expression. Raises Unreadable."""
    if len(tokens) > MAX_TOKENS:
        raise Unreadable(f"more than {MAX_TOKENS} tokens")
    reader = _Reader([token for token in tokens if token != " "], tokens)
    tree = reader.sum(0)
    if reader.next is not None:
        raise Unreadable(f"{reader.next!r} stands where an operator should be")
    return tree


def is_literal(node: Node) -> bool:
    """A number written out: digits, a sign, a fraction or mixed number of such; no operation left to do."""
    operation = node[0]
    if operation == "number":
        return True
    if operation == "negate":
        return is_literal(node[1])
    if operation == "/":
        return all(part[0] == "number" or (part[0] == "negate" and part[1][0] == "number") for part in node[1:])
    return False


def to_json(node: Node) -> list[Any]:
    """The tree as JSON values: a list of the operation and its operands, numbers as text (``"3/2"``)."""
    return [to_json(part) if isinstance(part, tuple) else str(part) for part in node]


class _Reader:
    """Recursive descent, one token ahead; ``depth`` bounds the recursion."""

    def __init__(self, tokens: list[str], spaced: Sequence[str]) -> None:
        self._tokens = tokens[::-1]
        self._bars = 0  # open ones, inside the present bracket
        self._after_number = False  # whether the last token was one
        self._spaced_mixed = _spaced_mixed_number(spaced)

    @property
    def next(self) -> str | None:
        return self._tokens[-1] if self._tokens else None

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        if self._spaced_mixed is not None:
            self._tokens = []
            return ("number", self._spaced_mixed)
        total: Node | None = None
        while total is None or self.next in ("+", "-"):
            negative = False
            while self.next in ("+", "-"):
                negative ^= self._tokens.pop() == "-"
            term = self._product(depth)
            if negative:
                term = ("negate", term)
            total = term if total is None else ("+", total, term)
        return total

    def _product(self, depth: int) -> Node:
        product = self._power(depth)
        while self.next is not None:
            if self.next in ("*", "/"):
                operation = self._tokens.pop()
                negative = self.next == "-"
                if negative:
                    self._tokens.pop()
                factor = self._power(depth)
                product = (operation, product, ("negate", factor) if negative else factor)
            elif self._starts_factor():
                mixed = self._mixed_number(product, depth)
                if mixed is not None:
                    product = mixed
                elif self.next == "{" or is_number(self.next):
                    product = ("*", product, self._beside(product, depth))
                else:
                    product = ("*", product, self._power(depth))
            else:
                break
        return product

    def _beside(self, before: Node, depth: int) -> Node:
        """A number or braces without a sign of a product before them."""
        assert self.next is not None
        if is_number(self.next) and (self._after_number or before[0] == "number"):
            raise Unreadable("two numbers side by side")
        only_braces = self.next == "{" and self._tokens[-2:-1] != ["("]
        factor = self._power(depth)
        if only_braces and (is_literal(factor) or factor[0] in ("+", "negate")):
            raise Unreadable("braces are no parentheses")
        return factor

    def _mixed_number(self, whole: Node, depth: int) -> Node | None:
        if self.next != r"\frac" or whole[0] != "number" or whole[1].denominator != 1:
            return None
        fraction = self._primary(depth + 1)
        parts = [part[1] for part in fraction[1:] if part[0] == "number"]
        if len(parts) < 2:
            return ("*", whole, fraction)
        if not (parts[0].denominator == parts[1].denominator == 1 and 0 < parts[0] < parts[1]):
            raise Unreadable("an integer beside an improper fraction is ambiguous")
        return ("number", whole[1] + parts[0] / parts[1])

    def _starts_factor(self) -> bool:
        token = self.next
        assert token is not None
        return (
            token in _FIRST
            or token.isalpha()
            or is_number(token)
            or (token == "|" and not self._bars)
            or token[1:] in FUNCTIONS
            or token[1:] in _OF_SEVERAL
        )

    def _power(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        base = self._primary(depth + 1)
        while self.next == "!":
            self._tokens.pop()
            base = ("!", base)
        if self._tokens[-2:] == ["*", "*"]:
            self._tokens[-2:] = ["^"]
        if self.next != "^":
            return base
        self._tokens.pop()
        if self._degree_sign():
            return ("/", ("*", base, ("name", r"\pi")), ("number", Fraction(180)))
        return ("^", base, self._exponent(depth + 1))

    def _degree_sign(self) -> bool:
        if self.next == r"\circ":
            self._tokens.pop()
            return True
        if self._tokens[-3:] == ["}", r"\circ", "{"]:
            del self._tokens[-3:]
            return True
        return False

    def _exponent(self, depth: int) -> Node:
        if self.next == "-":  # x^-1, as in plain text
            self._tokens.pop()
            return ("negate", self._exponent(depth + 1))
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        base = self._primary(depth + 1)
        if self.next == "^":  # from right to left
            self._tokens.pop()
            return ("^", base, self._exponent(depth + 1))
        return base

    def _primary(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        if not self._tokens:
            raise Unreadable("it ends where an operand should be")
        token = self._tokens.pop()
        self._after_number = is_number(token)
        if self._after_number:
            return ("number", Fraction(token))
        if token in ("(", "[", "{"):
            return self._bracketed(token, depth)[0]
        if token in _ROUNDED:
            return ("call", _ROUNDED[token], *self._bracketed(token, depth))
        if token == "|":
            self._bars += 1
            inner = self.sum(depth + 1)
            self._bars -= 1
            self._expect("|")
            return ("call", "abs", inner)
        if token == r"\frac":
            return ("/", self._argument(depth), self._argument(depth))
        if token == r"\binom":
            return self._binomial(depth)
        if token in (r"\sqrt", r"\radical") or token == "sqrt":
            index: Node = ("number", Fraction(2))
            if self.next == "[":
                self._tokens.pop()
                index = self.sum(depth + 1)
                self._expect("]")
            return ("root", index, self._primary(depth + 1) if self.next != "-" else self._argument(depth))
        name = token.lstrip('\\"')
        if name in FUNCTIONS and token[0] != '"':
            return self._call(name, depth)
        if name in _OF_SEVERAL and self.next in ("(", r"\{"):
            return ("call", name, *self._bracketed(self._tokens.pop(), depth, several=True))
        if token in _ACCENTS:
            return self._name(token + self._raw_argument(), depth)
        if token in _GREEK:
            return self._name(token, depth)
        if token.isascii() and token.isalpha():
            return self._letters(token, depth)
        raise Unreadable(f"{token!r} is not read")

    def _bracketed(self, opener: str, depth: int, *, several: bool = False) -> list[Node]:
        """What stands in a bracket that was opened, up to its end."""
        bars, self._bars = self._bars, 0
        inside = [self.sum(depth + 1)]
        while several and self.next in (",", ";"):
            self._tokens.pop()
            inside.append(self.sum(depth + 1))
        self._expect(OPENERS[opener])
        self._bars = bars
        return inside

    def _raw_argument(self) -> str:
        """A token or group as text: what an accent stands on."""
        taken = [self._tokens.pop()] if self._tokens else []
        while taken and taken[0] == "{" and taken[-1] != "}" and self._tokens and len(taken) < 8:
            taken.append(self._tokens.pop())
        return "".join(taken).strip("{}")

    def _argument(self, depth: int) -> Node:
        r"""TeX's undelimited argument: a group or one token, and of a number one digit (``\frac12``)."""
        if self.next is not None and is_number(self.next) and len(self.next) > 1:
            token = self._tokens.pop()
            if not token.isdigit():
                raise Unreadable("a fraction without braces is ambiguous")
            self._tokens.append(token[1:])
            return ("number", Fraction(token[0]))
        if self.next is not None and self.next.isalpha() and len(self.next) > 1:
            token = self._tokens.pop()
            self._tokens += [token[1:], token[0]]
        if self.next not in ("{", r"\pi", r"\sqrt") and not (self.next or "(").isalnum():
            raise Unreadable("a command lacks its argument")
        return self._primary(depth + 1)

    def _binomial(self, depth: int) -> Node:
        above, below = self._argument(depth), self._argument(depth)
        n, k = (part[1] if part[0] == "number" else -1 for part in (above, below))
        if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= MAX_BINOMIAL:
            return ("call", "binom", above, below)
        return ("*", ("number", Fraction(math.comb(int(n), int(k)))), ("number", Fraction(1)))  # work left to do

    def _call(self, name: str, depth: int) -> Node:
        power = base = None
        if self.next == "^":
            self._tokens.pop()
            power = self._exponent(depth + 1)
            if power == ("negate", ("number", Fraction(1))):
                raise Unreadable("an inverse function written as a power")
        if self.next == "_" and name == "log":
            self._tokens.pop()
            base = self._argument(depth)
        if self.next in ("(", "[", "{"):
            operand = self._primary(depth + 1)
        else:
            operand = self._power(depth + 1)
            while self.next is not None and self._starts_factor() and not self._starts_function():
                operand = ("*", operand, self._power(depth + 1))
        result: Node = ("call", name, operand)
        if base is not None:
            result = ("/", ("call", "ln", operand), ("call", "ln", base))
        return result if power is None else ("^", result, power)

    def _starts_function(self) -> bool:
        return (self.next or " ").lstrip("\\") in FUNCTIONS

    def _letters(self, run: str, depth: int) -> Node:
        """A run of letters is a product of names; only its last may have an index or a power."""
        if len(run) > 4:
            raise Unreadable(f"{run!r} is a word")
        if len(run) > 1:
            self._tokens.append(run[1:])
            return ("*", self._name(run[0], depth), self._power(depth + 1))
        return self._name(run, depth)

    def _name(self, name: str, depth: int) -> Node:
        if name == "i":
            return ("i",)
        if self.next == "_":
            self._tokens.pop()
            name += "_" + self._raw_argument()
        while self.next == "'":
            name += self._tokens.pop()
        return ("name", name)

    def _expect(self, token: str) -> None:
        self._after_number = False
        if not self._tokens or self._tokens.pop() != token:
            raise Unreadable(f"{token!r} is missing")


def _spaced_mixed_number(tokens: Sequence[str]) -> Fraction | None:
    """``1 2/3``, the whole of it."""
    sign, tokens = (-1, tokens[1:]) if tokens and tokens[0] == "-" else (1, tokens)
    if len(tokens) != 5 or tokens[1] != " " or tokens[3] != "/" or not all(tokens[n].isdigit() for n in (0, 2, 4)):
        return None
    whole, numerator, denominator = (int(tokens[n]) for n in (0, 2, 4))
    return sign * (whole + Fraction(numerator, denominator)) if 0 < numerator < denominator else None
