"""Writing to the run store without ever holding up training.

A call puts rows in a bounded queue and returns; one daemon thread writes them. While the store is locked or its disk
full, or its server gone, the thread tries again and again, and the queue fills; rows that find it full are dropped and
counted. Training goes on either way.

Each transaction takes the run's next revision (see ``schema``), so that one whose commit went through unheard is not
written twice, and a writer whose run another process has taken over writes nothing more.
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

from rewards.errors import StoreError, UnmaskError
from services.store import buckets, schema
from services.store.entering import enter
from services.store.retention import KEEP_ALL, Retention, prune
from services.store.values import plain, size, stored

MAX_QUEUED_BYTES = 64 * 2**20
HEARTBEAT_S = 10.0
_BATCH = 200  # calls written in one transaction
_RETRY_S = 0.5
_PRUNE_S = 600.0


class StoreWriter:
    """The one writer of one run. Every method but the constructor, ``flush``, ``truncate_after`` and ``close`` returns
    within microseconds and never raises for what the store or its disk does.

    Attributes:
        lost_rows: rows that were given up since this writer was opened.
        is_new: the store had nothing of this run.
        cut_off: the start before this one never said how it ended.
        last_error: why the newest failed attempt failed, also when a later one went through; None when none did.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        *,
        identity: str = "",
        task: str = "",
        objective: str = "",
        total_iterations: int = 0,
        config: Mapping[str, Any] | None = None,
        retention: Retention = KEEP_ALL,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ):
        """Open (make, upgrade) the store at ``url`` and enter the run, or go on with it.

        identity: tells the run from others of its name (``RunDirectory.identity``).

        Raises ``ConfigError`` and ``StoreError`` as ``enter`` does, and when the store can't be opened: nothing has
        started yet, so this is the time to say so.
        """
        self.run_id = run_id
        self.lost_rows = 0
        self.last_error: str | None = None
        self._max_queued_bytes = max_queued_bytes
        self._engine = schema.open_engine(url, create=True)
        self._insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        started = dict(
            task=task,
            objective=objective,
            total_iterations=total_iterations,
            config=plain(config or {}),
            status="running",
            ended=None,
            heartbeat=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            lost_rows=0,
            summary=None,
        )
        self._mine = (schema.runs.c.id == run_id) & (schema.runs.c.identity == identity)
        try:
            mine = enter(self._engine, run_id, identity, started)
        except UnmaskError:
            self._engine.dispose()
            raise
        self._start: int = mine.starts
        self.is_new, self.cut_off = self._start == 1, mine.cut_off
        self._revision: int | None = mine.revision  # None: to be read
        self._in_transaction = threading.Lock()  # guards the revision
        self._retention = retention
        self._pruned = time.monotonic()
        self._queue: deque[_Call] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()  # guards the queue and the counters
        self._closing = threading.Event()
        self._abandoned = False
        self._one_by_one = 0  # calls still to be tried alone because their batch holds a bad row
        self._in_doubt = 0  # calls of a transaction that failed: to be tried again as they were
        self._thread = threading.Thread(target=self._write_until_closed, name="run-store-writer", daemon=True)
        self._thread.start()
        if mine.renamed_from is not None:
            self.event("info", "renamed", f"the folder of run {mine.renamed_from} is now {run_id}, and so is the run")

    def metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """One value a name and iteration; a second report of the same replaces the first. NaN and inf are kept."""
        now = time.time()
        self._put(
            schema.metrics,
            [
                {"name": name, "iteration": iteration, "time": now, **stored(float(value))}
                for name, value in values.items()
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
        heartbeat: float | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """The state of a rollout actor or learner rank now; it replaces the one before. ``heartbeat``: when it was last
        heard from (Unix seconds), None for now."""
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
                    "heartbeat": time.time() if heartbeat is None else heartbeat,
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

    def checkpoints_gone(self, iterations: Iterable[int]) -> None:
        """The checkpoints of these iterations were deleted."""
        self._put(schema.checkpoints, [{"iteration": iteration} for iteration in iterations], gone=True)

    def status(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """How the run ended: finished, stopped or failed; or that it is paused, or running again."""
        ended = None if status in ("running", "paused") else time.time()
        change = {"status": status, "ended": ended} | ({} if summary is None else {"summary": summary})
        self._put(schema.runs, [change])

    def truncate_after(self, iteration: int) -> None:
        """Remove metrics, samples and checkpoints beyond ``iteration``, for a run that resumes there; events stay.

        Waits for what is queued and for the store. Raises ``StoreError`` when either doesn't come in time.
        """
        if not self.flush(5.0):
            raise StoreError(f"the run store {self._engine.url} took no rows for 5 s: {self.last_error}")
        if not self._in_transaction.acquire(timeout=5.0):
            raise StoreError(f"the run store {self._engine.url} is busy for 5 s: {self.last_error}")
        try:
            with self._engine.begin() as connection:
                revision, _ = self._take_revision(connection)
                self._revision = None  # whatever becomes of the commit
                for table in (schema.metrics, schema.samples, schema.checkpoints):
                    beyond = (table.c.run_id == self.run_id) & (table.c.iteration > iteration)
                    connection.execute(table.delete().where(beyond))
                buckets.truncate(connection, self.run_id, iteration)
                told = {"run_id": self.run_id, "revision": revision, "after": iteration}
                connection.execute(schema.truncations.insert().values(told))
        except schema.UNANSWERED as error:
            reason = schema.short_reason(error)
            raise StoreError(f"cannot truncate the run store {self._engine.url}: {reason}") from error
        finally:
            self._in_transaction.release()

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(5.0)

    def _put(self, table: sa.Table, rows: list[dict[str, Any]], *, gone: bool = False) -> None:
        if not rows:
            return
        rows = [plain(row) for row in rows]  # a copy: the caller may change its dicts before the thread gets there
        call = _Call(table, rows, sum(size(row) for row in rows), gone)
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
                calls = list(islice(self._queue, self._in_doubt or (1 if self._one_by_one else _BATCH)))
            done = self._write(calls)
            self._in_doubt = 0 if done or self._one_by_one else len(calls)
            if done:
                self._forget(calls)
            if not calls and self._closing.is_set():  # the write without calls told the last count of lost rows
                return
            if not self._queue and time.monotonic() - self._pruned > _PRUNE_S:
                self._prune()

    def _write(self, calls: "list[_Call]") -> bool:
        """Write the calls in one transaction. True when they are done with: written, or given up as unwritable."""
        try:
            with self._in_transaction:
                with self._engine.begin() as connection:
                    revision, is_new = self._take_revision(connection, by=1 if calls else 0)
                    if is_new:
                        for call in calls:
                            connection.execute(*self._statement(call, revision))
                        rows = [row for call in calls if call.table is schema.metrics for row in call.rows]
                        buckets.follow(connection, self.run_id, rows)
                self._revision = revision
            return True
        except Exception as error:
            self.last_error = schema.short_reason(error)
            if schema.may_pass(error):
                if self._closing.wait(_RETRY_S):
                    time.sleep(0.05)
                return not calls
            if len(calls) > 1:  # a row that the store will never take must not take its neighbours along
                self._one_by_one = len(calls)
                return False
            with self._changed:
                self._lose(len(call.rows) for call in calls)
            return True

    def _take_revision(self, connection: sa.Connection, by: int = 1) -> tuple[int, bool]:
        """Go on by a revision, or only give a sign of life; the revision, and whether it is new to the store: when the
        answer to a commit was lost it is not.

        Raises ``StoreError`` when the run is no longer this writer's.
        """
        table = schema.runs
        mine = self._mine & (table.c.starts == self._start)
        before = self._revision
        if before is None:
            before = connection.execute(sa.select(table.c.revision).where(mine)).scalar() or 0
        after = before + by
        values = {"heartbeat": time.time(), "lost_rows": self.lost_rows, "revision": after}
        if connection.execute(table.update().where(mine, table.c.revision == before).values(values)).rowcount == 1:
            return after, True
        if not by:  # a commit may be in doubt: the calls that come again will tell
            return before, False
        if connection.execute(sa.select(table.c.revision).where(mine)).scalar() != after:
            raise StoreError("the run was deleted from the store, or another process has taken it over")
        return after, False

    def _statement(self, call: "_Call", revision: int) -> tuple[Any, list[dict[str, Any]] | None]:
        table = call.table
        if table is schema.runs:
            return table.update().where(table.c.id == self.run_id).values(call.rows[0]), None
        if call.gone:
            iterations = [row["iteration"] for row in call.rows]
            return table.delete().where(table.c.run_id == self.run_id, table.c.iteration.in_(iterations)), None
        rows = [{"run_id": self.run_id, "revision": revision, **row} for row in call.rows]
        keys = _KEYS.get(table.name)
        if keys is None:
            return table.insert(), rows
        insert = self._insert(table)
        replaced = {name: insert.excluded[name] for name in rows[0] if name not in keys}
        return insert.on_conflict_do_update(index_elements=keys, set_=replaced), rows

    def _prune(self) -> None:
        self._pruned = time.monotonic()
        try:
            with self._in_transaction:
                prune(self._engine, self.run_id, self._retention)
        except StoreError as error:  # the next time will do
            self.last_error = str(error)

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
    gone: bool
    """They are to be deleted."""


_KEYS = {
    "metrics": ["run_id", "name", "iteration"],
    "workers": ["run_id", "worker_id"],
    "samples": ["run_id", "iteration", "kind", "group_id", "row"],
    "checkpoints": ["run_id", "iteration"],
}
