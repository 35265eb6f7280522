"""Writing to the run store without ever holding up training.

A call puts rows in a bounded queue and returns; one daemon thread writes them. While the store is locked or its disk
full the thread tries again and again, and the queue fills; rows that find it full are dropped and counted. Training
goes on either way.
"""

import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from rewards.errors import StoreError
from services.store import schema

MAX_QUEUED_BYTES = 64 * 2**20
HEARTBEAT_S = 10.0
_BATCH = 200  # calls written in one transaction
_RETRY_S = 0.5
_ROW_BYTES = 200  # a row without its texts and blobs, roughly


class StoreWriter:
    """The one writer of one run. Every method but the constructor, ``flush``, ``truncate_after`` and ``close`` returns
    within microseconds and never raises for what the store or its disk does.

    Attributes:
        lost_rows: rows that were given up since this writer was opened.
        last_error: why the newest failed attempt failed, also when a later one went through; None when none did.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        *,
        task: str = "",
        objective: str = "",
        total_iterations: int = 0,
        config: Mapping[str, Any] | None = None,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ):
        """Open (or make) the store at ``url`` and enter the run; a run with this id is gone on with.

        Raises ``StoreError`` when the store can't be opened: nothing has started yet, so this is the time to say so.
        """
        self.run_id = run_id
        self.lost_rows = 0
        self.last_error: str | None = None
        self._max_queued_bytes = max_queued_bytes
        self._engine = schema.open_engine(url, create=True)
        self._insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        now = time.time()
        started = dict(
            task=task,
            objective=objective,
            total_iterations=total_iterations,
            config=_plain(config or {}),
            status="running",
            ended=None,
            heartbeat=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            lost_rows=0,
            summary=None,
        )
        enter = self._insert(schema.runs).values(id=run_id, created=now, starts=1, **started)
        enter = enter.on_conflict_do_update(index_elements=["id"], set_=started | {"starts": schema.runs.c.starts + 1})
        self._now("enter the run in", enter)
        self._queue: deque[_Call] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()  # guards the queue and the counters
        self._closing = threading.Event()
        self._abandoned = False
        self._one_by_one = 0  # calls still to be tried alone because their batch holds a bad row
        self._thread = threading.Thread(target=self._write_until_closed, name="run-store-writer", daemon=True)
        self._thread.start()

    def metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """One value a name and iteration; a second report of the same replaces the first. NaN and inf are kept."""
        now = time.time()
        self._put(
            schema.metrics,
            [
                {
                    "name": name,
                    "iteration": iteration,
                    "time": now,
                    "value": value if math.isfinite(value) else None,
                    "nonfinite": None if math.isfinite(value) else str(value),
                }
                for name, value in ((name, float(value)) for name, value in values.items())
            ],
        )

    def event(self, level: str, kind: str, text: str, data: Mapping[str, Any] | None = None) -> None:
        """Something that happened. ``level``: info, warning or error; ``kind``: a short word to filter by."""
        row = {"time": time.time(), "level": level, "kind": kind, "text": text, "data": data or {}}
        self._put(schema.events, [row])

    def worker(
        self,
        worker_id: str,
        *,
        role: str,
        status: str,
        node: str = "",
        pid: int | None = None,
        policy_version: int | None = None,
        restarts: int = 0,
        last_error: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """The state of a rollout actor or learner rank now; it replaces the one before."""
        self._put(
            schema.workers,
            [
                {
                    "worker_id": worker_id,
                    "role": role,
                    "status": status,
                    "node": node,
                    "pid": pid,
                    "restarts": restarts,
                    "policy_version": policy_version,
                    "last_error": last_error,
                    "heartbeat": time.time(),
                    "data": data or {},
                }
            ],
        )

    def sample(
        self,
        iteration: int,
        *,
        kind: str,
        group_id: int,
        row: int,
        problem_id: str,
        prompt: str,
        completion: str,
        correct: bool,
        rewards: Mapping[str, float],
        trajectory: bytes,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """One sampled trajectory; ``trajectory`` is safetensors bytes, ``rewards`` the components of the reward."""
        reward = float(sum(rewards.values()))
        self._put(
            schema.samples,
            [
                {
                    "iteration": iteration,
                    "kind": kind,
                    "group_id": group_id,
                    "row": row,
                    "time": time.time(),
                    "problem_id": problem_id,
                    "prompt": prompt,
                    "completion": completion,
                    "correct": bool(correct),
                    "reward": reward if math.isfinite(reward) else None,
                    "rewards": rewards,
                    "data": data or {},
                    "trajectory": trajectory,
                }
            ],
        )

    def checkpoint(self, iteration: int, path: str, data: Mapping[str, Any] | None = None) -> None:
        """A checkpoint that is on disk now."""
        self._put(schema.checkpoints, [{"iteration": iteration, "time": time.time(), "path": path, "data": data or {}}])

    def status(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """How the run ended: finished, stopped or failed."""
        change = {"status": status, "ended": time.time()} | ({} if summary is None else {"summary": summary})
        self._put(schema.runs, [change])

    def truncate_after(self, iteration: int) -> None:
        """Remove metrics, samples and checkpoints beyond ``iteration``, for a run that resumes there; events stay.

        Waits for what is queued and for the store. Raises ``StoreError`` when either doesn't come in time.
        """
        if not self.flush(5.0):
            raise StoreError(f"the run store {self._engine.url} took no rows for 5 s: {self.last_error}")
        for table in (schema.metrics, schema.samples, schema.checkpoints):
            beyond = table.delete().where(table.c.run_id == self.run_id, table.c.iteration > iteration)
            self._now("truncate", beyond)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put so far and since is written or given up. False when the time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what is queued, for at most ``timeout_s`` seconds; what is left then is counted as lost."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._abandoned = True
            if self._queue:
                self.last_error = self.last_error or f"the store did not take all rows within {timeout_s:g} s"
                self._lose(len(call.rows) for call in self._queue)
                self._queue.clear()
        if not self._thread.is_alive():
            self._engine.dispose()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close(5.0)

    def _now(self, purpose: str, statement: sa.Executable) -> None:
        try:
            with self._engine.begin() as connection:
                connection.execute(statement)
        except sa.exc.SQLAlchemyError as error:
            reason = schema.short_reason(error)
            raise StoreError(f"cannot {purpose} the run store {self._engine.url}: {reason}") from error

    def _put(self, table: sa.Table, rows: list[dict[str, Any]]) -> None:
        rows = [_plain(row) for row in rows]  # a copy: the caller may change its dicts before the thread gets there
        call = _Call(table, rows, sum(_size(row) for row in rows))
        with self._changed:
            if self._closing.is_set():
                self.last_error = self.last_error or "the writer was closed before these rows came"
                self._lose([len(rows)])
            elif self._queued_bytes + call.size > self._max_queued_bytes:
                self.last_error = self.last_error or "rows came faster than the store takes them"
                self._lose([len(rows)])
            else:
                self._queue.append(call)
                self._queued_bytes += call.size
                self._changed.notify_all()

    def _lose(self, counts: Iterable[int]) -> None:
        self.lost_rows += sum(counts)

    # The rest runs in the writer's thread.

    def _write_until_closed(self) -> None:
        while not self._abandoned:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing.is_set(), HEARTBEAT_S)
                calls = list(islice(self._queue, 1 if self._one_by_one else _BATCH))
            if self._write(calls):
                self._forget(calls)
            if not calls and self._closing.is_set():  # the write without calls told the last count of lost rows
                return

    def _write(self, calls: "list[_Call]") -> bool:
        """Write the calls in one transaction. True when they are done with: written, or given up as unwritable."""
        try:
            with self._engine.begin() as connection:
                for call in calls:
                    connection.execute(*self._statement(call))
                alive = {"heartbeat": time.time(), "lost_rows": self.lost_rows}
                connection.execute(schema.runs.update().where(schema.runs.c.id == self.run_id).values(alive))
            return True
        except sa.exc.OperationalError as error:  # locked, disk full, connection gone: they may go through later
            self.last_error = schema.short_reason(error)
            if self._closing.wait(_RETRY_S):
                time.sleep(0.05)
            return not calls
        except Exception as error:  # a row that the store will never take must not take its neighbours along
            self.last_error = schema.short_reason(error)
            if len(calls) > 1:
                self._one_by_one = len(calls)
                return False
            with self._changed:
                self._lose(len(call.rows) for call in calls)
            return True

    def _statement(self, call: "_Call") -> tuple[Any, list[dict[str, Any]] | None]:
        table = call.table
        if table is schema.runs:
            return table.update().where(table.c.id == self.run_id).values(call.rows[0]), None
        rows = [{"run_id": self.run_id, **row} for row in call.rows]
        keys = _KEYS.get(table.name)
        if keys is None:
            return table.insert(), rows
        insert = self._insert(table)
        replaced = {name: insert.excluded[name] for name in rows[0] if name not in keys}
        return insert.on_conflict_do_update(index_elements=keys, set_=replaced), rows

    def _forget(self, calls: "list[_Call]") -> None:
        with self._changed:
            for call in calls:
                if self._queue:  # empty when ``close`` gave up on them meanwhile
                    self._queue.popleft()
                    self._queued_bytes -= call.size
            self._one_by_one = max(0, self._one_by_one - len(calls))
            self._changed.notify_all()


class _Call(NamedTuple):
    table: sa.Table
    rows: list[dict[str, Any]]
    size: int


_KEYS = {
    "metrics": ["run_id", "name", "iteration"],
    "workers": ["run_id", "worker_id"],
    "samples": ["run_id", "iteration", "kind", "group_id", "row"],
    "checkpoints": ["run_id", "iteration"],
}


def _plain(value: Any) -> Any:
    """A copy that every database takes: numpy scalars as numbers, non-finite numbers as text, text without NUL and lone
    surrogates, anything else as its ``str``."""
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    if value is None or isinstance(value, bool | int | bytes):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    return _plain(str(value))


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return _ROW_BYTES + sum(_size(item) for item in value.values())
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    return 8
