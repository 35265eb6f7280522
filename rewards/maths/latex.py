r"""Reads the spelling of a mathematical answer, LaTeX or plain, into tokens. Total, and linear in the text.

Tokens are strings: a number ``3.50`` (thousands separators taken out, ``1e5`` in one piece), a run of letters ``xy``, a
word of ``\text{...}`` marked by a leading quote ``"cm``, a command ``\frac``, a one-character symbol. What only changes
the looks is dropped (``\left``, ``\,``, ``$``, ``\(``), synonyms become one (``\dfrac``, ``\frac``; ``\cdot``, ``*``),
and so do their Unicode spellings. Digits are ASCII digits only.
"""

import re
import unicodedata
from collections.abc import Sequence

_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2011": "-", "\u00d7": "*", "\u22c5": "*", "\u00b7": "*",
        "\u2219": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u03c0": r"\pi ", "\u221a": r"\radical ",
        "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b0": r"^\circ ",
        "\u222a": r"\cup ", "\u2229": r"\cap ", "\u00b1": r"\pm ", "\u2248": r"\approx ", "\u2208": r"\in ",
        "\u2205": r"\emptyset ", "\u03b8": r"\theta ", "\uff0c": ",", "\u066a": "%",
        "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u2153": r"\frac{1}{3}",
        "\u2154": r"\frac{2}{3}", "\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\u2061": "", "\u2062": "*",
        "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u00ad": "", "\ufe0f": "",
        "\u2010": "-", "\u2032": "'", "\u2019": "'", "\u2217": "*", "\u230a": r"\lfloor ", "\u230b": r"\rfloor ",
        "\u2308": r"\lceil ", "\u2309": r"\rceil ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ",
        "\u00a2": r"\text{ cents}", "\u20ac": r"\text{ euros }", "\u00a3": r"\text{ pounds sterling }",
    }
    | {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}  # fullwidth
)  # fmt: skip
_SCRIPTS = re.compile("([\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+)|([\u2080-\u2089]+)")

_TOKEN = re.compile(
    r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+|\.(?=[-+*/^]))?(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?|\.[0-9]+|[A-Za-z]+"
    r"|\s+|.",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!|\{,\}|\\,|\{,\}\\!)\s*(?=[0-9]{3}(?![0-9]))")
_REPEATING = re.compile(r"([0-9]{0,12})\.([0-9]{0,12})\\overline\{([0-9]{1,12})\}")
_GROUP = re.compile(r"[0-9]{3}(?:\.[0-9]+)?")
_PRIMES = re.compile(r"\^\s*(?:\{\s*((?:\\prime\s*){1,4})\}|\\prime(?![A-Za-z]))")
_ROW_SPACE = re.compile(r"(?<=\\\\)\s*\[-?[0-9.]{1,6}\s*(?:pt|em|ex|mm|cm|in)\]")
_LONE_DOLLAR = re.compile(r"(?<!\\)\$")

_DROPPED = frozenset({
    r"\displaystyle", r"\textstyle", r"\left", r"\right", r"\big", r"\Big", r"\bigg", r"\Bigg", r"\bigl",
    r"\bigr", r"\Bigl", r"\Bigr", r"\biggl", r"\biggr", r"\limits", r"\mathbf", r"\mathbb", r"\mathcal",
    r"\boldsymbol", r"\bf", r"\rm", r"\it", r"\boxed", r"\fbox", r"\underline", r"\uline", r"\mathit", r"\!",
    r"\(", r"\)", r"\[", r"\]", r"\nonumber", r"\notag", r"\qquad", r"\quad", r"\;", r"\:", r"\,",
    "~", "$", r"\ ", "\\\n",
})  # fmt: skip
_SPACES = frozenset({r"\ ", r"\,", r"\;", r"\:", r"\quad", r"\qquad", "~", "\\\n"})
_TEXT = frozenset({
    r"\text", r"\mbox", r"\textbf", r"\textit", r"\textrm", r"\textnormal", r"\texttt", r"\mathrm",
    r"\operatorname", r"\hbox",
})  # fmt: skip
_SYNONYMS = {
    # in plain text, or upright as in \mathrm{e}
    "pi": r"\pi", "inf": r"\infty", "infty": r"\infty", "infinity": r"\infty", '"i': "i", '"e': "e",
    r"\nicefrac": r"\frac", r"\sfrac": r"\frac", r"\lg": r"\log", r"\vert": "|", r"\mid": "|", r"\bar": r"\overline",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\leqslant": r"\le",
    r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\cdot": "*", r"\times": "*", r"\ast": "*", r"\div": "/",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")",
    r"\%": "%", r"\colon": ":", r"\lt": "<", r"\gt": ">", r"\lvert": "|", r"\rvert": "|", r"\varnothing": r"\emptyset",
    r"\infin": r"\infty", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
}  # fmt: skip

