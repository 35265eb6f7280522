r"""Reads the spelling of a mathematical answer, LaTeX or plain, into tokens. Total, and linear in the text.

Tokens are strings: a number ``3.50`` (thousands separators taken out, ``1e5`` in one piece), a run of letters ``xy``, a
word of ``\text{...}`` marked by a leading quote ``"cm``, a command ``\frac``, a one-character symbol. What only changes
the looks is dropped (``\left``, ``\,``, ``$``, ``\(``), synonyms become one (``\dfrac``, ``\frac``; ``\cdot``, ``*``),
and so do their Unicode spellings. Digits are ASCII digits only.
"""

import re
from collections.abc import Sequence

_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\u00d7": "*", "\u22c5": "*", "\u00b7": "*",
        "\u2219": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u03c0": r"\pi ", "\u221a": r"\radical ",
        "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b0": r"^\circ ",
        "\u222a": r"\cup ", "\u2229": r"\cap ", "\u00b1": r"\pm ", "\u2248": r"\approx ", "\u2208": r"\in ",
        "\u00b2": "^2", "\u00b3": "^3", "\u2205": r"\emptyset ", "\u03b8": r"\theta ", "\uff0c": ",", "\u066a": "%",
        "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u2153": r"\frac{1}{3}",
        "\u2154": r"\frac{2}{3}", "\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\u2061": "", "\u2062": "*",
        "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u00ad": "", "\ufe0f": "",
        "\u00a2": r"\text{ cents}", "\u20ac": r"\text{ euros }", "\u00a3": r"\text{ pounds sterling }",
    }
)  # fmt: skip

_TOKEN = re.compile(
    r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?|\.[0-9]+|[A-Za-z]+|\s+|.", re.DOTALL
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!|\{,\}|\\,|\{,\}\\!)\s*(?=[0-9]{3}(?![0-9]))")
_REPEATING = re.compile(r"([0-9]{0,12})\.([0-9]{0,12})\\overline\{([0-9]{1,12})\}")
_GROUP = re.compile(r"[0-9]{3}(?:\.[0-9]+)?")
_LONE_DOLLAR = re.compile(r"(?<!\\)\$")

_DROPPED = frozenset({
    r"\displaystyle", r"\textstyle", r"\left", r"\right", r"\big", r"\Big", r"\bigg", r"\Bigg", r"\bigl",
    r"\bigr", r"\Bigl", r"\Bigr", r"\biggl", r"\biggr", r"\limits", r"\mathbf", r"\mathbb", r"\mathcal",
    r"\boldsymbol", r"\bf", r"\rm", r"\it", r"\boxed", r"\fbox", r"\!", r"\(", r"\)", r"\[", r"\]",
    r"\nonumber", r"\notag", r"\qquad", r"\quad", r"\;", r"\:", r"\,", "~", "$", r"\ ", "\\\n",
})  # fmt: skip
_SPACES = frozenset({r"\ ", r"\,", r"\;", r"\:", r"\quad", r"\qquad", "~", "\\\n"})
_TEXT = frozenset({
    r"\text", r"\mbox", r"\textbf", r"\textit", r"\textrm", r"\textnormal", r"\texttt", r"\mathrm",
    r"\operatorname", r"\hbox",
})  # fmt: skip
_SYNONYMS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\leqslant": r"\le",
    r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\cdot": "*", r"\times": "*", r"\ast": "*", r"\div": "/",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")",
    r"\%": "%", r"\colon": ":", r"\lt": "<", r"\gt": ">", r"\lvert": "|", r"\rvert": "|", r"\varnothing": r"\emptyset",
    r"\infin": r"\infty", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
}  # fmt: skip

OPENERS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor"}
CLOSERS = frozenset(OPENERS.values()) | {r"\rceil"}


