"""math-verify as the published codes call it: ``verify(parse(gold), parse(answer))``, with time and memory limits.

Each question is a fork of a helper process (``rewards.symbolic``) and costs some ten milliseconds; two integers, by far
the commonest case, are compared here.
"""

import re
from functools import lru_cache

from rewards import symbolic

MAX_CHARACTERS = 4096
"""A longer text is not read: room for a whole completion of the published lengths."""

_INTEGER = re.compile(r"\$?(-?[1-9][0-9]{0,14}|0)\$?")


@lru_cache(maxsize=4096)
def finding(gold: str, answer: str) -> symbolic.Finding:
    """What math-verify makes of the two texts. ``timeout`` and ``failed``, where the published code waits for up to ten
    seconds or stops, count as different."""
    integers = _INTEGER.fullmatch(gold), _INTEGER.fullmatch(answer)
    if integers[0] and integers[1]:
        return "equal" if integers[0].group(1) == integers[1].group(1) else "different"
    return "failed" if len(answer) > MAX_CHARACTERS else symbolic.ask_plain(gold, answer)


def verified(gold: str, answer: str) -> bool:
    """Whether math-verify takes the second text for the first."""
    return finding(gold, answer) == "equal"
