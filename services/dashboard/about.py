"""What a run's settings, its starts and its evaluations tell of it beside its newest figures."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.dashboard.models import number
from services.store import schema
from services.store.reader import Reader
from services.store.starts import BEGUN

HELD_OUT = "eval/m/solve_rate"

_MOST_STARTS = 50
_MOST_DIFFERENCES = 40
_LONGEST_NAME = 200
_PLACES = ("run.name", "run.dir", "run.resume", "run.dashboard", "store.url")
_KEEPING = ("run.restarts", "run.shared", "trackers", "samples_per_iteration")
_KEEPING_SECTIONS = ("store.", "timeouts.", "resources.")
"""Settings that say how a run is kept, not what it computes."""


@dataclass(frozen=True)
class About:
    """Of one run; the same for as long as no other start of it comes."""

    settings: Mapping[str, Any]
    """By full key."""
    seed: int | None = None
    model: str = ""
    recipe: str | None = None
    differs: Mapping[str, Any] | None = None
    group: str = ""

    def fields(self) -> dict[str, Any]:
        """Of a ``RunSummary``."""
        told = {"seed": self.seed, "model": self.model, "recipe": self.recipe, "group": self.group}
        return told | {"differs": dict(self.differs or {})}


NOTHING = About({})


def about(reader: Reader, row: Mapping[str, Any] | None) -> About:
    """``row``: the run's, with its ``config``."""
    config = (row or {}).get("config")
    if row is None or not isinstance(config, dict) or not config:
        return NOTHING
    settings = flat(config)
    seed, model = settings.get("run.seed"), settings.get("model.path")
    recipe, differs = _of_starts(reader, row["id"], settings)
    return About(
        settings,
        seed if type(seed) is int else None,
        model if isinstance(model, str) else "",
        recipe,
        differs,
        _group(row, settings),
    )


def best_held_out(reader: Reader, row: Mapping[str, Any]) -> dict[str, Any]:
    """``held_out_best`` and its iteration, of a run (its row of the store) that was evaluated on the way; where old
    rows were pruned the iteration may be that of the end of their bucket."""
    rows, coarse = schema.metrics.c, schema.metric_buckets.c
    query = sa.select(rows.iteration, rows.value).where(rows.run_id == row["id"], rows.name == HELD_OUT)
    found = reader.select(query.where(rows.value.is_not(None)).order_by(rows.value.desc(), rows.iteration).limit(1))
    if row["raw_from"]:
        pruned = sa.select(coarse.last_iteration.label("iteration"), coarse.high.label("value"))
        pruned = pruned.where(coarse.run_id == row["id"], coarse.name == HELD_OUT, coarse.level == 1)
        found += reader.select(pruned.where(coarse.high.is_not(None)).order_by(coarse.high.desc()).limit(1))
    if not found:
        return {}
    best = max(found, key=lambda each: each["value"])  # the row itself where both are as high
    return {"held_out_best": number(best["value"]), "held_out_best_iteration": best["iteration"]}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by full key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def _group(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    left_out = (*_PLACES, *_KEEPING, "run.seed")
    kept = {
        key: value for key, value in settings.items() if key not in left_out and not key.startswith(_KEEPING_SECTIONS)
    }
    about = json.dumps([row.get("task"), row.get("objective"), kept], sort_keys=True, default=str)
    return hashlib.sha256(about.encode()).hexdigest()[:12]


def _of_starts(reader: Reader, run_id: str, settings: Mapping[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """The recipe, and what was said beside it at any start; of a run that didn't tell its starts, nothing."""
    events = schema.events.c
    query = sa.select(events.text, events.data).where(events.run_id == run_id, events.kind == BEGUN)
    starts = reader.select(query.order_by(events.id).limit(_MOST_STARTS))
    if not starts:
        return None, None
    told = starts[0]["data"] if isinstance(starts[0]["data"], dict) else {}
    recipe, base = told.get("recipe"), told.get("recipe_settings")
    said = {word.partition("=")[0].strip() for start in starts for word in _words(start["text"]) if "=" in word}
    before = flat(base) if isinstance(base, dict) else {}
    keys = [
        key
        for key in settings
        if any(key == word or key.startswith(f"{word}.") for word in said)
        and key not in _PLACES
        and (key not in before or before[key] != settings[key])
    ]
    named = recipe[:_LONGEST_NAME] if isinstance(recipe, str) else None
    return named, {key: settings[key] for key in keys[:_MOST_DIFFERENCES]}


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # no command that a shell takes: anybody may have written it
        return []
