r"""Takes what is no number off a quantity: currency signs, percent and degree signs, unit words (``\text{ dogs}``).

Units are told apart only when both are well known: then 5 cm is not 5 cm^2 and 80 cents are not $80. Nothing is
converted. Other words (``apples``, ``units``, ``ways``) say nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.maths.expression import FUNCTIONS
from rewards.maths.latex import is_number

MAX_WORDS = 8

UNIT = "unit"
"""Some unit: only its power says something, of an area or volume."""
_KNOWN = {
    spelling: unit
    for unit, spellings in {
        "m": "m meter metre", "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre",
        "km": "km kilometer kilometre", "inch": "in inch inche", "foot": "ft foot feet", "yard": "yd yard",
        "mile": "mi mile", "second": "s sec second", "minute": "min minute", "hour": "h hr hour", "day": "day",
        "week": "week", "month": "month", "year": "yr year", "g": "g gm gram", "kg": "kg kilogram", "pound": "lb pound",
        "ounce": "oz ounce", "ton": "ton", "liter": "l liter litre", "ml": "ml milliliter millilitre",
        "gallon": "gal gallon", "cup": "cup", "acre": "acre", "dollar": "dollar usd buck", "cent": "cent",
        "euro": "euro", "degree": "degree", "radian": "rad radian", "mph": "mph", "dozen": "dozen", UNIT: "unit",
    }.items()
    for spelling in spellings.split()
}  # fmt: skip
_ABBREVIATIONS = frozenset({
    "cm", "mm", "km", "ft", "yd", "mi", "hr", "yr", "gm", "kg", "lb", "lbs", "oz", "ml", "usd", "mph", "kph",
    "gal", "sq", "cu", "hrs", "mins",
})  # fmt: skip
"""Read as units also where they are not in a ``\\text``; shorter ones may be variables."""
_LETTERS = frozenset({"m", "g", "s", "h", "L"})
"""These too, but only apart from a plain number: ``12 m``."""
_MULTIPLIERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNITS = frozenset({
    "or", "and", "not", "no", "nor", "plus", "minus", "times", "over", "than", "more", "less", "least",
    "most", "fewer", "if", "when", "remainder", "only", "to", "through", "between", "is", "are", "was",
    "equals", "divided", "by", "point", "half",
})  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """The tokens without the rest; ``multiplier`` is of words such as ``million``. ``doubtful``: a unit that was taken
    off may be a variable, or several (``5 m``, ``2 abc``)."""

    tokens: Sequence[str]
    units: frozenset[str] = frozenset()
    percent: bool = False
    multiplier: int = 1
    doubtful: bool = False


def quantity(tokens: Sequence[str]) -> Quantity:
    """Splits a number or expression from its units. Tokens without such come back as they are."""
    core = [token for token in tokens if token != " "] if r"\$" in tokens else list(tokens)
    units: set[str] = set()
    if r"\$" in core:
        core = [token for token in core if token != r"\$"]
        units.add("dollar")
    while core and core[0] in ('"euros', '"pounds', '"sterling', " "):
        units.add("euro" if core[0] == '"euros' else "sterling")
        core.pop(0)
    percent, multiplier, power, words, doubtful = False, 1, "", 0, False
    while core and words <= MAX_WORDS:
        last = core[-1]
        word = last.lstrip('"').lower()
        if last == " ":
            core.pop()
        elif last == "%" or (word in ("percent", "percentage") and len(core) > 1):
            percent = True
            core.pop()
        elif (cut := _degree_sign(core)) and len(core) > cut and not _calls_function(core):
            units.add("degree")
            del core[-cut:]
        elif (cut := _unit_power(core)) and len(core) > cut:
            power = "^" + core[-1 if core[-1] != "}" else -2]
            del core[-cut:]
        elif _is_unit(core):
            words += 1
            core.pop()
            doubtful |= last[0] != '"' and (len(last) == 1 or (len(last) < 5 and not _names_unit(word)))
            if word in _MULTIPLIERS:
                multiplier *= _MULTIPLIERS[word]
            elif word in ("square", "sq"):
                units = {unit if "^" in unit else unit + "^2" for unit in units}
            elif word in ("cubic", "cu"):
                units = {unit if "^" in unit else unit + "^3" for unit in units}
            elif (unit := _KNOWN.get(word) or _KNOWN.get(word.removesuffix("s"))) is not None:
                units.add(unit + power)
            power = ""
        elif last == ")" and (length := _remark(core)) and len(core) > length:
            words += 1
            del core[-length:]
        elif words and len(core) > 1 and (last in ("/", ".") or (last == "-" and _joins_words(core))):
            core.pop()  # km/h, sq. ft, ten-foot
        else:
            break
    units.discard(UNIT)
    if not words and not units and not percent:
        return Quantity(tokens)
    if not units and not percent and not any(is_number(token) or token == r"\pi" for token in core):
        return Quantity(tokens)  # "n even"
    return Quantity(core, frozenset(units), percent, multiplier, doubtful)


def _is_unit(tokens: Sequence[str]) -> bool:
    r"""Whether the last token is a unit's word: of a ``\text``, or three letters and no function, after a number."""
    last = tokens[-1]
    word = last.lstrip('"').lower()
    if word in _NO_UNITS or not last.lstrip('"').isalpha() or len(tokens) < 2:
        return False
    if len(last) == 1 and last[0] != '"':
        return last in _LETTERS and len(tokens) == 3 and tokens[1] == " " and is_number(tokens[0])
    if last[0] != '"':
        if last in FUNCTIONS or (len(last) < 3 and word not in _ABBREVIATIONS) or last == "sqrt":
            return False
        before = next((token for token in reversed(tokens[:-1]) if token != " "), "")
        if not (
            is_number(before or " ") or before in ("}", ")", r"\pi", "%", "/", ".") or before.lstrip('"').isalpha()
        ):
            return False
    return any(not token.lstrip('"').isalpha() and token != " " for token in tokens[:-1])


