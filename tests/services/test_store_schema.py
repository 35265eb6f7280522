"""Versions of the run store: new stores, upgrades of old ones, and what neither reader nor writer touches."""

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.engine import make_url

from rewards.errors import StoreError
from services.store import buckets, schema
from services.store.reader import Reader
from services.store.writer import StoreWriter

REPOSITORY = Path(__file__).resolve().parents[2]

# What version 1's code made and wrote, as sqlite3's .dump and pg_dump show it.
VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE runs (id TEXT NOT NULL, task TEXT NOT NULL, objective TEXT NOT NULL, status TEXT NOT NULL,
  total_iterations INTEGER NOT NULL, created {double} NOT NULL, heartbeat {double} NOT NULL, ended {double},
  starts INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, lost_rows INTEGER NOT NULL, config JSON NOT NULL,
  summary JSON, PRIMARY KEY (id));
CREATE TABLE metrics (run_id TEXT NOT NULL, name TEXT NOT NULL, iteration INTEGER NOT NULL, value {double},
  nonfinite TEXT, time {double} NOT NULL, PRIMARY KEY (run_id, name, iteration),
  FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE){clustered};
CREATE TABLE events (id {serial}, run_id TEXT NOT NULL, time {double} NOT NULL, level TEXT NOT NULL,
  kind TEXT NOT NULL, text TEXT NOT NULL, data JSON NOT NULL, PRIMARY KEY (id),
  FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE);
CREATE INDEX events_of_run ON events (run_id, id);
CREATE TABLE workers (run_id TEXT NOT NULL, worker_id TEXT NOT NULL, role TEXT NOT NULL, node TEXT NOT NULL,
  pid INTEGER, status TEXT NOT NULL, policy_version INTEGER, restarts INTEGER NOT NULL, last_error TEXT,
  heartbeat {double} NOT NULL, data JSON NOT NULL, PRIMARY KEY (run_id, worker_id),
  FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE);
CREATE TABLE samples (id {serial}, run_id TEXT NOT NULL, iteration INTEGER NOT NULL, kind TEXT NOT NULL,
  group_id BIGINT NOT NULL, row INTEGER NOT NULL, time {double} NOT NULL, problem_id TEXT NOT NULL,
  prompt TEXT NOT NULL, completion TEXT NOT NULL, correct BOOLEAN NOT NULL, reward {double}, rewards JSON NOT NULL,
  data JSON NOT NULL, trajectory {blob} NOT NULL, PRIMARY KEY (id), UNIQUE (run_id, iteration, kind, group_id, row),
  FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE);
CREATE TABLE checkpoints (run_id TEXT NOT NULL, iteration INTEGER NOT NULL, time {double} NOT NULL, path TEXT NOT NULL,
  data JSON NOT NULL, PRIMARY KEY (run_id, iteration),
  FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE);
INSERT INTO schema_version VALUES (1);
INSERT INTO runs VALUES ('old', 'sudoku', 'agrpo', 'stopped', 300, 1763800000.0, 1763800100.0, 1763800101.0, 2, 'host',
  77, 0, '{{"seed": 1}}', NULL);
INSERT INTO events (run_id, time, level, kind, text, data)
  VALUES ('old', 1763800001.0, 'info', 'start', 'began', '{{}}');
INSERT INTO workers VALUES ('old', 'actor-0', 'actor', 'n', 5, 'alive', 3, 0, NULL, 1763800002.0, '{{}}');
INSERT INTO samples (run_id, iteration, kind, group_id, row, time, problem_id, prompt, completion, correct, reward,
  rewards, data, trajectory)
  VALUES ('old', 1, 'train', 1, 0, 1763800003.0, 'p', 'a', 'b', {true}, 1.0, '{{}}', '{{}}', '');
