"""What people ask of a run while it runs, and what became of it: the inbox of a run's controller, and the audit trail.

    requested -> accepted -> done        requested -> expired (nobody took it)
                          -> refused     requested -> refused (the run could not take it)

Whoever asks writes ``requested``. The controller takes the action, which is ``accepted``, does it, and writes ``done``
with what it saw happen, or ``refused`` with why not. Nobody else ever writes ``done``. A run that starts or resumes
takes nothing that was asked for before: what is left of earlier then expires, and so does what nobody takes within
``LIFETIME_S``. Times are Unix seconds of whoever wrote them; on several machines they must agree to some seconds.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa

from rewards.errors import StoreError
from services.store import schema
from services.store.rows import dicts

STOP, PAUSE, RESUME, CHECKPOINT, SET_ACTORS = "stop", "pause", "resume", "checkpoint", "set_actors"
COMMANDS = (STOP, PAUSE, RESUME, CHECKPOINT, SET_ACTORS)
"""What a run's controller does."""

LIFETIME_S = 60.0
"""An action that no controller took within this time expires; so does one whose run is silent for as long."""
SILENT_AFTER_S = 60.0
"""A run whose heartbeat is older is taken for dead: it writes one every ten seconds."""
LIVE_STATUSES = ("running", "paused")
POLL_S = 1.0

_OPEN = ("requested", "accepted")
_GRACE_S = 5.0  # a reader calls an action expired a little after a controller would no longer take it