def _remark(tokens: Sequence[str]) -> int:
    r"""How many tokens at the end are words in parentheses: ``5 \text{ (five)}``."""
    opened = next((n for n in range(2, min(len(tokens), 2 * MAX_WORDS) + 1) if tokens[-n] == "("), 0)
    words = [token for token in tokens[-opened + 1 : -1] if token != " "] if opened else []
    remarks = bool(words) and all(word[0] == '"' and word[1:].lower() not in _NO_UNITS for word in words)
    return opened if remarks else 0


def _joins_words(tokens: Sequence[str]) -> bool:
    """Whether the hyphen at the end is that of ``ten-foot``, not that of ``x-axis``."""
    before = next((token for token in reversed(tokens[:-1]) if token != " "), "")
    return is_number(before or " ") or len(before.lstrip('"')) > 1


def _names_unit(word: str) -> bool:
    return word in _KNOWN or word.removesuffix("s") in _KNOWN or word in _ABBREVIATIONS or word in _MULTIPLIERS


def _calls_function(tokens: Sequence[str]) -> bool:
    r"""Then a degree sign at the end is of its operand, as in ``2\cos 15^\circ``."""
    return any(token.lstrip("\\") in FUNCTIONS for token in tokens)


def _degree_sign(tokens: Sequence[str]) -> int:
    r"""How many tokens at the end are a degree sign, with or without the C or F of a temperature."""
    extra = 1 if tokens[-1].lstrip('"') in ("C", "F") else 0
    rest = tokens[: len(tokens) - extra]
    for sign in (["^", "{", "\\circ", "}"], ["^", "\\circ"], ["\\circ"], ["^", "{", "o", "}"], ["^", "o"], ["^", '"o']):
        if list(rest[-len(sign) :]) == sign:
            return len(sign) + extra
    return 0


def _unit_power(tokens: Sequence[str]) -> int:
    r"""How many tokens at the end are the power of a unit's word: ``\text{cm}^2``, ``\text{cm}^{2}``."""
    for length, exponent in ((2, tokens[-1]), (4, tokens[-2] if len(tokens) > 3 else "")):
        if len(tokens) > length and exponent in ("2", "3") and tokens[-length] == "^":
            before = tokens[-length - 1]
            if before[0] == '"' or before in _ABBREVIATIONS:
                return length
    return 0
