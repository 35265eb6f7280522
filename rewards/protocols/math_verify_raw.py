"""math-verify as the published codes call it: ``verify(parse(gold), parse(answer))``, with time and memory limits.

Each question is a fork of a helper process (``rewards.maths.symbolic``) and costs some ten milliseconds; two integers,
by far the commonest case, are compared here.
"""

import re
from functools import lru_cache

from rewards.maths import symbolic

MAX_CHARACTERS = 4096
"""A longer text is not read: room for a whole completion of the published lengths."""
MAX_DEPTH = 100
"""Nor is one with more brackets open at once. The parser's time grows with them, to seconds at some hundred; answers
have five."""

_INTEGER = re.compile(r"\$?(-?[1-9][0-9]{0,14}|0)\$?")
_BRACKET = re.compile(r"[][(){}]")


@lru_cache(maxsize=4096)
def finding(gold: str, answer: str) -> symbolic.Finding:
    """What math-verify makes of the two texts. ``timeout`` and ``failed``, where the published code waits for up to ten
    seconds or stops, count as different."""
    integers = _INTEGER.fullmatch(gold), _INTEGER.fullmatch(answer)
    if integers[0] and integers[1]:
        return "equal" if integers[0].group(1) == integers[1].group(1) else "different"
    if len(answer) > MAX_CHARACTERS or _depth(answer) > MAX_DEPTH:
        return "failed"
    return symbolic.ask_plain(gold, answer)


def verified(gold: str, answer: str) -> bool:
    """Whether math-verify takes the second text for the first."""
    return finding(gold, answer) == "equal"


def _depth(text: str) -> int:
    """Most brackets of any kind that are open at once."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest
