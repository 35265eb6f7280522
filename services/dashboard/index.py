"""The runs as Prometheus, the list and the stream of all runs want them, read from the stores at most once a second.

Nothing is read while nobody asks, and of a run that has not changed only that.
"""

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from rewards.errors import StoreError
from services.dashboard.about import HELD_OUT, NOTHING, About, about, best_held_out
from services.dashboard.ahead import Ahead, ahead
from services.dashboard.annotations import Annotations
from services.dashboard.models import RunSummary, number
from services.store import schema
from services.store.actions import LIVE_STATUSES, SILENT_AFTER_S
from services.store.catalog import Catalog, pause_s
from services.store.faults import CAUSES, FAULT, PARTS
from services.store.reader import Reader

MAX_AGE_S = 1.0
_AFTER_FAULT_S = 60.0

log = logging.getLogger("services.dashboard")


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a run."""

    summary: RunSummary
    latest: Mapping[str, Mapping[str, Any]]
    """The newest ``iteration``, ``value`` and ``time`` of each metric."""
    workers: list[dict[str, Any]]
    errors: int
    """Error events so far."""
    warnings: int
    faults: Mapping[tuple[str, str], int]
    """By what failed and how; what ``services.store.faults`` doesn't know is called other."""
    revision: int
    """What of the run these figures are of; -1 when they have to be read anew."""
    counted: int
    """Id of the last event that was counted."""
    again: float
    """One that could not be read is left alone until then (monotonic seconds)."""
    about: About = NOTHING
    began: tuple[float, int] | None = None
    """Creation and number of starts that ``about`` is of."""
    best: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The best evaluation on the way."""


class RunIndex:
    """Thread-safe; while one thread reads, the others wait for what it finds."""

    def __init__(self, catalog: Catalog, annotations: Annotations) -> None:
        self._catalog, self._annotations = catalog, annotations
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._told: Mapping[str, Mapping[str, Any]] | None = None
        self._read_at = -MAX_AGE_S

    def runs(self) -> dict[str, Known]:
        """All runs by id, with what this dashboard has written about them even when that was a moment ago. Raises
        StoreError when they can't even be listed."""
        with self._lock:
            if time.monotonic() - self._read_at >= MAX_AGE_S:
                self._known = {row["id"]: self._look(row) for row in self._rows()}
                self._told = None
                self._read_at = time.monotonic()
            told = self._annotations.all()
            if told is not self._told:
                self._known = {run_id: _annotated(known, told) for run_id, known in self._known.items()}
                self._told = told
            return self._known

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = self._catalog.list_runs(limit=500, cursor=cursor)
            rows += page.rows
            cursor = page.next
            if cursor is None:
                return rows

    def _look(self, row: dict[str, Any]) -> Known:
        known = self._known.get(row["id"]) or Known(RunSummary(id=row["id"], status=""), {}, [], 0, 0, {}, -1, 0, 0.0)
        if row["unreadable"] is not None:
            return _unreadable(known, row["unreadable"])
        began = time.monotonic()
        if began < known.again:
            return known
        try:
            return self._read(row, known)
        except (StoreError, KeyError) as error:
            now = time.monotonic()
            return _unreadable(known, str(error), again=now + pause_s(now - began))
        except Exception as error:  # of one run, which may be anybody's: the others are shown all the same
            reason = f"{type(error).__name__} in the dashboard; its log has the rest"
            if reason != known.summary.unreadable:
                log.exception("run %r", row["id"])
            return _unreadable(known, reason, again=time.monotonic() + _AFTER_FAULT_S)

    def _read(self, row: dict[str, Any], known: Known) -> Known:
        if known.summary.created != row["created"]:  # another run of this name than before
            known = dataclasses.replace(known, errors=0, warnings=0, faults={}, revision=-1, counted=0, began=None)
        if known.revision != row["revision"]:
            reader = self._catalog.reader(row["id"])
            known = _count_events(reader, dataclasses.replace(known, workers=reader.workers(row["id"])))
            if known.latest.get(HELD_OUT) != row["latest"].get(HELD_OUT):
                known = dataclasses.replace(known, best=best_held_out(reader, row))
            if known.began != (row["created"], row["starts"]):
                found = about(reader, reader.run(row["id"]))
                known = dataclasses.replace(known, about=found, began=(row["created"], row["starts"]))
        beside = known.about.fields() | dict(known.best)
        summary = summarise(row, row["latest"], known.workers, ahead(self._catalog, row), beside)
        return dataclasses.replace(known, summary=summary, latest=row["latest"], revision=row["revision"])


