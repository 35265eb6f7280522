r"""What an answer is: a number or expression, several values, a bracketed tuple or interval, a matrix, a relation.

Reading never fails: what is nothing else is ``Words``, compared token by token. A form's ``key`` is its text
(``latex.key``).
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.maths.algebra import Inexact, approximation, rational
from rewards.maths.expression import Node, Unreadable, parse
from rewards.maths.latex import OPENERS, enclosed, is_number, key, plain, split, tokenize
from rewards.maths.units import quantity

MAX_CHARACTERS = 1000
"""A longer text is no answer."""
_MAX_DEPTH = 8
_MAX_PARTS = 64

_COUNTING = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_COUNTING)}
_LIST = frozenset({",", ";", '"and', '"or', "and", "or", '"And', '"Or'})
_UNION = frozenset({r"\cup"})
_RELATIONS = frozenset({"<", ">", r"\le", r"\ge", r"\ne"})
_MATRICES = frozenset({"pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix", "cases"})
_NAME = re.compile(
    r"\\?[A-Za-z]+'?(_(\{?[A-Za-z0-9]{1,6}\}?))?'?(\([A-Za-z0-9](,[A-Za-z])*\))?"
    r"|(\\angle|\\overline|m\\angle)\{?[A-Z]+\}?"
    r"|\([A-Za-z](,[A-Za-z]){1,3}\)"
)
_BASED = re.compile(r"\(?(-?[0-9A-Z.]+)\)?_\{?([0-9]{1,2}|[a-z]{3,8})\}?")
_TIME = re.compile(r"([0-9]{1,19}(?::[0-9]{1,19}){1,3})(am|pm|a\.m\.?|p\.m\.?)?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Form:
    key: str


@dataclass(frozen=True)
class Words(Form):
    """Text, or a formula that can't be read. ``plain``: what is compared (``latex.plain``)."""

    plain: str


@dataclass(frozen=True)
class Scalar(Form):
    """An expression with its units taken off. ``value`` is set for rational constants, ``whole`` where letters that may
    be variables were taken for a unit: the expression with them."""

    node: Node
    value: Fraction | None
    units: frozenset[str] = frozenset()
    percent: bool = False
    whole: Node | None = None


@dataclass(frozen=True)
class Items(Form):
    """Several values in any order: ``2, 3``, a set in braces, a union of intervals."""

    items: tuple[Form, ...]


@dataclass(frozen=True)
class Bracketed(Form):
    """Values in order: a tuple, a point, an interval. ``brackets`` is such as ``[)``."""

    brackets: str
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Matrix(Form):
    rows: tuple[tuple[Form, ...], ...]


@dataclass(frozen=True)
class Named(Form):
    """``x = 5``, ``x > 2`` (with the interval)."""

    name: str
    form: Form


@dataclass(frozen=True)
class Equation(Form):
    """``2x + 3y = 5``, as the difference of its sides."""

    node: Node


@dataclass(frozen=True)
class Based(Form):
    """``1011_2``."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio(Form):
    """``3:5``, ``4:30``, ``4:30 pm`` (``half`` of the day: "p")."""

    parts: tuple[Fraction, ...]
    half: str


@dataclass(frozen=True)
class Relation(Form):
    """``2x + 1 < 3y \\le 4``, as pairs of a sign (``<``, ``\\le`` or ``\\ne``) and the right side less the left."""

    steps: tuple[tuple[str, Node], ...]


@lru_cache(maxsize=16384)
def read(text: str) -> Form:
    """The form of an answer's text. Total."""
    if len(text) > MAX_CHARACTERS:
        return Words(text[:MAX_CHARACTERS], "")
    if text.removeprefix("-").isdigit() and text.isascii():  # most answers
        number: Node = ("number", Fraction(text.removeprefix("-")))
        return Scalar(text, ("negate", number) if text[0] == "-" else number, Fraction(text))
    return _read(tokenize(text), 0)


def _read(tokens: Sequence[str], depth: int) -> Form:
    tokens = _trimmed(tokens)
    text = key(tokens)
    if not tokens or depth > _MAX_DEPTH:
        return Words(text, plain(tokens))
    if len(tokens) == 1:
        word = tokens[0].lstrip('"')
        number = _NUMBER_WORDS.get(word.lower())
        if number is None and word.isalpha() and (len(word) > 2 or (len(word) == 2 and tokens[0] != word.lower())):
            return Words(text, plain(tokens))
        tokens = [number or word]
    for reader in (_several, _matrix, _relation, _bracketed, _plus_minus, _based, _ratio):
        form = reader(tokens, text, depth)
        if form is not None:
            return form
    return _scalar(tokens, text)


