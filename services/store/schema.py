"""Tables of the run store, in SQL that SQLite and PostgreSQL share.

Every transaction of a run's writer has the next number of ``runs.revision``, and the rows it wrote carry that number:
what is new since revision r is every row of the run with a higher one. Rows of a version 1 store have 0.

Times are Unix seconds. A metric that is not a finite number has ``value`` NULL and its kind in ``nonfinite`` ("nan",
"inf", "-inf"): SQLite would turn NaN into NULL and PostgreSQL's JSON refuses it, so no column holds one.
"""

import contextlib
import math
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from rewards.errors import StoreError
from services.store.files import NotAFile, require_sqlite_files
from services.store.upgrade import found_version, upgrade
from services.store.values import from_json, to_json

SCHEMA_VERSION = 2
"""The newest revision in ``migrations/versions``; a change of a table here needs a new one there."""
BUSY_TIMEOUT_S = 1.0
"""How long one statement waits for another connection's lock."""
STATEMENT_TIMEOUT_S = 30.0
"""How long PostgreSQL works on one statement."""
MAX_BLOB_BYTES = 64 * 2**20
"""Of a trajectory that is read."""

UNANSWERED = (
    *(sa.exc.SQLAlchemyError, sqlite3.Error, sqlite3.Warning),
    UnicodeError,  # SQLite's own words about a damaged file hold bytes of it
    OverflowError,  # figures beyond a float
    MemoryError,  # SQLite's, for sizes that are none
    OSError,  # a folder that may not be looked into
)
"""What comes instead of an answer from a store that is locked, damaged or gone."""

metadata = sa.MetaData()

_LIMITS = ("54000", "54001", "54011", "54023")
"""PostgreSQL's codes for what is too large or too complex for it (a name that no index holds), and stays so."""

_LENGTH_LIMIT = MAX_BLOB_BYTES + 2**20
"""Bytes of a text, blob or row that SQLite hands to anyone but the run's writer."""
_STEPS = 100_000
"""Of SQLite's virtual machine between two looks at the clock, some milliseconds."""

_row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows only in INTEGER columns

schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer, primary_key=True))

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("objective", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),  # running, paused, finished, stopped, failed
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
    sa.Column("revision", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("raw_from", sa.Integer, nullable=False, server_default="0"),  # below it only metric_buckets are left
    sa.Column("identity", sa.Text, nullable=False, server_default=""),  # of the run's folder; "" in those of version 1
)


def _run_id() -> sa.Column[str]:
    return sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False)


def _revision() -> sa.Column[int]:
    return sa.Column("revision", sa.BigInteger, nullable=False, server_default="0")


