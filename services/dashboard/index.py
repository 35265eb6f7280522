"""The runs as Prometheus, the list and the stream of all runs want them, read from the stores at most once a second.

Nothing is read while nobody asks, and of a run that has not changed only that.
"""

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any

from rewards.errors import StoreError
from services.dashboard.models import RunSummary, number
from services.store.catalog import Catalog

MAX_AGE_S = 1.0
SILENT_S = 60.0
"""A run that says running and has not written for this long is lost: its writer tells that it lives every ten."""
LIVE = ("running", "paused")
_MAX_EVENTS = 1000  # counted at a time, of each level


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
    revision: int
    counted: int
    """Id of the last event that was counted."""


class RunIndex:
    """Thread-safe; while one thread reads, the others wait for what it finds."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._read_at = -MAX_AGE_S

    def runs(self) -> dict[str, Known]:
        """All runs by id. Raises StoreError when they can't even be listed."""
        with self._lock:
            if time.monotonic() - self._read_at >= MAX_AGE_S:
                self._known = {row["id"]: self._look(row) for row in self._rows()}
                self._read_at = time.monotonic()
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
        before = self._known.get(row["id"])
        if row.get("unreadable") is not None:
            return _unreadable(row["id"], row["unreadable"], before)
        workers = before.workers if before else []
        errors, warnings, counted = (before.errors, before.warnings, before.counted) if before else (0, 0, 0)
        if before is None or before.revision != row["revision"]:
            try:
                reader = self._catalog.reader(row["id"])
                workers = reader.workers(row["id"])
                last = counted
                for level in ("error", "warning"):
                    found = reader.events(row["id"], after_id=counted, level=level, limit=_MAX_EVENTS)
                    last = max([last, *(event["id"] for event in found)])
                    errors += len(found) * (level == "error")
                    warnings += len(found) * (level == "warning")
                counted = last
            except (StoreError, KeyError) as error:
                return _unreadable(row["id"], str(error), before)
        summary = summarise(row, row["latest"], workers)
        return Known(summary, row["latest"], workers, errors, warnings, row["revision"], counted)


def _unreadable(run_id: str, reason: str, before: Known | None) -> Known:
    blank = Known(RunSummary(id=run_id, status="unreadable"), {}, [], 0, 0, -1, 0)
    known = before or blank
    summary = known.summary.model_copy(update={"status": "unreadable", "unreadable": reason})
    return dataclasses.replace(known, summary=summary, revision=-1)


def summarise(
    row: Mapping[str, Any], latest: Mapping[str, Mapping[str, Any]], workers: list[dict[str, Any]]
) -> RunSummary:
    """A run's row of the store, with its newest figures."""
    figures = {
        field: number(latest[name]["value"])
        for field, name in (
            ("reward", "reward/mean"),
            ("solve_rate", "solve_rate"),
            ("tokens_per_s", "machine/tokens_per_s"),
        )
        if name in latest
    }
    return RunSummary(
        id=row["id"],
        task=row["task"],
        method=row["objective"],
        status=shown_status(row),
        iteration=max((entry["iteration"] for entry in latest.values()), default=0),
        total_iterations=row["total_iterations"],
        created=row["created"],
        heartbeat=row["heartbeat"],
        ended=row["ended"],
        starts=row["starts"],
        host=row["host"],
        pid=row["pid"],
        lost_rows=row["lost_rows"],
        workers=sum(worker["status"] not in ("lost", "dead", "failed", "stopped") for worker in workers),
        **figures,
    )


def shown_status(row: Mapping[str, Any]) -> str:
    """The store's status; ``lost`` for a run that has gone silent."""
    silent = row["status"] in LIVE and time.time() - row["heartbeat"] > SILENT_S
    return "lost" if silent else str(row["status"])
