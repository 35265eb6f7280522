"""A store that is locked, full, gone or picky neither holds up the caller nor takes the run along."""

import random
import sqlite3
import string
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from rewards.errors import StoreError
from services.store import reader, schema
from services.store.writer import StoreWriter
from tests.support import store_rows
from tests.support.databases import Server, wait_until
from tests.support.store_contents import put_sample

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.sqlite'}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def exclusive_lock(path: Path) -> sqlite3.Connection:
    """A connection that keeps every other writer out until it is closed."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_a_locked_store_delays_no_call_and_loses_nothing_that_fits(url, path):
    writer = StoreWriter(url, "r")
    with closing(exclusive_lock(path)):
        assert held_up_calls(writer, 100) <= 1
        assert not writer.flush(1.5)
        assert writer.last_error is not None and "locked" in writer.last_error
    assert writer.flush(10)
    writer.close(10)
    assert writer.lost_rows == 0
    assert len(store_rows.metric_series(schema.open_engine(url, create=False), "r", ["loss"])["loss"]) == 100


def test_without_the_queue_the_same_lock_does_hold_up_the_caller(url, path):
    writer = StoreWriter(url, "r")
    with closing(exclusive_lock(path)):
        started = time.monotonic()
        with pytest.raises(StoreError, match="locked"):
            writer.truncate_after(0)  # this one is meant to wait for the store
        assert time.monotonic() - started > 0.5
    writer.close(10)


def test_rows_beyond_the_bound_are_lost_and_counted(url, path):
    writer = StoreWriter(url, "r", max_queued_bytes=10_000)
    with closing(exclusive_lock(path)):
        assert held_up_calls(writer, 300) <= 1
        lost = writer.lost_rows
        assert 0 < lost < 300
    assert writer.flush(10)
    writer.metrics(1000, {"late": 1.0})
    writer.close(10)
    engine = schema.open_engine(url, create=False)
    assert writer.lost_rows == lost and store_rows.list_runs(engine)[0]["lost_rows"] == lost
    kept = store_rows.metric_series(engine, "r", ["loss", "late"])
    assert len(kept["loss"]) == 300 - lost and len(kept["late"]) == 1


def test_close_is_bounded_and_counts_what_is_left(url, path):
    writer = StoreWriter(url, "r")
    with closing(exclusive_lock(path)):
        writer.metrics(1, {"a": 1.0, "b": 2.0})
        started = time.monotonic()
        writer.close(0.3)
        assert time.monotonic() - started < 1.0
        assert writer.lost_rows == 2 and writer.last_error
        writer.event("info", "late", "after the end")
        assert writer.lost_rows == 3


def test_a_row_the_store_refuses_takes_no_neighbour_along(url, path):
    writer = StoreWriter(url, "r")
    with closing(exclusive_lock(path)):  # so that all of them end up in one batch
        writer.metrics(1, {"before": 1.0})
        writer.metrics(2**70, {"bad": 1.0})  # no 64-bit integer
        writer.metrics(2, {"after": 1.0})
    writer.close(10)
    assert writer.lost_rows == 1 and "OverflowError" in (writer.last_error or "")
    kept = store_rows.metric_series(schema.open_engine(url, create=False), "r", ["before", "after", "bad"])
    assert [len(kept[name]) for name in ("before", "after", "bad")] == [1, 1, 0]


FULL_DISK = """
import resource, sys, time
from services.store.writer import StoreWriter
writer = StoreWriter(sys.argv[1], "r", max_queued_bytes=200_000)
writer.metrics(0, {"loss": 1.0})
assert writer.flush(10)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # stands for a full disk: files stop growing
held_up = 0
for iteration in range(1, 400):
    start = time.monotonic()
    writer.event("info", "fill", "x" * 2000)
    held_up += time.monotonic() - start >= 0.05
