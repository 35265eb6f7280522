"""All the runs there are to look at: of a folder of run directories, each with its own store, or of one store by URL.

A thread looks through the folder every second and reads the stores whose files have changed; what a list of runs needs
of each is kept in memory, so that a slow store holds up nobody. A store that can't be read (locked, damaged, of another
version) leaves its run in the list, with the reason, and is tried again.
"""

import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from rewards.errors import StoreError
from services.store import schema
from services.store.pages import Page
from services.store.reader import Reader
from services.store.values import stored

STORE_NAME = "store.sqlite"
UNREADABLE = "unreadable"
"""Status of a run whose store could not be read yet."""
MAX_ENGINES = 32
MAX_RUNS = 10
"""Of one store in a folder, whose own run is one: others shall not fill the list."""
READ_LIMIT_S = 5.0
"""What reading a store in a folder may take. Others wait meanwhile; a run's own takes milliseconds."""
_SCAN_S = 1.0
_RETRY_S = 2.0
_LOCK_S = 2 * schema.BUSY_TIMEOUT_S
_PATIENCE = 20
_SCAN_LIMIT_S = 30.0
_LONGEST_NAME = 200
_LONGEST_WORD = 1000
"""Characters of a run's task, host and so on."""

log = logging.getLogger(__name__)


