r"""How d1 and SPG compare MATH answers: as strings, after the replacements that came with the MATH data set's code.

Nothing is understood mathematically: 0.25 is not \frac{1}{4}, (1, 2) is not (1,2.0), 1/2 equals \frac12 and 0.5 only
through a special case. Published mistakes kept here: a text with exactly one ``/`` that is not between two integers,
or an empty ``\sqrt`` or ``\frac``, or two ``\text{ `` makes the cleaning fail, and then the raw texts must be equal.
"""

from rewards.protocols.texts import matching_brace

_BOXED = "\\boxed"

_REPLACEMENTS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)


class _Fails(Exception):
    """The published cleaning raises on this text."""


def same_answer(one: str, other: str) -> bool:
    """Whether the cleaned texts are equal; the raw ones when one can't be cleaned."""
    try:
        return _cleaned(one) == _cleaned(other)
    except _Fails:
        return one == other


def last_box(text: str) -> str | None:
    r"""The inside of the last ``\boxed{...}``; the whole text when there is no box; None for a box that is not closed.

    As published: ``\boxed `` with a space anywhere wins over every box with braces and reaches to the next ``$``;
    ``\fbox`` is found but not taken off.
    """
    if f"{_BOXED} " in text:
        return text.split(f"{_BOXED} ")[-1].split("$")[0]
    start = text.rfind(_BOXED)
    if start < 0 and (start := text.rfind("\\fbox")) < 0:
        return text
    end = matching_brace(text, start)
    if end is None:
        return None
    box = text[start : end + 1]
    return box[len(_BOXED) + 1 : -1] if box.startswith(_BOXED + "{") else box


def _cleaned(text: str) -> str:
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    value, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise _Fails
    text = value.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    name, *values = text.split("=")
    if len(values) == 1 and len(name) <= 2:
        text = values[0]
    text = _with_braced_fractions(_with_braced_roots(text).replace(" ", ""))
    return _as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _with_braced_roots(text: str) -> str:
    r"""``\sqrt3`` as ``\sqrt{3}``: one character, whatever it is."""
    head, *tails = text.split("\\sqrt")
    if "" in tails:
        raise _Fails
    return head + "".join("\\sqrt" + (tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}") for tail in tails)


def _with_braced_fractions(text: str) -> str:
    r"""``\frac12`` as ``\frac{1}{2}``. One tail that is too short leaves the whole text as it was."""
    head, *tails = text.split("\\frac")
    fixed = [head]
    for tail in tails:
        if not tail:
            raise _Fails
        if tail[0] != "{":
            if len(tail) < 2:
                return text
            second = tail[1] if tail[1] == "{" else f"{{{tail[1]}}}"
            tail = f"{{{tail[0]}}}{second}{tail[2:]}"
        fixed.append("\\frac" + tail)
    return "".join(fixed)


def _as_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        above, below = map(int, parts)
    except ValueError:
        raise _Fails from None
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