_UPRIGHT = frozenset({r"\mathrm", r"\operatorname"})
_OPERATORS = frozenset({"sin", "cos", "tan", "log", "ln", "exp"})

OPENERS = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\langle": r"\rangle",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
}
CLOSERS = frozenset(OPENERS.values())


def tokenize(text: str) -> list[str]:
    """The tokens, a single space between those that were apart, none at the ends."""
    if not text.isascii():
        text = _SCRIPTS.sub(_script, text).translate(_UNICODE)
    if "," in text or "\\," in text:
        text = _THOUSANDS.sub("", text)
    if "overline" in text:
        text = _REPEATING.sub(_fraction_of_repeating, text)
    if "prime" in text:
        text = _PRIMES.sub(lambda match: "'" * match[0].count("p"), text)
    if "\\\\" in text:
        text = _ROW_SPACE.sub("", text)
    if "$" in text and len(_LONE_DOLLAR.findall(text)) == 1:
        text = _LONE_DOLLAR.sub(r"\\$", text)  # one that pairs with none is money
    tokens: list[str] = []
    text_depth = 0  # open braces inside a \text{...}
    upright: frozenset[str] = frozenset()
    for token in _TOKEN.findall(text):
        if text_depth:
            text_depth += (token == "{") - (token == "}")
            if token in "{}":
                continue
            if token.isalpha():
                token = ("\\" if upright and token in _OPERATORS else '"') + token
        elif token in _TEXT:
            tokens.append(token)
            continue
        elif token == "{" and _opens_text(tokens):
            text_depth, upright = 1, _UPRIGHT.intersection(tokens[-2:])
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
    if r"\over" in tokens:
        tokens = _with_fractions(tokens)
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


def plain(tokens: Sequence[str]) -> str:
    r"""The tokens as one text for what is read no further: without spaces, signs of products, braces around one token,
    the case of words, full stops and hyphens between them. All else counts, and its order."""
    kept: list[str] = []
    for token in tokens:
        before = kept[-1] if kept else ""
        if before == r"\frac" and token.isdigit():  # \frac12
            kept += token
        elif token == "}" and kept[-2:-1] == ["{"]:
            kept[-2:] = kept[-1:]
        elif token not in (" ", "*") and not (token == "." and before[:1].isalpha()):
            word = token.lstrip('"')
            kept.append(word.casefold() if len(word) > 1 and word.isalpha() else word)
    text = ""
    for before, token, after in zip(["", *kept], kept, [*kept[1:], ""], strict=False):
        if token != "-" or not all(len(word) > 1 and word.isalpha() for word in (before, after)):
            text += " " * (is_number(token) and before != "" and is_number(before)) + token
    return text


def split(tokens: Sequence[str], separators: frozenset[str]) -> list[list[str]]:
    """The parts between the separators that stand outside all brackets. Brackets need not match in kind: ``[0,1)``."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        if token in OPENERS:
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


def _script(match: re.Match[str]) -> str:
    """Unicode's raised or lowered digits."""
    return f"{'^' if match[1] else '_'}{{{unicodedata.normalize('NFKC', match[0])}}}"


def _with_fractions(tokens: list[str]) -> list[str]:
    r"""``{a \over b}`` as ``{\frac{a}{b}}``."""
    written: list[str] = []
    begins = [0]  # of the open groups, in ``written``
    overs: list[bool] = [False]
    for token in tokens:
        if token == r"\over" and not overs[-1]:
            overs[-1] = True
            written[begins[-1] : begins[-1]] = [r"\frac", "{"]
            written += ["}", "{"]
            continue
        if token == "}" and len(begins) > 1:
            begin = begins.pop()
            if overs.pop():
                written.append("}")
                if begin == 1 or written[begin - 2][0] not in "\\^_}]":  # no argument, so its braces are none
                    del written[begin - 1]
                    continue
        written.append(token)
        if token == "{":
            begins.append(len(written))
            overs.append(False)
    return written + ["}"] * overs[0]


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