def tokenize(text: str) -> list[str]:
    """The tokens, a single space between those that were apart, none at the ends."""
    if not text.isascii():
        text = text.translate(_UNICODE)
    if "," in text or "\\," in text:
        text = _THOUSANDS.sub("", text)
    if "overline" in text:
        text = _REPEATING.sub(_fraction_of_repeating, text)
    if "$" in text and len(_LONE_DOLLAR.findall(text)) == 1:
        text = _LONE_DOLLAR.sub(r"\\$", text)  # one that pairs with none is money
    tokens: list[str] = []
    text_depth = 0  # open braces inside a \text{...}
    for token in _TOKEN.findall(text):
        if text_depth:
            text_depth += (token == "{") - (token == "}")
            if token in "{}":
                continue
            if token.isalpha():
                token = '"' + token
        elif token in _TEXT:
            tokens.append(token)
            continue
        elif token == "{" and _opens_text(tokens):
            text_depth = 1
            continue
        if token in _DROPPED:
            token = " " if token in _SPACES else ""
        elif token.isspace() or token == '"' or (len(token) == 1 and not token.isprintable()):
            token = " "
        if token == r"\degree":
            tokens += ["^", r"\circ"]
        elif token and not (token == " " and (not tokens or tokens[-1] == " ")):
            tokens.append(_SYNONYMS.get(token, token))
    tokens = [token for token in tokens if token not in _TEXT]
    tokens = [token for index, token in enumerate(tokens) if token != " " or tokens[index - 1 : index] != [" "]]
    while tokens and tokens[-1] == " ":
        tokens.pop()
    return _joined_thousands(tokens) if "," in tokens else tokens


def key(tokens: Sequence[str]) -> str:
    """The tokens as one text, spaces kept between numbers only: equal keys are the same answer, spelled alike."""
    text = ""
    for index, token in enumerate(tokens):
        if token != " ":
            text += token.lstrip('"')
        elif 0 < index < len(tokens) - 1 and is_number(tokens[index - 1]) and is_number(tokens[index + 1]):
            text += " "
    return text


def split(tokens: Sequence[str], separators: frozenset[str]) -> list[list[str]]:
    """The parts between the separators that stand outside all brackets. Brackets need not match in kind: ``[0,1)``."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        if token in OPENERS or token == r"\lceil":
            depth += 1
        elif token in CLOSERS:
            depth -= 1
        if depth == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def enclosed(tokens: Sequence[str]) -> bool:
    """Whether the first token opens a bracket that only the last one closes."""
    if len(tokens) < 2 or tokens[0] not in OPENERS or tokens[-1] not in CLOSERS:
        return False
    depth = 0
    for token in tokens[:-1]:
        depth += (token in OPENERS) - (token in CLOSERS)
        if depth == 0:
            return False
    return depth == 1


def is_number(token: str) -> bool:
    return token[0] in "0123456789" or (token[0] == "." and len(token) > 1)


def _opens_text(tokens: list[str]) -> bool:
    return bool(tokens) and (tokens[-1] in _TEXT or (tokens[-1] == " " and len(tokens) > 1 and tokens[-2] in _TEXT))


def _fraction_of_repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    scale = 10 ** len(fixed)
    nines = 10 ** len(repeated) - 1
    numerator = int((whole + fixed) or "0") * nines + int(repeated)
    return rf"\frac{{{numerator}}}{{{scale * nines}}}"


def _joined_thousands(tokens: list[str]) -> list[str]:
    """``1,234`` as one number, outside of brackets other than braces, where a comma separates coordinates."""
    joined: list[str] = []
    depth = 0
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if token != "{" and token != "}":
            depth += (token in OPENERS) - (token in CLOSERS)
        index += 1
        if depth == 0 and token.isdigit() and len(token) <= 3 and token[0] != "0":
            while (
                "." not in token
                and tokens[index : index + 1] == [","]
                and index + 1 < len(tokens)
                and _GROUP.fullmatch(tokens[index + 1])
            ):
                token += tokens[index + 1]
                index += 2
        joined.append(token)
    return joined
