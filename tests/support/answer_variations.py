r"""Variations of a gold answer in LaTeX: flips, which are another answer, and rewrites, which are the same one.

Both work on the spelling and know nothing of how answers are compared. A flip may leave the value as it is (``-0``, the
sign inside ``(x-1)^2``, two factors exchanged): who counts flips has to look at those that are accepted.
"""

import re
from collections.abc import Iterator

Variation = tuple[str, str]
"""What was done, and the answer that it made."""

_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|operatorname)\s*\{[^{}]*\}")
_PIECE = re.compile(r"\\[A-Za-z]+\s*|\\.|.", re.DOTALL)
_RELATIONS = {
    "<": (">", r"\le "), ">": ("<", r"\ge "), "=": (r"\ne ", "<"), r"\le": (r"\ge ", "<"), r"\leq": (r"\geq ", "<"),
    r"\ge": (r"\le ", ">"), r"\geq": (r"\leq ", ">"), r"\ne": ("=",), r"\neq": ("=",), r"\in": (r"\notin ",),
}  # fmt: skip
_OPERATORS = {
    "+": ("-", r"\cdot "), "-": ("+", ""), r"\cdot": ("+", "-"), r"\times": ("+", "-"), "*": ("+",), "/": ("+", "-"),
    r"\div": ("+",), r"\pm": ("+", "-"), "^": ("+",), r"\cup": (r"\cap ",), r"\cap": (r"\cup ",),
}  # fmt: skip
_UNCHANGED = frozenset({r"\begin", r"\end", r"\text", r"\mbox", r"\mathrm", r"\textbf", r"\operatorname"})