INSERT INTO checkpoints VALUES ('old', 10, 1763800004.0, 'checkpoints/10', '{{}}');
"""
SQLITE = dict(double="DOUBLE", clustered=" WITHOUT ROWID", serial="INTEGER NOT NULL", blob="BLOB", true="1")
POSTGRESQL = dict(double="DOUBLE PRECISION", clustered="", serial="BIGSERIAL NOT NULL", blob="BYTEA", true="true")


def metric_rows() -> list[tuple[str, int, float | None, str | None]]:
    rows: list[tuple[str, int, float | None, str | None]] = [("loss", i, i / 8.0, None) for i in range(1, 301)]
    return rows + [("kl", 1, None, "nan"), ("kl", 2, 0.5, None), ("tiny", 1, 5e-324, None), ("huge", 1, 1.7e308, None)]


def make_version_1(url: str) -> None:
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(make_url(url).database)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(VERSION_1.format(**SQLITE))
            connection.executemany("INSERT INTO metrics VALUES ('old', ?, ?, ?, ?, 1763800000.0)", metric_rows())
            connection.commit()
        return
    with psycopg.connect(url) as connection:
        connection.execute(VERSION_1.format(**POSTGRESQL))
        statement = "INSERT INTO metrics VALUES ('old', %s, %s, %s, %s, 1763800000.0)"
        connection.cursor().executemany(statement, metric_rows())


def set_version(url: str, version: int) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(schema.schema_version.update().values(version=version))
    engine.dispose()


def differences(url: str) -> list[object]:
    engine = schema.open_engine(url, create=True)
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    engine.dispose()
    return [difference for difference in found if "alembic_version" not in str(difference)]


def test_the_migrations_make_the_tables_that_the_code_uses(store_url):
    assert differences(store_url) == []
    engine = schema.open_engine(store_url, create=True)
    with engine.begin() as connection:  # the control: a column too many is found
        connection.execute(sa.text("ALTER TABLE runs ADD COLUMN surplus TEXT"))
    engine.dispose()
    assert len(differences(store_url)) == 1


def test_a_version_1_store_is_upgraded_and_gone_on_with(store_url):
    make_version_1(store_url)
    with pytest.raises(StoreError, match="schema version 1, this Unmask reads 2: upgrade it with python -m services"):
        schema.open_engine(store_url, create=False)
    with StoreWriter(store_url, "old", task="sudoku") as writer:
        writer.truncate_after(290)
        writer.metrics(291, {"loss": 99.0})
    assert differences(store_url) == []
    engine = schema.open_engine(store_url, create=False, read_only=True)
    found = Reader(engine)
    run = found.run("old")
    assert run is not None and (run["starts"], run["created"], run["status"]) == (3, 1763800000.0, "running")
    (event,) = found.events("old")
    assert event["text"] == "began" and len(found.workers("old")) == len(found.checkpoints("old")) == 1
    assert len(found.samples("old").rows) == 1
    series = found.series("old", ["loss", "kl", "tiny", "huge"], points=30)
    assert sum(series["loss"]["count"]) == 291 and series["loss"]["high"][-1] == 99.0
    assert (
        str(series["kl"]["value"]) == "[nan]" and series["kl"]["low"] == [0.5] and series["huge"]["high"] == [1.7e308]
    )
    assert {name: row["iteration"] for name, row in found.latest_metrics("old").items()} == {
        "loss": 291,
        "kl": 2,
        "tiny": 1,
        "huge": 1,
    }
    engine.dispose()


def test_an_upgraded_store_has_the_buckets_that_the_writer_would_have_made(store_url):
    make_version_1(store_url)
    engine = schema.open_engine(store_url, create=True)
    everything = sa.select(schema.metric_buckets).order_by(*schema.metric_buckets.primary_key.columns)
    with engine.begin() as connection:
        migrated = connection.execute(everything).all()
        connection.execute(schema.metric_buckets.delete())
        buckets.refresh(connection, "old", None, range(301))
        assert migrated == connection.execute(everything).all() and len(migrated) > 40
    engine.dispose()


def test_an_upgrade_that_fails_leaves_the_old_store_whole(store_url):
    make_version_1(store_url)
    engine = sa.create_engine(store_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE actions (mine INTEGER)"))  # in the way of the last of the new tables
    before = set(sa.inspect(engine).get_table_names())
    with pytest.raises(StoreError, match="actions"):
        StoreWriter(store_url, "old")
    assert set(sa.inspect(engine).get_table_names()) == before
    assert "revision" not in {column["name"] for column in sa.inspect(engine).get_columns("metrics")}
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT version FROM schema_version")).scalar() == 1
        connection.execute(sa.text("DROP TABLE actions"))
    engine.dispose()
    StoreWriter(store_url, "old").close(10)  # and once nothing is in the way it goes through


def test_a_newer_version_is_refused_and_left_alone(store_url):
    StoreWriter(store_url, "r").close(10)
    set_version(store_url, 99)
    for options in ({"create": True}, {"create": False}, {"create": False, "read_only": True}):
        with pytest.raises(StoreError, match="schema version 99, this Unmask knows versions up to 2"):
            schema.open_engine(store_url, **options)
    with pytest.raises(StoreError, match="version 99"):
        StoreWriter(store_url, "other")
    set_version(store_url, 2)
    assert Reader(schema.open_engine(store_url, create=False)).run_ids() == ["r"]


def test_an_empty_database_is_no_store_until_a_writer_comes(store_url):
    if store_url.startswith("sqlite"):
        Path(make_url(store_url).database or "").touch()
    with pytest.raises(StoreError, match="is empty"):
        schema.open_engine(store_url, create=False)
    StoreWriter(store_url, "r").close(10)
    schema.open_engine(store_url, create=False).dispose()


def test_a_read_only_engine_writes_nothing(store_url):
    StoreWriter(store_url, "r").close(10)
    change = schema.runs.update().values(task="changed")
    reading = schema.open_engine(store_url, create=False, read_only=True)
    with pytest.raises(sa.exc.DBAPIError), reading.begin() as connection:
        connection.execute(change)
    writing = schema.open_engine(store_url, create=False)  # the control
    with writing.begin() as connection:
        assert connection.execute(change).rowcount == 1
    reading.dispose()
    writing.dispose()


ENTER = """
import sys
from services.store.writer import StoreWriter
sys.stdin.readline()
with StoreWriter(sys.argv[1], sys.argv[2]) as writer:
    writer.event("info", "x", "here")
