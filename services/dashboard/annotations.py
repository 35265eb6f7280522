"""What people write about runs: tags, a note, whether a run is archived, and which events they have taken note of.

It is the dashboard's own record and no run's: a row of the table ``actions`` for each change, so that who and when is
known, in the store of what belongs to no run (``RUNS/.dashboard.sqlite``, or the shared store). So nothing is written
into a store that a run writes, runs of other people can be annotated too, and no table had to be added.
"""

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from rewards.errors import StoreError
from services.dashboard.settings import Settings
from services.store import actions, schema
from services.store.reader import Reader

ANNOTATE = "annotate"
FIELDS = ("tags", "note", "archived", "acknowledged")

_NAME = ".dashboard.sqlite"
_MAX_AGE_S = 1.0


def records(settings: Settings, *, create: bool) -> sa.Engine | None:
    """The store of what belongs to no run; None where there is none yet. Whoever asks disposes of it. Raises
    StoreError."""
    if settings.store_url is not None:
        return schema.open_engine(settings.store_url, create=create)
    path = settings.runs_dir / _NAME
    if create:
        with contextlib.suppress(OSError):  # which opening it tells better
            path.touch(0o600)  # the settings of a run are its owner's; SQLite's other files take this one's mode
    elif not path.is_file():
        return None
    return schema.open_engine(schema.sqlite_url(path), create=create)


class Annotations:
    """Of all runs, by name. Thread-safe; read at most once a second."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._found: dict[str, Mapping[str, Any]] = {}
        self._read_at = -_MAX_AGE_S
        self._state: tuple[float, ...] | None = None
        self._shared: sa.Engine | None = None

    def close(self) -> None:
        if self._shared is not None:
            self._shared.dispose()

    def all(self) -> Mapping[str, Mapping[str, Any]]:
        """By the run's name what was written last, in the fields of ``RunSummary``. Where the store can't be read now,
        what was read before."""
        with self._lock:
            if time.monotonic() - self._read_at >= _MAX_AGE_S:
                with contextlib.suppress(StoreError):
                    self._look()
                self._read_at = time.monotonic()
            return self._found

    def write(self, run_id: str, changes: Mapping[str, Any], by: str) -> Mapping[str, Any]:
        """Lay the changes over what is there. Raises StoreError."""
        with self._lock:
            engine = records(self._settings, create=True)
            assert engine is not None
            try:
                told = dict(_read(engine, run_id).get(run_id, {})) | dict(changes)
                actions.note(engine, run_id, ANNOTATE, told, by)
            except schema.UNANSWERED as error:
                raise StoreError(f"cannot write into {engine.url}: {schema.short_reason(error)}") from error
            finally:
                engine.dispose()
            self._read_at, self._state = -_MAX_AGE_S, None
        return told

    def _look(self) -> None:
        if self._settings.store_url is not None:
            self._shared = self._shared or schema.open_engine(self._settings.store_url, create=False, read_only=True)
            self._found = _read(self._shared)
            return
        state = _state(self._settings.runs_dir / _NAME)
        if state == self._state:
            return
        engine = records(self._settings, create=False)
        if engine is None:
            self._found = {}
            return
        try:
            self._found = _read(engine)
        finally:
            engine.dispose()
        self._state = state


def _state(path: Path) -> tuple[float, ...]:
    """Changes whenever something was written."""
    found: list[float] = []
    for name in (path, path.with_name(f"{_NAME}-wal")):
        with contextlib.suppress(OSError):
            found += [name.stat().st_mtime_ns, name.stat().st_size]
    return tuple(found)


def _read(engine: sa.Engine, run_id: str | None = None) -> dict[str, Mapping[str, Any]]:
    table = schema.actions.c
    newest = sa.select(sa.func.max(table.id)).where(table.action == ANNOTATE, table.run_id.is_not(None))
    if run_id is not None:
        newest = newest.where(table.run_id == run_id)
    query = sa.select(table.run_id, table.arguments).where(table.id.in_(newest.group_by(table.run_id)))
    rows = Reader(engine).select(query)
    return {row["run_id"]: _checked(row["arguments"] or {}) for row in rows}


def _checked(told: Mapping[str, Any]) -> dict[str, Any]:
    """Anybody who may write into a shared store may have written it."""
    tags, note, acknowledged = told.get("tags"), told.get("note"), told.get("acknowledged")
    return {
        "tags": [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else [],
        "note": note if isinstance(note, str) else "",
        "archived": told.get("archived") is True,
        "acknowledged": acknowledged if type(acknowledged) is int else 0,
    }
