"""How a run was started, how long it worked, and how to go on with it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.dashboard.models import Model
from services.store import schema
from services.store.reader import Reader
from services.store.starts import BEGUN

_MOST = 200
"""Starts of a run that are looked at, the newest."""


class Start(Model):
    """One start of a run."""

    time: float
    command: str
    about: dict[str, Any]
    """What the run noted of it: folder, recipe and recipe_settings, code (git_commit, digest, changed), versions of
    Python and packages, machine, the iteration it goes on after, settings that were changed."""


class Starts(Model):
    """A run's starts, by rising time; none of a run by an older Unmask."""

    run_id: str
    items: list[Start]
    ran_s: float
    """Seconds that the run has worked, without those between one process and the next."""
    go_on: str
    """The command that goes on with the run."""


def starts_of(reader: Reader, run: Mapping[str, Any], folder: Path | None) -> Starts:
    """``run``: its row, with its config; ``folder``: its directory, where that is known."""
    events = schema.events.c
    theirs = events.run_id == run["id"]
    query = sa.select(events.id, events.time, events.text, events.data).where(theirs, events.kind == BEGUN)
    begun = reader.select(query.order_by(events.id.desc()).limit(_MOST))[::-1]
    over = run["ended"] or run["heartbeat"]
    begins = [run["created"], *(row["time"] for row in begun[1:])]
    ends = [_last_event(reader, theirs & (events.id < row["id"])) for row in begun[1:]] + [over]
    return Starts(
        run_id=run["id"],
        items=[Start(time=row["time"], command=row["text"], about=_mapping(row["data"])) for row in begun],
        ran_s=sum(max(0.0, (end or begin) - begin) for begin, end in zip(begins, ends, strict=True)),
        go_on=_go_on(run, folder),
    )


def _last_event(reader: Reader, where: sa.ColumnElement[bool]) -> float | None:
    events = schema.events.c
    (row,) = reader.select(sa.select(sa.func.max(events.time).label("time")).where(where))
    found: float | None = row["time"]
    return found


def _go_on(run: Mapping[str, Any], folder: Path | None) -> str:
    told = _mapping(_mapping(run["config"]).get("run")).get("dir")
    place = str(folder.resolve().parent) if folder is not None else str(told or "runs")
    module = "learner.sft" if run["objective"] == "sft" else "learner.main"
    settings = shlex.join([f"run.dir={place}", f"run.name={run['id']}"])
    return f"python -m {module} {settings} resume=auto"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