metrics = sa.Table(  # clustered by series: a page reads one name over all iterations
    "metrics",
    metadata,
    _run_id(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("iteration", sa.Integer, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("nonfinite", sa.Text),
    sa.Column("time", sa.Double, nullable=False),
    _revision(),
    sa.PrimaryKeyConstraint("run_id", "name", "iteration"),
    sa.Index("metrics_changed", "run_id", "revision"),
    sqlite_with_rowid=False,
)

latest_metrics = sa.Table(  # the newest row of each name
    "latest_metrics",
    metadata,
    _run_id(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("iteration", sa.Integer, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("nonfinite", sa.Text),
    sa.Column("time", sa.Double, nullable=False),
    sa.PrimaryKeyConstraint("run_id", "name"),
    sqlite_with_rowid=False,
)

metric_buckets = sa.Table(  # iterations [bucket, bucket + 1) * 8**level of a series in one row; see ``buckets``
    "metric_buckets",
    metadata,
    _run_id(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("level", sa.Integer, nullable=False),
    sa.Column("bucket", sa.Integer, nullable=False),
    sa.Column("last_iteration", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),  # finite rows
    sa.Column("bad", sa.Integer, nullable=False),  # rows that are not
    sa.Column("nonfinite", sa.Text),  # the worst of those
    sa.Column("low", sa.Double),
    sa.Column("high", sa.Double),
    sa.Column("mean", sa.Double),
    sa.Column("time", sa.Double, nullable=False),
    sa.PrimaryKeyConstraint("run_id", "name", "level", "bucket"),
    sqlite_with_rowid=False,
)

truncations = sa.Table(  # a resumed run took back its rows beyond an iteration
    "truncations",
    metadata,
    _run_id(),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("after", sa.Integer, nullable=False),
    sa.PrimaryKeyConstraint("run_id", "revision"),
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
    _revision(),
    sa.Index("events_of_run", "run_id", "id"),
    sa.Index("events_changed", "run_id", "revision"),
)

workers = sa.Table(  # the newest state of each
    "workers",
    metadata,
    _run_id(),
    sa.Column("worker_id", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),  # rollout, learner
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer),
    sa.Column("status", sa.Text, nullable=False),  # starting, idle, busy, retired; ready, busy
    sa.Column("policy_version", sa.Integer),
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("last_error", sa.Text),
    sa.Column("heartbeat", sa.Double, nullable=False),  # its last answer
    sa.Column("data", sa.JSON, nullable=False),  # what it does since when, memory, GPU, ...
    _revision(),
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
    _revision(),
    sa.UniqueConstraint("run_id", "iteration", "kind", "group_id", "row"),
    sa.Index("samples_changed", "run_id", "revision"),
    sa.Index("samples_of_kind", "run_id", "kind", "id"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _run_id(),
    sa.Column("iteration", sa.Integer, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),  # digest, solve rate, ...
    _revision(),
    sa.PrimaryKeyConstraint("run_id", "iteration"),
)

actions = sa.Table(  # what people asked of a run, and the audit trail; see ``actions``
    "actions",
    metadata,
    sa.Column("id", _row_id, primary_key=True),
    sa.Column("run_id", sa.Text),  # NULL: none of a run (a submission); no foreign key, the trail outlives its run
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("arguments", sa.JSON, nullable=False),
    sa.Column("requested_by", sa.Text, nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("status", sa.Text, nullable=False),  # requested, accepted, done, refused, expired
    sa.Column("result", sa.Text),
    sa.Column("decided", sa.Double),
    sa.Index("actions_of_run", "run_id", "id"),
    sa.Index("actions_waiting", "run_id", "status"),
)

OF_A_RUN = tuple(table for table in metadata.sorted_tables if "run_id" in table.c)
_OUR_NAMES = ", ".join(f"'{name}'" for name in metadata.tables)


def open_engine(url: str, *, create: bool, read_only: bool = False, transaction_s: float = math.inf) -> sa.Engine:
    """Engine on the store at ``url``. ``create``, for a run's writer: it is made if absent, upgraded if old.

    With ``read_only`` nothing can be written, and each transaction sees one state of the store. Raises ``StoreError``
    (never with a password in it) when the URL is no URL, the store is absent or old (``create`` unset), locked,
    damaged, of a newer schema version or not made by Unmask, or the disk refuses.

    transaction_s: seconds after which SQLite gives a transaction up (``OperationalError``), whatever the file makes it
        do; PostgreSQL has ``STATEMENT_TIMEOUT_S``.
    """
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError:
        raise StoreError(
            "the run store's URL is none: expected something like sqlite:////path/store.sqlite "
            "or postgresql://user@host/database"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    try:
        if parsed.get_backend_name() == "sqlite":
            engine = _sqlite_engine(parsed, create=create, read_only=read_only, transaction_s=transaction_s)
        else:
            engine = _server_engine(parsed, read_only=read_only)
        with engine.connect() as connection:
            found = found_version(connection)
            connection.rollback()
            if create and (found is None or found < SCHEMA_VERSION):
                found = upgrade(connection, SCHEMA_VERSION)
    except (*UNANSWERED, ImportError) as error:
        raise StoreError(f"cannot open the run store {parsed}: {short_reason(error)}") from error
    if found is None:
        raise StoreError(f"the run store {parsed} is empty: no run has been written into it")
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"the run store {parsed} has schema version {found}, this Unmask knows versions up to {SCHEMA_VERSION}: "
            f"use the newer Unmask that wrote it"
        )
    if found < SCHEMA_VERSION:
        raise StoreError(
            f"the run store {parsed} has schema version {found}, this Unmask reads {SCHEMA_VERSION}: upgrade it with "
            f"python -m services.store upgrade {parsed}"
        )
    return engine


def sqlite_url(path: Path) -> str:
    """URL of the store in a file, whatever characters its path has."""
    return sa.URL.create("sqlite", database=str(path)).render_as_string()


def short_reason(error: Exception) -> str:
    """The database's own words, without the statement and its parameters that SQLAlchemy appends."""
    cause = getattr(error, "orig", None) or error
    if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
        return "reading it takes too long, it was given up"
    if isinstance(cause, UnicodeError):
        return "its file is damaged"
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no message'}"


def may_pass(error: Exception) -> bool:
    """Whether the same statement may go through later: the store is locked, its disk full, its server gone."""
    if getattr(getattr(error, "orig", None), "sqlstate", None) in _LIMITS:
        return False
    passing = (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.TimeoutError)
    return isinstance(error, passing) or getattr(error, "connection_invalidated", False)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. While another connection does so, SQLite is busy whatever its busy timeout."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while time.monotonic() < until:
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            return
        time.sleep(0.005)
    connection.execute("PRAGMA journal_mode = WAL")


def _sqlite_engine(url: sa.URL, *, create: bool, read_only: bool, transaction_s: float) -> sa.Engine:
    """The file may be anybody's: a database can hold more than tables of values, and need not even be one."""
    path = Path(url.database or "")
    if not create and not os.path.lexists(path):
        raise StoreError(f"no run store at {path}")
    engine = sa.create_engine(
        url,
        json_serializer=to_json,
        json_deserializer=from_json,
        pool_size=2,
        max_overflow=8,
        pool_timeout=10,
    )

    @sa.event.listens_for(engine, "do_connect")
    def look(*_: Any) -> None:
        try:
            require_sqlite_files(path)
        except NotAFile as error:
            raise StoreError(f"cannot open the run store {path}: {error.strerror}") from None

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        if transaction_s < math.inf:
            record.info["until"] = time.monotonic() + transaction_s
            connection.set_progress_handler(lambda: time.monotonic() > record.info["until"], _STEPS)
        connection.isolation_level = None  # transactions begin where we say, for DDL too
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA foreign_keys = ON")
        if create:
            _write_ahead(connection)  # readers and the writer don't wait for each other
        else:
            connection.execute("PRAGMA cell_size_check = ON")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LENGTH_LIMIT)
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut costs the last moments, a killed process none
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        try:
            _require_plain_tables(connection, path)
        except BaseException:
            connection.close()
            raise

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.info["until"] = time.monotonic() + transaction_s
        connection.exec_driver_sql("BEGIN IMMEDIATE" if create else "BEGIN")

    return engine


def _require_plain_tables(connection: sqlite3.Connection, path: Path) -> None:
    """Of what has our names: views, virtual tables (which have no root page) and computed columns (which need the word
    AS) run what whoever made the file wants when they are read, triggers when something is written."""
    query = f"""
        SELECT name, type FROM sqlite_master WHERE lower(tbl_name) IN ({_OUR_NAMES}) AND type <> 'index' AND NOT
        (type = 'table' AND rootpage > 0 AND lower(sql) NOT GLOB '*[^a-z0-9_]as[^a-z0-9_]*') LIMIT 1"""
    for name, kind in connection.execute(query):
        what = "a table of computed values" if kind == "table" else f"a {kind}"
        raise StoreError(f"the run store {path} was not made by Unmask: {name[:100]!r} in it is {what}")


def _server_engine(url: sa.URL, *, read_only: bool) -> sa.Engine:
    """No statement, lock or dead peer may hold up a caller for good."""
    if url.get_backend_name() != "postgresql":
        raise StoreError(f"the run store {url} is neither SQLite nor PostgreSQL: take one of the two")
    options = f"-c lock_timeout={int(BUSY_TIMEOUT_S * 1000)} -c statement_timeout={int(STATEMENT_TIMEOUT_S * 1000)}"
    arguments = {
        "application_name": "unmask",
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
        "options": options + (" -c default_transaction_read_only=on" if read_only else ""),
    }
    return sa.create_engine(
        url,
        connect_args={name: value for name, value in arguments.items() if name not in url.query},
        isolation_level="REPEATABLE READ" if read_only else "READ COMMITTED",
        json_serializer=to_json,
        pool_pre_ping=read_only,  # a restarted server must not cost a reader an error; the writer tries again anyway
        pool_size=2,
        max_overflow=8,
        pool_timeout=10,
    )