def _trimmed(tokens: Sequence[str]) -> list[str]:
    """Without what leads in (``=``, ``\\approx``), ends a sentence, or groups the whole."""
    trimmed = list(tokens)
    while trimmed:
        if trimmed[0] in ("=", r"\approx", ":", " ", r"\implies", r"\Rightarrow", r"\therefore", r"\\"):
            trimmed.pop(0)
        elif trimmed[-1] in (".", ",", ";", ":", " ", r"\\", "\\"):
            trimmed.pop()
        elif trimmed[0] == "*" and trimmed[-1] == "*" and len(trimmed) > 1:  # markdown
            trimmed = trimmed[1:-1]
        elif trimmed[0] in ("{", "(") and OPENERS[trimmed[0]] == trimmed[-1] and enclosed(trimmed):
            if trimmed[0] == "(" and len(split(trimmed[1:-1], _LIST)) > 1:
                break
            trimmed = trimmed[1:-1]
        else:
            break
    return trimmed


def _several(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    parts = [part for part in split(tokens, _LIST) if any(token != " " for token in part)]
    if not 1 < len(parts) <= _MAX_PARTS:
        parts = split(tokens, _UNION)
        if not 1 < len(parts) <= _MAX_PARTS:
            return None
    return Items(text, _flattened(_read(part, depth + 1) for part in parts))


def _flattened(forms: Iterable[Form]) -> tuple[Form, ...]:
    """With the values of ``1 \\pm \\sqrt{5}`` in place of it."""
    return tuple(item for form in forms for item in (form.items if isinstance(form, Items) else (form,)))


def _bracketed(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    if not enclosed(tokens):
        return None
    opener, closer = tokens[0], tokens[-1]
    inner = split(tokens[1:-1], frozenset({",", ";"}))
    if len(inner) > _MAX_PARTS or any(all(token == " " for token in part) for part in inner):
        return None
    items = tuple(_read(part, depth + 1) for part in inner)
    if (opener, closer) == (r"\{", r"\}"):
        return Items(text, _flattened(items))
    if opener == r"\langle":
        opener, closer = "(", ")"
    return Bracketed(text, opener + closer, items) if opener in "([" and closer in ")]" and len(items) > 1 else None


def _matrix(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    if enclosed(tokens) and tokens[0] in "([":
        tokens = _trimmed(tokens[1:-1])
    if tokens[:1] != [r"\begin"] or len(tokens) < 8 or tokens[2] not in _MATRICES or tokens.count(r"\begin") > 1:
        return None
    end = list(tokens).index(r"\end") if r"\end" in tokens else 0
    if end != len(tokens) - 4 or tokens[-2] != tokens[2]:
        return None
    body = list(tokens[4:end])
    if tokens[2] == "array":
        body = [token for token in body if token != " "]
        body = body[body.index("}") + 1 :] if body and body[0] == "{" and "}" in body else body
    rows = [row for row in split(body, frozenset({r"\\"})) if any(token != " " for token in row)]
    cells = [split(row, frozenset({"&"})) for row in rows]
    if sum(map(len, cells)) > _MAX_PARTS:
        return None
    return Matrix(text, tuple(tuple(_read(cell, depth + 1) for cell in row) for row in cells))


def _relation(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    if r"\in" in tokens:
        name, *rest = split(tokens, frozenset({r"\in"}))
        return Named(text, _name_of(name), _read(rest[0], depth + 1)) if len(rest) == 1 and _is_name(name) else None
    if _RELATIONS.intersection(tokens):
        return _inequality(tokens, text, depth)
    if r"\approx" in tokens:  # the exact value before its approximation, or what a name is
        sides = split(tokens, frozenset({r"\approx"}))
        if len(sides) != 2:
            return None
        exact, rounded = (_read(side, depth + 1) for side in sides)
        return rounded if _is_name(sides[0]) else exact if _rounds(exact, rounded) else None
    sides = split(tokens, frozenset({"="}))
    if not 1 < len(sides) <= 6 or any(all(token == " " for token in side) for side in sides):
        return None
    if _is_name(sides[0]):
        form = _chain([_read(side, depth + 1) for side in sides[1:]])
        return None if form is None else Named(text, _name_of(sides[0]), form)
    forms = [_read(side, depth + 1) for side in sides]
    if (constant := _chain(forms)) is not None:
        return constant
    if len(sides) > 2:
        return None
    if _is_name(sides[1]) and isinstance(forms[0], Scalar) and forms[0].value is not None:
        return Named(text, _name_of(sides[1]), forms[0])
    left, right = forms
    if isinstance(left, Scalar) and isinstance(right, Scalar):
        return Equation(text, ("+", left.node, ("negate", right.node)))
    return None


def _rounds(exact: Form, rounded: Form) -> bool:
    """Whether a decimal is an expression's value, rounded or cut off at its last digit."""
    if not isinstance(exact, Scalar) or not isinstance(rounded, Scalar) or rounded.value is None:
        return False
    decimals = re.search(r"\.([0-9]+)", rounded.key)
    try:
        value = approximation(exact.node)[0]
    except Inexact:
        return False
    return value is not None and abs(value - float(rounded.value)) < 10.0 ** -(len(decimals[1]) if decimals else 0)


def _chain(forms: Sequence[Form]) -> Form | None:
    """The last of values that are all equal constants, or the only one: ``1/2 = 0.5``."""
    if len(forms) == 1:
        return forms[0]
    values = {
        form.value / 100 if form.percent else form.value
        for form in forms
        if isinstance(form, Scalar) and form.value is not None
    }
    return (
        forms[-1]
        if len(values) == 1 and all(isinstance(form, Scalar) and form.value is not None for form in forms)
        else None
    )


def _inequality(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    """``x > 2`` and ``-1 < x \\le 3`` as the intervals that they are, of a name; others as relations."""
    signs = [token for token in tokens if token in _RELATIONS]
    sides = split(tokens, _RELATIONS)
    if len(sides) != len(signs) + 1:
        return None
    if signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], [{">": "<", r"\ge": r"\le"}.get(sign, "") for sign in signs[::-1]]
    if not {"<", r"\le"}.issuperset(signs) and signs != [r"\ne"]:
        return None
    forms = [_read(side, depth + 1) for side in sides]
    closed = [sign == r"\le" for sign in signs]
    infinity: Node = ("name", r"\infty")
    low = Scalar(r"-\infty", ("negate", infinity), None)
    high = Scalar(r"\infty", infinity, None)
    if len(sides) == 3 and _is_name(sides[1]):
        brackets = ("[" if closed[0] else "(") + ("]" if closed[1] else ")")
        return Named(text, _name_of(sides[1]), Bracketed(text, brackets, (forms[0], forms[2])))
    if len(sides) == 2 and signs != [r"\ne"] and _is_name(sides[0]):
        return Named(text, _name_of(sides[0]), Bracketed(text, "(]" if closed[0] else "()", (low, forms[1])))
    if len(sides) == 2 and signs != [r"\ne"] and _is_name(sides[1]):
        return Named(text, _name_of(sides[1]), Bracketed(text, "[)" if closed[0] else "()", (forms[0], high)))
    nodes = [form.node for form in forms if isinstance(form, Scalar)]
    if len(nodes) < len(sides):
        return None
    steps = zip(signs, nodes, nodes[1:], strict=False)
    return Relation(text, tuple((sign, ("+", right, ("negate", left))) for sign, left, right in steps))


def _plus_minus(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    if list(tokens).count(r"\pm") != 1:
        return None
    return Items(text, tuple(_read([sign if t == r"\pm" else t for t in tokens], depth + 1) for sign in "+-"))


def _based(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    match = _BASED.fullmatch(text) if "_" in tokens else None
    if match is None or not any(character.isdigit() for character in match[1]):
        return None
    base = int(match[2] if match[2].isdigit() else _NUMBER_WORDS.get(match[2], "0"))
    fits = all(int(digit, 36) < base for digit in match[1] if digit.isalnum())
    return Based(text, match[1], base) if fits else None


def _ratio(tokens: Sequence[str], text: str, depth: int) -> Form | None:
    if ":" not in tokens:
        return None
    match = _TIME.fullmatch(text)
    return Ratio(text, tuple(map(Fraction, match[1].split(":"))), (match[2] or "").lower()[:1]) if match else None


def _scalar(tokens: Sequence[str], text: str) -> Form:
    taken = quantity(tokens)
    core = [token[1:] if len(token) == 2 and token[0] == '"' else token for token in _trimmed(taken.tokens)]
    if len(core) > 2 and all(
        token == " " if n % 2 else token.isdigit() and (n == 0 or len(token) == 3) for n, token in enumerate(core)
    ):
        core = ["".join(token for token in core if token != " ")] if len(core[0]) <= 3 else core  # 12 000
    try:
        node = parse(core)
    except Unreadable:
        return Words(text, plain(tokens))
    whole: Node | None = None
    if taken.doubtful:
        with contextlib.suppress(Unreadable):
            whole = parse(_trimmed(tokens))
    if taken.multiplier > 1:
        node = ("*", node, ("number", Fraction(taken.multiplier)))
    return Scalar(text, node, rational(node), taken.units, taken.percent, whole)


def _name_of(tokens: Sequence[str]) -> str:
    return key([token for token in tokens if token not in "{}"])


def _is_name(tokens: Sequence[str]) -> bool:
    """``x``, ``x_1``, ``f(x)``, ``AB``, ``\\angle ABC`` or words: what a value is given to."""
    text = key(tokens)
    if text in ("e", "i", r"\pi", r"\infty") or len(text) > 60:
        return False
    if any(token[0] == '"' or (token.isalpha() and len(token) > 2) for token in tokens):
        return not any(is_number(token) for token in tokens)
    return _NAME.fullmatch(text) is not None
