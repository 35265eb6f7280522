"""How a run gets its row in a store, or goes on with the one that it has.

A run is its identity (``RunDirectory.identity``), and its rows bear its name. When its folder got another name, they
follow: a run is in a store once.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from rewards.errors import ConfigError, StoreError
from services.store import schema
from services.store.actions import LIVE_STATUSES

_SILENT_S = 60.0
"""A running run that gave no sign of life for so long is dead."""


class Entered(NamedTuple):
    """A run's row."""

    starts: int
    """1 when the store had nothing of it."""
    revision: int
    renamed_from: str | None
    cut_off: bool
    """The start before this one never said how it ended."""


def enter(engine: sa.Engine, run_id: str, identity: str, started: Mapping[str, Any]) -> Entered:
    """One more start of the run, in one transaction.

    started: what its row says of this start.

    Raises:
        ConfigError: the store has another run of this name, or this run runs there under another one.
        StoreError: the store can't be written.
    """
    runs = schema.runs
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    row = {"id": run_id, "identity": identity, "created": time.time(), "starts": 1, **started}
    again = {"starts": runs.c.starts + 1, "revision": runs.c.revision + 1, **started}
    mine = (runs.c.id == run_id) & (runs.c.identity == identity)
    try:
        with engine.begin() as connection:
            renamed_from = _rename(connection, run_id, identity)
            before = connection.execute(sa.select(runs.c.status).where(mine)).scalar()
            entry = insert(runs).values(row)
            entry = entry.on_conflict_do_update(index_elements=["id"], set_=again, where=runs.c.identity == identity)
            connection.execute(entry)
            found = connection.execute(sa.select(runs.c.starts, runs.c.revision).where(mine)).one_or_none()
            if found is None:
                raise ConfigError(
                    f"the run store {engine.url} holds another run named {run_id}: choose another run.name, "
                    f"or another store.url"
                )
            # Who worked for an earlier process of the run went with it.
            theirs = schema.workers.update().where(schema.workers.c.run_id == run_id)
            connection.execute(theirs.values(status="retired", revision=found.revision))
    except schema.UNANSWERED as error:
        reason = schema.short_reason(error)
        raise StoreError(f"cannot enter the run in the run store {engine.url}: {reason}") from error
    return Entered(found.starts, found.revision, renamed_from, before in LIVE_STATUSES)


def _rename(connection: sa.Connection, run_id: str, identity: str) -> str | None:
    """Give all rows of the run with this identity this name; the name that they had, None where nothing changes."""
    runs = schema.runs
    if not identity or connection.execute(sa.select(runs.c.id).where(runs.c.id == run_id)).scalar() is not None:
        return None
    query = sa.select(runs).where(runs.c.identity == identity).order_by(runs.c.heartbeat.desc()).limit(1)
    run = connection.execute(query).mappings().one_or_none()
    if run is None:
        return None
    silent_s = time.time() - run["heartbeat"]
    if run["status"] in LIVE_STATUSES and silent_s < _SILENT_S:
        raise ConfigError(
            f"the run store {connection.engine.url} has this run under the name {run['id']}, which it had "
            f"{silent_s:.0f} s ago: stop that process, or wait a minute if it is dead; for a copy of the folder choose "
            "another store.url"
        )
    connection.execute(runs.insert().values({**run, "id": run_id}))
    for table in schema.OF_A_RUN:
        connection.execute(table.update().where(table.c.run_id == run["id"]).values(run_id=run_id))
    connection.execute(runs.delete().where(runs.c.id == run["id"]))
    return str(run["id"])