Read = Callable[[sa.Select[Any]], list[dict[str, Any]]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Action:
    """A row of the table; ``decided`` is the time of the newest change of ``status``."""

    id: int
    run_id: str | None
    action: str
    arguments: Mapping[str, Any]
    requested_by: str
    time: float
    status: str
    result: str | None
    decided: float | None


def request(
    engine: sa.Engine, run_id: str | None, action: str, arguments: Mapping[str, Any], requested_by: str
) -> Action:
    """Ask for it; without a run it is only kept for the record, and whoever asked also settles it.

    A run that is over, silent or not there refuses at once: the action that comes back then says so.
    """
    now = time.time()
    refusal = None if run_id is None else _refusal(engine, run_id, now)
    row: dict[str, Any] = {
        "run_id": run_id,
        "action": action,
        "arguments": dict(arguments),
        "requested_by": requested_by,
        "time": now,
        "status": "requested" if refusal is None else "refused",
        "result": refusal,
        "decided": None if refusal is None else now,
    }
    with engine.begin() as connection:
        key = connection.execute(schema.actions.insert().values(row)).inserted_primary_key
    assert key is not None, "one row was inserted"
    return Action(id=key[0], **row)


def note(engine: sa.Engine, run_id: str, action: str, arguments: Mapping[str, Any], requested_by: str) -> None:
    """Record what was asked for and is done with that: nobody takes it."""
    now = time.time()
    row: dict[str, Any] = {"run_id": run_id, "action": action, "arguments": dict(arguments)}
    row |= {"requested_by": requested_by, "time": now, "status": "done", "result": None, "decided": now}
    with engine.begin() as connection:
        connection.execute(schema.actions.insert().values(row))


def accept(engine: sa.Engine, action_id: int, arguments: Mapping[str, Any], result: str) -> None:
    """Whoever asked and does it too has begun; ``arguments`` is what is known by now."""
    table = schema.actions
    change = table.update().where(table.c.id == action_id)
    with engine.begin() as connection:
        now = time.time()
        connection.execute(change.values(status="accepted", arguments=dict(arguments), result=result, decided=now))


def settle(engine: sa.Engine, action_id: int, status: str, result: str) -> bool:
    """Write how an open action ended; False when it was not open any more."""
    table = schema.actions
    change = table.update().where(table.c.id == action_id, table.c.status.in_(_OPEN))
    with engine.begin() as connection:
        return connection.execute(change.values(status=status, result=result, decided=time.time())).rowcount == 1


def find(read: Read, action_id: int, *, run_id: str | None) -> Action | None:
    """The action as it stands now, None when there is none with this id of this run. ``read``: ``Reader.select``."""
    found = _select(read, schema.actions.c.id == action_id, run_id=run_id, limit=1)
    return found[0] if found else None


def newest(read: Read, *, run_id: str | None, limit: int, before_id: int | None = None) -> list[Action]:
    """Actions as they stand now, the newest first, from behind ``before_id`` on."""
    condition = sa.true() if before_id is None else schema.actions.c.id < before_id
    return _select(read, condition, run_id=run_id, limit=limit)


def open_requests(read: Read, run_id: str) -> int:
    """How many of the run's newest hundred actions are waiting or being done."""
    return sum(action.status in _OPEN for action in newest(read, run_id=run_id, limit=100))


class Inbox:
    """The controller's side: one daemon thread that takes the run's actions and writes what became of them.

    It tries again while the store is locked or gone, and nothing that the store does reaches the caller: ``settle``
    returns at once.

    Args:
        since: when this process started on the run; what was asked for earlier expires.
        on_action: called in the inbox's thread with each action taken; must neither block nor raise.
    """

    def __init__(self, url: str, run_id: str, *, since: float, on_action: Callable[[Action], None]) -> None:
        self._url, self._run_id, self._since, self._on_action = url, run_id, since, on_action
        self._engine: sa.Engine | None = None
        self._cleared = False
        self._changed = threading.Condition()  # guards the two below
        self._outcomes: list[tuple[int, str, str]] = []
        self._closing = self._abandoned = False
        self._told = ""
        self._thread = threading.Thread(target=self._work, name="run-store-inbox", daemon=True)
        self._thread.start()

    def settle(self, action_id: int, status: str, result: str) -> None:
        """Have it written that the action is ``done`` or ``refused``."""
        with self._changed:
            self._outcomes.append((action_id, status, result))
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Take nothing more, and write what is settled for at most ``timeout_s`` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._abandoned = True

    # The rest runs in the inbox's thread.

    def _work(self) -> None:
        while True:
            closing = self._closing
            fine = self._turn(take=not closing)
            with self._changed:
                if self._abandoned or (closing and fine and not self._outcomes):
                    break
                self._changed.wait_for(partial(self._news, fine, closing), POLL_S)
        if self._engine is not None:
            self._engine.dispose()

    def _news(self, fine: bool, closing: bool) -> bool:
        """Whether there is something to do before the next turn is due."""
        return (fine and bool(self._outcomes)) or self._closing != closing

    def _turn(self, *, take: bool) -> bool:
        """Write outcomes and take what is there. False when the store refused."""
        try:
            if self._engine is None:
                self._engine = schema.open_engine(self._url, create=False)
            self._write_outcomes(self._engine)
            if take:
                self._expire(self._engine)
                for action in self._take(self._engine):
                    self._on_action(action)
        except (StoreError, *schema.UNANSWERED) as error:
            told = schema.short_reason(error)
            if told != self._told:
                self._told = told
                log.info("the inbox waits for the run store: %s", told)
            return False
        return True

    def _write_outcomes(self, engine: sa.Engine) -> None:
        while True:
            with self._changed:
                if not self._outcomes:
                    return
                outcome = self._outcomes[0]
            settle(engine, *outcome)
            with self._changed:
                self._outcomes.pop(0)

    def _expire(self, engine: sa.Engine) -> None:
        """Once what an earlier process of this run left open, then always what has waited too long."""
        table, now = schema.actions, time.time()
        late = sa.and_(table.c.status == "requested", table.c.time < now - LIFETIME_S)
        overdue = [(late, "the run did not take it in time")]
        if not self._cleared:
            old = sa.and_(table.c.status.in_(_OPEN), table.c.time < self._since)
            overdue.insert(0, (old, "the run was started again before it was done"))
        with engine.connect() as connection:
            query = sa.select(table.c.id).where(table.c.run_id == self._run_id, sa.or_(*(each for each, _ in overdue)))
            found = connection.execute(query.limit(1)).first()
        if found is not None:  # as a rule there is nothing, and nothing needs the lock
            with engine.begin() as connection:
                for condition, why in overdue:
                    change = table.update().where(table.c.run_id == self._run_id, condition)
                    connection.execute(change.values(status="expired", result=why, decided=now))
        self._cleared = True

    def _take(self, engine: sa.Engine) -> list[Action]:
        table = schema.actions
        waiting = sa.and_(table.c.run_id == self._run_id, table.c.status == "requested", table.c.time >= self._since)
        with engine.connect() as connection:
            rows = connection.execute(sa.select(table).where(waiting).order_by(table.c.id).limit(100)).mappings().all()
        taken = []
        for row in rows:
            claim = table.update().where(table.c.id == row["id"], table.c.status == "requested")
            with engine.begin() as connection:
                if connection.execute(claim.values(status="accepted", decided=time.time())).rowcount == 1:
                    taken.append(Action(**{**row, "status": "accepted"}))
        return taken


def _refusal(engine: sa.Engine, run_id: str, now: float) -> str | None:
    table = schema.runs
    query = sa.select(table.c.status, table.c.heartbeat).where(table.c.id == run_id)
    with engine.connect() as connection:
        run = next(iter(dicts(connection, query)), None)
    if run is None:
        return f"there is no run {run_id} in this store"
    if run["status"] not in LIVE_STATUSES:
        return f"the run is over ({run['status']})"
    silence_s = now - run["heartbeat"]
    if silence_s > SILENT_AFTER_S:
        return f"the run has given no sign of life for {silence_s:.0f} s: its process is taken for dead"
    return None


def _select(read: Read, condition: sa.ColumnElement[bool], *, run_id: str | None, limit: int) -> list[Action]:
    table, runs = schema.actions, schema.runs
    of_run = table.c.run_id.is_(None) if run_id is None else table.c.run_id == run_id
    of_run_row = (runs.c.status.label("run_status"), runs.c.heartbeat.label("heartbeat"), runs.c.ended)  # or NULLs
    columns = (*table.c, *of_run_row)
    query = sa.select(*columns).select_from(table.outerjoin(runs, table.c.run_id == runs.c.id))
    query = query.where(of_run, condition).order_by(table.c.id.desc()).limit(limit)
    return [_as_it_stands(row) for row in read(query)]


def _as_it_stands(row: dict[str, Any]) -> Action:
    """An open action whose run is gone is over, also before anybody can write that into the table."""
    run_status, heartbeat, ended, now = row.pop("run_status"), row.pop("heartbeat"), row.pop("ended"), time.time()
    row["arguments"] = row["arguments"] or {}
    if row["run_id"] is None or row["status"] not in _OPEN:
        return Action(**row)
    over = run_status not in LIVE_STATUSES and now - (ended or 0.0) > _GRACE_S  # its last words may be on their way
    silent = over or now - (heartbeat or 0.0) > SILENT_AFTER_S
    if row["status"] == "requested" and now - row["time"] > LIFETIME_S + _GRACE_S:
        row |= {"status": "expired", "result": f"no process of the run took it within {LIFETIME_S:g} s"}
    elif row["status"] == "accepted" and silent:
        row |= {"status": "expired", "result": "the run ended or fell silent before it confirmed"}
    return Action(**row)