def _annotated(known: Known, told: Mapping[str, Mapping[str, Any]]) -> Known:
    summary = known.summary
    said = told.get(summary.id) or _UNTOLD
    if all(getattr(summary, name) == value for name, value in said.items()):
        return known
    return dataclasses.replace(known, summary=summary.model_copy(update=said))


_UNTOLD: Mapping[str, Any] = {"tags": [], "note": "", "archived": False, "acknowledged": 0}


def _count_events(reader: Reader, known: Known) -> Known:
    """With the errors, warnings and faults that have come since."""
    events = schema.events.c
    query = sa.select(events.level, sa.func.count().label("count"), sa.func.max(events.id).label("last"))
    query = query.where(events.run_id == known.summary.id, events.id > known.counted).group_by(events.level)
    found = {row["level"]: row for row in reader.select(query)}
    new = {level: found[level]["count"] if level in found else 0 for level in ("error", "warning")}
    counted = max([known.counted, *(row["last"] for row in found.values())])
    errors, warnings = known.errors + new["error"], known.warnings + new["warning"]
    faults = Counter(known.faults)
    if counted > known.counted:
        theirs = (events.run_id == known.summary.id) & (events.id > known.counted) & (events.id <= counted)
        for row in reader.select(sa.select(events.data).where(theirs, events.kind == FAULT)):
            data = row["data"] if isinstance(row["data"], dict) else {}
            part, cause = data.get("part"), data.get("cause")
            times = data.get("times")
            kind = (part if part in PARTS else "other", cause if cause in CAUSES else "other")
            faults[kind] += times if isinstance(times, int) and times > 0 else 1
    return dataclasses.replace(known, errors=errors, warnings=warnings, faults=faults, counted=counted)


def _unreadable(known: Known, reason: str, *, again: float = 0.0) -> Known:
    summary = known.summary.model_copy(update={"status": "unreadable", "unreadable": reason})
    return dataclasses.replace(known, summary=summary, revision=-1, again=again)


def summarise(
    row: Mapping[str, Any],
    latest: Mapping[str, Mapping[str, Any]],
    workers: list[dict[str, Any]],
    unstored: Ahead | None,
    beside: Mapping[str, Any],
) -> RunSummary:
    """A run's row of the store, with its newest figures, and what is known beyond the store; ``beside``: further
    fields."""
    iteration = max((entry["iteration"] for entry in latest.values()), default=0)
    figures = {
        field: number(latest[name]["value"])
        for field, name in (
            ("reward", "reward/mean"),
            ("solve_rate", "solve_rate"),
            ("tokens_per_s", "machine/tokens_per_s"),
            ("held_out", HELD_OUT),
        )
        if name in latest
    }
    return RunSummary(
        id=row["id"],
        task=row["task"],
        method=row["objective"],
        status=shown_status(row, unstored),
        iteration=iteration,
        total_iterations=row["total_iterations"],
        created=row["created"],
        heartbeat=row["heartbeat"],
        ended=row["ended"],
        starts=row["starts"],
        host=row["host"],
        pid=row["pid"],
        lost_rows=max(row["lost_rows"], unstored.lost_rows if unstored else 0),
        unstored_iterations=max(0, unstored.iteration - iteration) if unstored else 0,
        workers=sum(worker["status"] != "retired" for worker in workers),
        **figures,
        **beside,
    )


def shown_status(row: Mapping[str, Any], unstored: Ahead | None) -> str:
    """The store's status; ``lost`` for a run that has gone silent, or whose process is known to be dead."""
    wrote = max(row["heartbeat"], unstored.written if unstored else 0.0)
    silent = (unstored is not None and unstored.dead) or time.time() - wrote > SILENT_AFTER_S
    return "lost" if silent and row["status"] in LIVE_STATUSES else str(row["status"])