writer.close(2.0)
print(writer.lost_rows, held_up, writer.last_error)
"""


@pytest.mark.parametrize(("limit", "full"), [(150_000, True), (50_000_000, False)])
def test_a_full_disk_costs_rows_not_the_run(url, limit, full):
    # the second case is the control: the same program with room loses only what outran the small queue, or nothing
    command = [sys.executable, "-c", FULL_DISK, url, str(limit)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lost, held_up, error = done.stdout.strip().split(" ", 2)
    assert int(held_up) <= 1
    assert ("OperationalError" in error) == full
    assert not full or int(lost) > 200
    engine = schema.open_engine(url, create=False)
    assert store_rows.metric_series(engine, "r", ["loss"])["loss"] == [(0, 1.0)]


def test_a_store_that_cannot_be_opened_is_told_at_the_start(url, path, tmp_path):
    with pytest.raises(StoreError, match="no run store at"):
        schema.open_engine(url, create=False)
    assert not path.exists()
    with pytest.raises(StoreError, match="unable to open"):
        StoreWriter(f"sqlite:///{tmp_path}/missing/store.sqlite", "r")
    with pytest.raises(StoreError, match="URL"):
        StoreWriter("nonsense", "r")
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StoreError, match="not a database"):
        StoreWriter(url, "r")


def test_readers_do_not_wait_for_the_writer(url, path):
    with StoreWriter(url, "r") as writer:
        writer.metrics(1, {"loss": 1.0})
        assert writer.flush(10)
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            connection.execute("BEGIN")
            assert connection.execute("SELECT count(*) FROM metrics").fetchone() == (1,)
            writer.metrics(2, {"loss": 2.0})  # the reader's open transaction keeps nobody out
            assert writer.flush(10)
            assert connection.execute("SELECT count(*) FROM metrics").fetchone() == (1,)


# ---- PostgreSQL


@pytest.fixture
def server():
    """One that may be killed."""
    server = Server()
    yield server
    server.remove()


def test_a_killed_server_delays_no_call_and_costs_no_row(server):
    with server.database() as url:
        writer = StoreWriter(url, "r")
        writer.event("info", "x", "before")
        assert writer.flush(10)
        server.kill()
        assert held_up_calls(writer, 100) <= 1
        assert not writer.flush(1.0) and "OperationalError" in (writer.last_error or "")
        server.start()
        assert writer.flush(60)
        writer.event("info", "x", "after")
        writer.close(10)
        engine = schema.open_engine(url, create=False)
        assert writer.lost_rows == 0
        assert len(store_rows.metric_series(engine, "r", ["loss"])["loss"]) == 100
        assert [event["text"] for event in store_rows.list_events(engine, "r")] == ["before", "after"]
        engine.dispose()


def test_a_server_that_stays_away_costs_rows_not_the_run(server):
    with server.database() as url:
        writer = StoreWriter(url, "r", max_queued_bytes=10_000)
        server.kill()
        assert held_up_calls(writer, 300) <= 1
        assert 0 < writer.lost_rows < 300
        started = time.monotonic()
        writer.close(0.5)
        assert time.monotonic() - started < 5.0
        assert writer.lost_rows == 300
        server.start()


@pytest.mark.slow
def test_a_server_killed_over_and_over_gets_every_event_once(server):
    with server.database() as url:
        writer = StoreWriter(url, "r")
        for turn in range(4):
            for number in range(300):
                writer.event("info", "x", f"{turn}-{number}")
            time.sleep(0.02 * turn)  # so that it dies at different moments
            server.kill()
            server.start()
        assert writer.flush(60)
        writer.close(10)
        engine = schema.open_engine(url, create=False)
        texts = [event["text"] for event in store_rows.list_events(engine, "r")]
        assert texts == [f"{turn}-{number}" for turn in range(4) for number in range(300)]
        engine.dispose()


@pytest.mark.slow
def test_a_full_disk_under_the_server_is_waited_for(server):
    server.kill()
    server.start(largest_file=20 * 2**20)  # stands for a full disk: files stop growing
    with server.database() as url:
        writer = StoreWriter(url, "r")
        started = time.monotonic()
        for number in range(40):
            put_sample(writer, number, trajectory=random.Random(number).randbytes(2**20))
        assert time.monotonic() - started < 10  # making the bytes takes its time
        wait_until(lambda: "File too large" in (writer.last_error or ""))
        writer.event("info", "x", "behind them")
        server.kill()
        server.start()
        assert writer.flush(120)
        writer.close(10)
        engine = schema.open_engine(url, create=False)
        assert writer.lost_rows == 0
        assert len(store_rows.list_samples(engine, "r")) == 40 and len(store_rows.list_events(engine, "r")) == 1
        engine.dispose()


def test_a_locked_table_delays_no_call_and_loses_nothing_that_fits(postgresql):
    with postgresql.database() as url, StoreWriter(url, "r") as writer:
        with postgresql.connect(url.rsplit("/", 1)[1]) as other, other.transaction():
            other.execute("LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE")
            assert held_up_calls(writer, 100) <= 1
            wait_until(lambda: "lock timeout" in (writer.last_error or ""))
        assert writer.flush(30)
        engine = schema.open_engine(url, create=False)
        assert len(store_rows.metric_series(engine, "r", ["loss"])["loss"]) == 100 and writer.lost_rows == 0
        engine.dispose()


def test_a_server_that_only_reads_for_a_while_is_waited_for(postgresql):
    with postgresql.database() as url, StoreWriter(url, "r") as writer:
        name = url.rsplit("/", 1)[1]
        with postgresql.connect() as other:
            other.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            writer.event("info", "x", "waits")
            wait_until(lambda: "ReadOnly" in (writer.last_error or ""))
            other.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        assert writer.flush(30) and writer.lost_rows == 0


def test_rows_the_server_refuses_take_no_neighbour_along(postgresql):
    endless = "".join(random.Random(0).choices(string.ascii_letters, k=20_000))  # no index of PostgreSQL's holds it
    with postgresql.database() as url, StoreWriter(url, "r") as writer:
        with postgresql.connect(url.rsplit("/", 1)[1]) as other, other.transaction():
            other.execute("LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE")  # so that all of them end up in one batch
            writer.metrics(1, {"before": 1.0})
            writer.metrics(2**70, {"bad": 1.0})
            writer.metrics(2, {endless: 1.0})
            writer.metrics(3, {"after": 1.0})
        assert writer.flush(30)
        assert writer.lost_rows == 2 and "index row" in (writer.last_error or "")
        engine = schema.open_engine(url, create=False)
        kept = store_rows.metric_series(engine, "r", ["before", "after", "bad"])
        assert [len(kept[name]) for name in ("before", "after", "bad")] == [1, 1, 0]
        engine.dispose()


def test_extreme_values_are_taken_by_both(store_url):
    with StoreWriter(store_url, "r") as writer:
        for iteration, value in enumerate([1.7e308, 1.7e308, -1.7e308, 5e-324, 1e-300, 0.0] * 20):
            writer.metrics(iteration, {"a": value, "tiny": 5e-324})
    assert writer.lost_rows == 0, writer.last_error
    engine = schema.open_engine(store_url, create=False, read_only=True)
    series = reader.Reader(engine).series("r", ["a", "tiny"], points=5)["a"]
    assert set(series["high"]) == {1.7e308} and set(series["low"]) == {-1.7e308}
    engine.dispose()


def test_a_password_is_in_no_message():
    with pytest.raises(StoreError) as caught:
        StoreWriter("postgresql://someone:hunter2@127.0.0.1:1/nothing?connect_timeout=1", "r")
    assert "hunter2" not in str(caught.value) and "someone" in str(caught.value)


def held_up_calls(writer: StoreWriter, calls: int) -> int:
    """How many took 50 ms or more. A busy machine may stop the process once; a lock would hold up every call."""
    slow = 0
    for iteration in range(calls):
        started = time.monotonic()
        writer.metrics(iteration, {"loss": 1.0})
        slow += time.monotonic() - started >= 0.05
    return slow