_SPELLINGS: tuple[tuple[str, str, str], ...] = (
    ("dfrac", r"\\[dt]?frac(?![a-z])", r"\\dfrac"), ("tfrac", r"\\[dt]?frac(?![a-z])", r"\\tfrac"),
    ("frac", r"\\[dt]frac(?![a-z])", r"\\frac"), ("cdot", r"\\cdot(?![a-z])", r"\\times"),
    ("times", r"\\times(?![a-z])", r"\\cdot"), ("sized", r"\\left(?![a-z])|\\right(?![a-z])", ""),
    ("pi", r"\\pi(?![a-z])", "\u03c0"), ("plain pi", r"\\pi$", "pi"), ("infinity", r"\\infty(?![a-z])", "\u221e"),
    ("le", r"\\leq?(?![a-z])", "\u2264"), ("ge", r"\\geq?(?![a-z])", r"\\geqslant "),
    ("ne", r"\\neq?(?![a-z])", "\u2260"), ("cup", r"\\cup(?![a-z])", "\u222a"),
    ("braced power", r"\^([0-9a-z])", r"^{\1}"), ("power", r"\^\{([0-9a-z])\}", r"^\1"),
    ("index", r"_\{([0-9a-z])\}", r"_\1"), ("braced index", r"_([0-9a-z])", r"_{\1}"),
    ("raised", r"\^2(?![0-9])|\^\{2\}", "\u00b2"), ("braced root", r"\\sqrt\s*([0-9a-z])", r"\\sqrt{\1}"),
    ("spaced root", r"\\sqrt\{", r"\\sqrt {"),
    ("braced fraction", r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
    ("short fraction", r"\\frac\{([0-9])\}\{([0-9])\}(?![0-9])", r"\\frac\1\2"),
    ("thin spaces", r"([+=<>])", r"\\,\1\\,"), ("no spaces", r"(?<=[-+*/=<>,(){}0-9])\s+(?=[-+*/=<>,(){}])", ""),
    ("spaced signs", r"(?<=[^^_{(,=\s])([-+=<>])", r" \1 "), ("degrees", r"\^\{?\\circ\}?", "\u00b0"),
    ("matrix", r"\{pmatrix\}", "{bmatrix}"), ("left brace", r"\\\{", r"\\lbrace "),
    ("over", r"\\frac\{([^{}\\]+)\}\{([^{}\\]+)\}", r"{\1 \\over \2}"),
    ("lvert", r"(?<!\\)\|([^|]+)\|", r"\\lvert \1\\rvert "),
    ("roman", r"\\text\{", r"\\mathrm{"), ("mbox", r"\\text\{", r"\\mbox{"),
)  # fmt: skip


def flips(gold: str) -> Iterator[Variation]:
    """Copies with one sign, operator, relation, digit or decimal point changed, or two letters exchanged."""
    pieces = _PIECE.findall(gold)
    held = _held(gold, pieces)
    for index, piece in enumerate(pieces):
        if held[index]:
            continue
        name = piece.strip()
        for kind, table in (("relation", _RELATIONS), ("operator", _OPERATORS)):
            for other in table.get(name, ()):
                yield kind, _with(pieces, index, other)
        if name.isdigit():
            yield "digit", _with(pieces, index, str((int(name) + 1) % 10))
            if pieces[index - 1 : index] == ["."]:
                yield "point", "".join(pieces[: index - 1] + pieces[index:])
            elif pieces[index + 1 : index + 2] and pieces[index + 1].isdigit():
                yield "point", _with(pieces, index, name + ".")
    yield "sign", f"-{gold}"
    yield from _exchanged(pieces, [n for n, piece in enumerate(pieces) if not held[n] and piece.isalpha()])
    for match in _TEXT.finditer(gold):
        inside = match.group()
        letters = [n for n in range(inside.index("{") + 1, len(inside) - 1) if inside[n].isalpha()]
        for _, text in _exchanged(list(inside), letters):
            yield "text", gold[: match.start()] + text + gold[match.end() :]


def rewrites(gold: str) -> Iterator[Variation]:
    """The same answer in other spellings."""
    for kind, before, after in (
        ("dollars", "$", "$"), ("parentheses", r"\(", r"\)"), ("display", r"\[ ", r" \]"), ("full stop", "", "."),
        ("style", r"\displaystyle ", ""), ("box", r"\boxed{", "}"), ("spaces", "  ", " "), ("braces", "{", "}"),
        ("equals", "= ", ""), ("bold", "**", "**"),
    ):  # fmt: skip
        yield kind, f"{before}{gold}{after}"
    for kind, pattern, replacement in _SPELLINGS:
        yield kind, re.sub(pattern, replacement, gold)
    yield "minus", _TEXT.sub("", gold).replace("-", "\u2212") if not _TEXT.search(gold) else gold
    if "," not in gold and not _TEXT.search(gold):
        yield "nicefrac", gold.replace(r"\frac", r"\nicefrac")
    if re.fullmatch(r"-?[0-9]{1,9}", gold):
        yield from (
            ("decimal", f"{gold}.0"),
            ("fraction", rf"\frac{{{2 * int(gold)}}}{{2}}"),
            ("product", rf"1 \cdot ({gold})"),
        )
        yield "fullwidth", "".join(chr(0xFEE0 + ord(digit)) if digit.isdigit() else digit for digit in gold)
    if match := re.fullmatch(r"(-?)\\frac\{([0-9]{1,6})\}\{([0-9]{1,6})\}", gold):
        sign, above, below = match[1], int(match[2]), int(match[3])
        yield from (("slash", f"{sign}{above}/{below}"), ("doubled", rf"{sign}\frac{{{2 * above}}}{{{2 * below}}}"))
    terms = re.fullmatch(r"([^-+=<>,\\{}()\[\]|:]+)([-+])([^-+=<>,\\{}()\[\]|:!]+)", gold)
    if terms and not re.search(r"[%'\".]|\btext", gold):
        first, sign, second = terms.groups()
        yield "order", f"{second} + {first}" if sign == "+" else f"-{second} + {first}"
    if re.fullmatch(r"-?[0-9a-z+^ -]+(,\s*-?[0-9a-z+^ -]+)+", gold) and not re.search(r",\s*[0-9]{3}\b|[a-z]{3}", gold):
        yield "list", ", ".join(reversed(gold.split(",")))
    if re.fullmatch(r"\\text\{[A-Za-z ]{4,}\}", gold):
        yield from (("case", gold[:6] + gold[6:-1].swapcase() + "}"), ("plain text", gold[6:-1]))


def _held(gold: str, pieces: list[str]) -> list[bool]:
    """Which pieces are the inside of a text or the name of an environment."""
    held, position = [], 0
    spans = [match.span() for match in _TEXT.finditer(gold)]
    spans += [match.span() for match in re.finditer(r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?", gold)]
    for piece in pieces:
        held.append(any(start <= position < end for start, end in spans) or piece.strip() in _UNCHANGED)
        position += len(piece)
    return held


def _with(pieces: list[str], index: int, other: str) -> str:
    return "".join([*pieces[:index], other, *pieces[index + 1 :]])


def _exchanged(pieces: list[str], letters: list[int]) -> Iterator[Variation]:
    """Each letter with the next one that is another."""
    for one, other in zip(letters, letters[1:], strict=False):
        if pieces[one] != pieces[other]:
            changed = list(pieces)
            changed[one], changed[other] = pieces[other], pieces[one]
            yield "letters", "".join(changed)
