"""Finding runs by words and by settings: ``sudoku lr=0.003 seed=2``."""

import json
from collections.abc import Mapping
from typing import Any

from services.dashboard.index import Known


def matches(known: Known, text: str) -> bool:
    """Whether every word is in the run's name, task, method, host, recipe, tags or note, or is a setting of it."""
    run = known.summary
    told = "\n".join((run.id, run.task, run.method, run.host, run.recipe or "", run.model, run.note, *run.tags)).lower()
    return all(word.lower() in told or _is_setting(known.about.settings, word) for word in text.split())


def _is_setting(settings: Mapping[str, Any], word: str) -> bool:
    """``key=value``, where the key may be the end of a longer one: of several the shortest count."""
    wanted, equals, value = word.partition("=")
    if not equals or not wanted:
        return False
    found = [key for key in settings if key == wanted or key.endswith(f".{wanted}")]
    parts = min((key.count(".") for key in found), default=0)
    return any(_same(settings[key], value) for key in found if key.count(".") == parts)


def _same(value: Any, text: str) -> bool:
    """As people write it: 3e-3 is 0.003, and names need no quotes."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == float(value)
        except ValueError:
            return False
    return text.lower() in (str(value).lower(), json.dumps(value, default=str).lower())