class Catalog:
    """Thread-safe. Ask anew for the reader of each request: a store may go, come back or be replaced at any time."""

    def __init__(self, source: Path | str, *, max_engines: int = MAX_ENGINES) -> None:
        """source: a folder (``Path``; it need not be there yet), or the URL (``str``) of a store."""
        self._folder = source if isinstance(source, Path) else None
        self._url = source if isinstance(source, str) else ""
        self._max_engines = max_engines
        self._lock = threading.RLock()
        self._engines: OrderedDict[str, sa.Engine] = OrderedDict()
        self._stores: dict[Path, _Store] = {}
        self._owners: dict[str, Path] = {}
        self._scanned = threading.Condition()  # guards the number of looks
        self._looks = 0
        self._closing = threading.Event()
        self._index = sa.create_engine(
            "sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False}
        )  # the runs of all stores of the folder
        schema.metadata.create_all(self._index)
        if self._folder is not None:
            self._thread = threading.Thread(target=self._scan_until_closed, name="run-catalog", daemon=True)
            self._thread.start()

    def run_ids(self) -> list[str]:
        """Runs in the order of their names, those that can't be read too."""
        if self._folder is None:
            return Reader(self._engine(self._url)).run_ids()
        self._wait()
        with self._lock:
            return sorted(self._owners)

    def list_runs(self, *, limit: int = 100, cursor: str | None = None) -> Page:
        """As ``Reader.list_runs``; each row also has ``unreadable``: why its store can't be read now, or None.

        With a URL it raises ``StoreError`` when the store can't be read, having no list then.
        """
        if self._folder is None:
            page = Reader(self._engine(self._url)).list_runs(limit=limit, cursor=cursor)
            return Page([row | {"unreadable": None} for row in page.rows], page.next)
        self._wait()
        with self._lock:
            page = Reader(self._index).list_runs(limit=limit, cursor=cursor)
            return Page([row | {"unreadable": self._reason(row["id"])} for row in page.rows], page.next)

    def run(self, run_id: str) -> dict[str, Any] | None:
        """All columns of ``runs`` and ``unreadable``; None for a run that isn't listed.

        Of a store that can't be read it is what was read last, without config and summary.
        """
        if self._folder is None:
            run = Reader(self._engine(self._url)).run(run_id)
            return None if run is None else run | {"unreadable": None}
        try:
            run = self.reader(run_id).run(run_id)
            if run is not None:
                return run | {"unreadable": None}
        except KeyError:
            return None
        except StoreError:
            pass
        with self._lock:
            run = Reader(self._index).run(run_id)
            return None if run is None else run | {"unreadable": self._reason(run_id)}

    def reader(self, run_id: str) -> Reader:
        """Raises ``KeyError`` for a run that isn't listed, ``StoreError`` when its store can't be opened now."""
        return Reader(self._engine(self.store_url(run_id)))

    def store_url(self, run_id: str) -> str:
        """Raises ``KeyError`` for a run that isn't listed."""
        if self._folder is None:
            if Reader(self._engine(self._url)).run(run_id) is None:
                raise KeyError(run_id)
            return self._url
        self._wait()
        with self._lock:
            return schema.sqlite_url(self._owners[run_id])

    def folder(self, run_id: str) -> Path | None:
        """The directory of a run, None in a store by URL. Raises ``KeyError`` for a run that isn't listed."""
        if self._folder is None:
            return None
        self._wait()
        with self._lock:
            return self._owners[run_id].parent

    def catch_up(self) -> None:
        """Wait until all is listed that was on disk at the call: a second or two. Raises ``StoreError`` when it takes
        too long."""
        if self._folder is not None:
            self._wait(looks=self._looks + 2)  # the look under way may have passed it already

    def close(self) -> None:
        self._closing.set()
        if self._folder is not None:
            self._thread.join(10.0)
        with self._lock:
            for engine in self._engines.values():
                engine.dispose()
            self._engines.clear()
            self._index.dispose()

    def _engine(self, url: str) -> sa.Engine:
        with self._lock:
            if url in self._engines:
                self._engines.move_to_end(url)
                return self._engines[url]
        engine = _open(url)  # may wait for a lock: not inside ours
        with self._lock:
            if url in self._engines:
                engine.dispose()
                return self._engines[url]
            self._engines[url] = engine
            while len(self._engines) > self._max_engines:
                self._engines.popitem(last=False)[1].dispose()
        return engine

    def _reason(self, run_id: str) -> str | None:
        store = self._stores.get(self._owners.get(run_id, Path()))
        return None if store is None else store.unreadable

    def _wait(self, looks: int = 1) -> None:
        """The first look through a large folder takes a moment. Raises ``StoreError`` when it takes too long."""
        with self._scanned:
            if not self._scanned.wait_for(lambda: self._looks >= looks, _SCAN_LIMIT_S):
                raise StoreError(f"the runs in {self._folder} could not be listed within {_SCAN_LIMIT_S:g} s")

    # The rest runs in the catalog's thread.

    def _scan_until_closed(self) -> None:
        assert self._folder is not None
        while not self._closing.is_set():
            found = {path: _signature(path) for path in _store_paths(self._folder)}
            for path in [path for path in self._stores if found.get(path) is None]:
                self._forget(path)
                self._drop_engine(path)
            for path, signature in found.items():
                store = self._stores.get(path)
                if self._closing.is_set() or signature is None:
                    continue
                if store is not None and store.signature == signature and time.monotonic() < store.retry_at:
                    continue
                if store is not None and store.signature.inode != signature.inode:  # another file by the same name
                    self._drop_engine(path)
                began = time.monotonic()
                rows, reason = _read(path, None if store is None else store.unreadable)
                self._enter(path, signature, rows, reason, max(_RETRY_S, pause_s(time.monotonic() - began)))
            with self._scanned:
                self._looks += 1
                self._scanned.notify_all()
            self._closing.wait(_SCAN_S)

    def _enter(
        self, path: Path, signature: "_Signature", rows: list[dict[str, Any]], reason: str | None, wait_s: float
    ) -> None:
        with self._lock:
            known = self._stores.get(path)
            taken = [row["id"] for row in rows if self._owners.get(row["id"], path) != path]
            if taken:
                rows = [row for row in rows if row["id"] not in taken]
                reason = f"it is a copy of {self._owners[taken[0]].parent}: run {taken[0]} is shown from there"
            if rows or known is None:
                self._forget(path)
                rows = rows or [_placeholder(_free_name(path, self._owners), path)]
                ids = {row["id"] for row in rows}
                with self._index.begin() as connection:
                    for row in rows:
                        _index_run(connection, row)
            else:
                ids = known.run_ids
            retry_at = float("inf") if reason is None else time.monotonic() + wait_s
            self._stores[path] = _Store(signature, reason, ids, retry_at)
            self._owners.update(dict.fromkeys(ids, path))

    def _drop_engine(self, path: Path) -> None:
        with self._lock:
            engine = self._engines.pop(schema.sqlite_url(path), None)
        if engine is not None:
            engine.dispose()

    def _forget(self, path: Path) -> None:
        with self._lock:
            store = self._stores.pop(path, None)
            if store is None:
                return
            with self._index.begin() as connection:
                for run_id in store.run_ids:
                    self._owners.pop(run_id, None)
                    connection.execute(schema.latest_metrics.delete().where(schema.latest_metrics.c.run_id == run_id))
                    connection.execute(schema.runs.delete().where(schema.runs.c.id == run_id))