assert writer.lost_rows == 0, writer.last_error
"""


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_writers_that_open_one_store_at_the_same_moment(store_url, old):
    if old:
        make_version_1(store_url)
    command = [sys.executable, "-c", ENTER, store_url]
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    processes = [subprocess.Popen([*command, f"run-{number}"], **pipes) for number in range(4)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert differences(store_url) == []
    found = Reader(schema.open_engine(store_url, create=False))
    assert found.run_ids() == (["old"] if old else []) + [f"run-{number}" for number in range(4)]


def test_a_new_file_that_another_connection_writes_is_waited_for(tmp_path):
    """SQLite says at once that it can't switch such a file to a write-ahead log, whatever its busy timeout."""
    path = tmp_path / "store.sqlite"
    writing = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    writing.execute("BEGIN IMMEDIATE")
    impatient = sqlite3.connect(path, isolation_level=None)
    impatient.execute("PRAGMA busy_timeout = 10000")
    started = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        impatient.execute("PRAGMA journal_mode = WAL")
    assert time.monotonic() - started < 5, "control: this is what waiting in SQLite comes to"
    impatient.close()
    letting_go = threading.Timer(0.3, writing.close)
    letting_go.start()
    schema.open_engine(f"sqlite:///{path}", create=True).dispose()
    letting_go.join()


def test_urls_that_name_no_store(tmp_path):
    with pytest.raises(StoreError, match="neither SQLite nor PostgreSQL|cannot open"):
        schema.open_engine("mysql://someone@127.0.0.1/x", create=True)
    with pytest.raises(StoreError, match="URL is none"):
        schema.open_engine("no url", create=True)
    with pytest.raises(StoreError, match="no run store at"):
        schema.open_engine(f"sqlite:///{tmp_path}/missing.sqlite", create=False)
    with pytest.raises(StoreError, match="cannot open the run store postgresql"):
        schema.open_engine("postgresql://someone@127.0.0.1:1/x?connect_timeout=2", create=False)
