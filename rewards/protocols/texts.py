r"""Finds tags and boxes as the published codes do, in linear time.

The published regular expressions need quadratic time or more on hostile texts (an opening tag repeated a thousand
times), so the same matches are found by plain search here.
"""

import re
from collections.abc import Iterator

MAX_CHARACTERS = 16_384
"""More than four times the longest published completion (1024 tokens)."""

_BRACE_OR_LINE_END = re.compile(r"[}\n]")


def read(completion: str) -> str:
    """The part of a completion that is graded."""
    return completion[:MAX_CHARACTERS]


def first_block(text: str, tag: str, *, ignore_case: bool = False) -> str | None:
    """The stripped inside of the first ``<tag>`` that a ``</tag>`` follows, up to that; None without one."""
    flags = re.IGNORECASE if ignore_case else 0
    opening = re.compile(f"<{tag}>", flags).search(text)
    closing = opening and re.compile(f"</{tag}>", flags).search(text, opening.end())
    return text[opening.end() : closing.start()].strip() if opening and closing else None


def last_block(text: str, tag: str) -> str | None:
    """The stripped inside of the last ``<tag>...</tag>``, pairing tags from the left; None without one."""
    inside, position = None, 0
    while (start := text.find(f"<{tag}>", position)) >= 0 and (end := text.find(f"</{tag}>", start)) >= 0:
        inside = text[start + len(tag) + 2 : end]
        position = end + len(tag) + 3
    return None if inside is None else inside.strip()


def matching_brace(text: str, start: int) -> int | None:
    """Where the first brace at or after ``start`` is closed. Closing braces before it count as well."""
    depth = 0
    for match in re.compile("[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0 and match.group() == "}":
            return match.start()
    return None


def boxes_to_a_brace(text: str) -> Iterator[str]:
    r"""The insides of ``\boxed{...}`` up to their first closing brace, where it is on the same line, in order."""
    opener, position = "\\boxed{", 0
    while (start := text.find(opener, position)) >= 0 and (stop := _BRACE_OR_LINE_END.search(text, start)):
        if stop.group() == "}":
            yield text[start + len(opener) : stop.start()]
        position = stop.end()  # where a line ends, every box that was opened in it is without its brace