def pause_s(took_s: float) -> float:
    """How long to leave a store alone that could not be read and took this long (longer than a lock is waited for): the
    others wait meanwhile."""
    return _PATIENCE * max(0.0, took_s - _LOCK_S)


class _Signature(NamedTuple):
    """Changes whenever something was written into a store."""

    inode: int
    size: int
    changed: int
    wal_size: int
    wal_changed: int


class _Store(NamedTuple):
    signature: _Signature
    unreadable: str | None
    run_ids: set[str]
    retry_at: float


def _open(url: str) -> sa.Engine:
    return schema.open_engine(url, create=False, read_only=True, transaction_s=READ_LIMIT_S)


def _read(path: Path, told: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """The runs of a store, or why they can't be read. ``told``: the reason known, which is not logged again."""
    try:
        engine = _open(schema.sqlite_url(path))
        try:
            rows = Reader(engine).list_runs(limit=MAX_RUNS + 1).rows
        finally:
            engine.dispose()
    except StoreError as error:
        return [], str(error)
    except Exception as error:  # of one store, which may be anybody's: the others are listed all the same
        reason = f"the run store {path} can't be read: {type(error).__name__}; the dashboard's log has the rest"
        if reason != told:
            log.exception("the run store %s", path)
        return [], reason
    if len(rows) > MAX_RUNS:
        return [], f"the run store {path} holds more than {MAX_RUNS} runs, where a run's folder has one"
    if any(len(row["id"]) > _LONGEST_NAME or _longest(row) > _LONGEST_WORD for row in rows):
        return [], f"the run store {path} holds a run whose name, task or host is longer than any of Unmask's"
    return rows, None if rows else f"the run store {path} is empty: no run has been written into it"


def _longest(row: dict[str, Any]) -> int:
    return max(len(value) for value in row.values() if isinstance(value, str))


def _index_run(connection: sa.Connection, row: dict[str, Any]) -> None:
    latest = row.pop("latest", {})
    connection.execute(schema.runs.insert().values(row | {"config": {}, "summary": None}))
    if latest:
        values = [
            {"run_id": row["id"], "name": name, **newest, **stored(newest["value"])} for name, newest in latest.items()
        ]
        connection.execute(schema.latest_metrics.insert(), values)


def _store_paths(folder: Path) -> list[Path]:
    try:
        return sorted(path / STORE_NAME for path in folder.iterdir())
    except OSError:  # not there yet, or not any more
        return []


def _signature(path: Path) -> _Signature | None:
    try:
        main = path.lstat()  # a link is listed, and not followed
    except OSError:
        return None
    try:
        wal = path.with_name(f"{STORE_NAME}-wal").lstat()
    except OSError:
        return _Signature(main.st_ino, main.st_size, main.st_mtime_ns, 0, 0)
    wal_changed = wal.st_mtime_ns if wal.st_size else 0  # readers make and remove an empty one
    return _Signature(main.st_ino, main.st_size, main.st_mtime_ns, wal.st_size, wal_changed)


def _free_name(path: Path, taken: dict[str, Path]) -> str:
    name = path.parent.name
    return name if name not in taken else f"{name} (folder)"


def _placeholder(run_id: str, path: Path) -> dict[str, Any]:
    try:
        created = path.lstat().st_mtime
    except OSError:
        created = 0.0
    texts = dict.fromkeys(("task", "objective", "host"), "")
    numbers = dict.fromkeys(("total_iterations", "starts", "pid", "lost_rows", "revision", "raw_from"), 0)
    times = {"created": created, "heartbeat": created, "ended": None}
    return {"id": run_id, "status": UNREADABLE, **texts, **numbers, **times}
