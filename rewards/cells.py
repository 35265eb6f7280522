"""What a cell of somebody's table means where it came in another type than a task's fields have."""

import ast
import json
import re
from collections.abc import Callable
from typing import Any

_WHOLE = re.compile(r"\s*([-+]?[0-9]{1,100})(\.0*)?\s*", re.ASCII)
_MAX_PYTHON = 2**20
"""Characters of a list in Python's spelling: parsing one takes hundreds of bytes a character at worst."""


def listed(value: Any) -> Any:
    """The list that a text spells, as JSON (``["a", "b"]``) or as pandas writes one into a csv (``['a', 'b']``); any
    other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for read in readers if len(value) <= _MAX_PYTHON else readers[:1]:
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return found
    return value


def whole(value: Any) -> Any:
    """A whole number that came as a float, as pandas makes one of a column with gaps, or as text; any other value as it
    is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (number := _WHOLE.fullmatch(value)):
        return int(number[1])
    return value


def as_text(value: Any) -> Any:
    """A number as its text, a whole one without a point, where a text is wanted; any other value as it is."""
    return str(whole(value)) if isinstance(value, int | float) and not isinstance(value, bool) else value
