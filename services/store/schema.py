"""Tables of the run store, in SQL that SQLite and PostgreSQL share.

Times are Unix seconds. A metric that is not a finite number has ``value`` NULL and its kind in ``nonfinite`` ("nan",
"inf", "-inf"): SQLite would turn NaN into NULL and PostgreSQL's JSON refuses it, so no column holds one.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from rewards.errors import StoreError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 1.0
"""How long one statement waits for another connection's lock on a SQLite store."""

metadata = sa.MetaData()

_row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows only in INTEGER columns

schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer, primary_key=True))

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("objective", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),  # running, finished, stopped, failed
    sa.Column("total_iterations", sa.Integer, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("heartbeat", sa.Double, nullable=False),  # a running run with an old one is dead
    sa.Column("ended", sa.Double),
    sa.Column("starts", sa.Integer, nullable=False),  # 1, and one more per resume
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("lost_rows", sa.Integer, nullable=False),  # rows that could not be written since the last start
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("summary", sa.JSON(none_as_null=True)),
)


def _run_id() -> sa.Column[str]:
    return sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False)


metrics = sa.Table(  # clustered by series: a page reads one name over all iterations
    "metrics",
    metadata,
    _run_id(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("iteration", sa.Integer, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("nonfinite", sa.Text),
    sa.Column("time", sa.Double, nullable=False),
    sa.PrimaryKeyConstraint("run_id", "name", "iteration"),
    sqlite_with_rowid=False,
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", _row_id, primary_key=True),
    _run_id(),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("level", sa.Text, nullable=False),  # info, warning, error
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Index("events_of_run", "run_id", "id"),
)

workers = sa.Table(  # the newest state of each
    "workers",
    metadata,
    _run_id(),
    sa.Column("worker_id", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),  # actor, rank
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer),
    sa.Column("status", sa.Text, nullable=False),  # starting, alive, lost
    sa.Column("policy_version", sa.Integer),
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("last_error", sa.Text),
    sa.Column("heartbeat", sa.Double, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),  # memory, GPU, ...
    sa.PrimaryKeyConstraint("run_id", "worker_id"),
)

samples = sa.Table(  # one sampled trajectory
    "samples",
    metadata,
    sa.Column("id", _row_id, primary_key=True),
    _run_id(),
    sa.Column("iteration", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),  # train, base, trained, ...
    sa.Column("group_id", sa.BigInteger, nullable=False),
    sa.Column("row", sa.Integer, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("problem_id", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("completion", sa.Text, nullable=False),
    sa.Column("correct", sa.Boolean, nullable=False),
    sa.Column("reward", sa.Double),  # NULL when not finite
    sa.Column("rewards", sa.JSON, nullable=False),  # by component
    sa.Column("data", sa.JSON, nullable=False),  # sampler, seed, policy version, digest, actor, ...
    sa.Column("trajectory", sa.LargeBinary, nullable=False),  # safetensors
    sa.UniqueConstraint("run_id", "iteration", "kind", "group_id", "row"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _run_id(),
    sa.Column("iteration", sa.Integer, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),  # digest, solve rate, ...
    sa.PrimaryKeyConstraint("run_id", "iteration"),
)


def open_engine(url: str, *, create: bool) -> sa.Engine:
    """Engine on the store at ``url``, its tables made when ``create`` is set and they are missing.

    Raises ``StoreError`` (never with a password in it) when the URL is no URL, the store is absent (``create`` unset),
    locked, damaged or of another schema version, or the disk refuses.
    """
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError:
        raise StoreError("the run store's URL is none: expected something like sqlite:////path/store.sqlite") from None
    try:
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite and not create and not Path(parsed.database or "").is_file():
            raise StoreError(f"no run store at {parsed.database}")
        engine = sa.create_engine(parsed, json_serializer=_to_json)
        if is_sqlite:
            sa.event.listen(engine, "connect", _prepare_sqlite)
        with engine.begin() as connection:
            if create:
                metadata.create_all(connection)
            found = connection.execute(sa.select(schema_version.c.version)).scalar()
            if found is None and create:
                connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
                found = SCHEMA_VERSION
    except (sa.exc.SQLAlchemyError, sqlite3.Error, ImportError) as error:
        raise StoreError(f"cannot open the run store {parsed}: {short_reason(error)}") from error
    if found != SCHEMA_VERSION:
        raise StoreError(
            f"the run store {parsed} has schema version {found}, this Unmask reads {SCHEMA_VERSION}: use "
            f"the version that wrote it"
        )
    return engine


def short_reason(error: Exception) -> str:
    """The database's own words, without the statement and its parameters that SQLAlchemy appends."""
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no message'}"


def _to_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer don't wait for each other
    cursor.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing, a power cut the last moments
    cursor.close()
