"""The run store's writer: what it keeps, and that neither a lock nor a full disk holds up the caller."""

import math
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from rewards.errors import StoreError
from services.store import reader, schema
from services.store.writer import StoreWriter

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.sqlite'}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def put_sample(writer: StoreWriter, iteration: int, row: int = 0, completion: str = "text") -> None:
    writer.sample(
        iteration,
        kind="train",
        group_id=7,
        row=row,
        problem_id="p7",
        prompt="Puzzle",
        completion=completion,
        correct=True,
        rewards={"cells": 0.5, "solved": 2.0},
        trajectory=save({"unmask_step": np.arange(4, dtype=np.int16)}),
        data={"seed": 2**62, "policy_version": 3},
    )


def exclusive_lock(path: Path) -> sqlite3.Connection:
    """A connection that keeps every other writer out until it is closed."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_all_kinds_of_rows_come_back(url):
    with StoreWriter(url, "run-1", task="sudoku", objective="agrpo", total_iterations=9, config={"seed": 1}) as writer:
        writer.metrics(1, {"loss": 0.25, "reward/mean": np.float32(1.5)})
        writer.event("warning", "actor", "actor 2 died", {"actor": 2, "where": Path("/x")})
        writer.worker("actor-0", role="actor", status="starting")
        writer.worker("actor-0", role="actor", status="alive", policy_version=4, data={"memory_bytes": 5})
        put_sample(writer, 1)
        writer.checkpoint(1, "checkpoints/1", {"digest": "ab"})
        writer.status("finished", {"base": {"greedy": {"m": 0.1}}})
    engine = schema.open_engine(url, create=False)
    (run,) = reader.list_runs(engine)
    assert (run["id"], run["task"], run["status"], run["starts"], run["lost_rows"]) == (
        "run-1",
        "sudoku",
        "finished",
        1,
        0,
    )
    assert run["config"] == {"seed": 1} and run["summary"] == {"base": {"greedy": {"m": 0.1}}}
    assert reader.metric_series(engine, "run-1", ["loss", "reward/mean", "none"]) == {
        "loss": [(1, 0.25)],
        "reward/mean": [(1, 1.5)],
        "none": [],
    }
    (event,) = reader.list_events(engine, "run-1")
    assert event["data"] == {"actor": 2, "where": "/x"} and event["level"] == "warning"
    (sample,) = reader.list_samples(engine, "run-1")
    assert sample["reward"] == 2.5 and sample["data"]["seed"] == 2**62
    trajectory = reader.sample_trajectory(engine, sample["id"])
    assert trajectory is not None and load(trajectory)["unmask_step"].tolist() == [0, 1, 2, 3]
    with engine.connect() as connection:
        (worker,) = connection.execute(schema.workers.select()).mappings()
        (checkpoint,) = connection.execute(schema.checkpoints.select()).mappings()
    assert worker["status"] == "alive" and worker["policy_version"] == 4
    assert checkpoint["path"] == "checkpoints/1"


def test_non_finite_metrics_survive(url):
    with StoreWriter(url, "r") as writer:
        for iteration, value in enumerate([math.nan, math.inf, -math.inf, 1.0]):
            writer.metrics(iteration, {"kl": value})
    values = [value for _, value in reader.metric_series(schema.open_engine(url, create=False), "r", ["kl"])["kl"]]
    assert math.isnan(values[0]) and values[1:] == [math.inf, -math.inf, 1.0]


def test_hostile_text_is_kept_as_text(url):
    text = "'); DROP TABLE runs;-- <script> \0 \ud800 \N{SNOWMAN}"
    with StoreWriter(url, "r", config={"name": math.nan}) as writer:
        put_sample(writer, 1, completion=text)
        writer.event("info", "x", text)
    assert writer.lost_rows == 0
    engine = schema.open_engine(url, create=False)
    assert reader.list_samples(engine, "r")[0]["completion"] == text.replace("\0", "\ufffd").replace("\ud800", "?")


def test_a_report_is_what_it_was_when_it_was_made(url):
    writer = StoreWriter(url, "r")
    data = {"count": 1}
    for _ in range(500):
        writer.event("info", "x", "y", data)
    data["count"] = 2
    writer.close(10)
    assert {event["data"]["count"] for event in reader.list_events(schema.open_engine(url, create=False), "r")} == {1}


def test_reopened_by_a_resumed_run(url):
    with StoreWriter(url, "r", total_iterations=3) as writer:
        for iteration in range(1, 6):
            writer.metrics(iteration, {"loss": float(iteration)})
            put_sample(writer, iteration)
            writer.checkpoint(iteration, f"checkpoints/{iteration}")
        writer.event("info", "x", "stays")
        writer.status("failed")
    with StoreWriter(url, "r", total_iterations=8) as writer:
        writer.truncate_after(3)
        writer.metrics(3, {"loss": 33.0})
        writer.metrics(4, {"loss": 44.0})
        put_sample(writer, 3)
    engine = schema.open_engine(url, create=False)
    (run,) = reader.list_runs(engine)
    assert (run["status"], run["starts"], run["total_iterations"], run["ended"]) == ("running", 2, 8, None)
    assert reader.metric_series(engine, "r", ["loss"])["loss"] == [(1, 1.0), (2, 2.0), (3, 33.0), (4, 44.0)]
    assert [sample["iteration"] for sample in reader.list_samples(engine, "r")] == [1, 2, 3]
    assert len(reader.list_events(engine, "r")) == 1


def test_truncation_leaves_other_runs_alone(url):
    with StoreWriter(url, "a") as first, StoreWriter(url, "b") as second:
        first.metrics(5, {"loss": 1.0})
        second.metrics(5, {"loss": 2.0})
        assert first.flush(10) and second.flush(10)
        first.truncate_after(1)
        engine = schema.open_engine(url, create=False)
        assert reader.metric_series(engine, "a", ["loss"])["loss"] == []
        assert reader.metric_series(engine, "b", ["loss"])["loss"] == [(5, 2.0)]


def test_a_locked_store_delays_no_call_and_loses_nothing_that_fits(url, path):
    writer = StoreWriter(url, "r")
    with closing(exclusive_lock(path)):
        assert held_up_calls(writer, 100) <= 1
        assert not writer.flush(1.5)
        assert writer.last_error is not None and "locked" in writer.last_error
    assert writer.flush(10)
    writer.close(10)
    assert writer.lost_rows == 0
    assert len(reader.metric_series(schema.open_engine(url, create=False), "r", ["loss"])["loss"]) == 100


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
    assert writer.lost_rows == lost and reader.list_runs(engine)[0]["lost_rows"] == lost
    kept = reader.metric_series(engine, "r", ["loss", "late"])
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
    kept = reader.metric_series(schema.open_engine(url, create=False), "r", ["before", "after", "bad"])
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
    assert reader.metric_series(engine, "r", ["loss"])["loss"] == [(0, 1.0)]


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


def test_another_schema_version_is_refused(url, path):
    StoreWriter(url, "r").close(5)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
        connection.commit()
    with pytest.raises(StoreError, match="version 99"):
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


def test_the_tables_are_postgresql_too():
    for table in schema.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))


def held_up_calls(writer: StoreWriter, calls: int) -> int:
    """How many took 50 ms or more. A busy machine may stop the process once; a lock would hold up every call."""
    slow = 0
    for iteration in range(calls):
        started = time.monotonic()
        writer.metrics(iteration, {"loss": 1.0})
        slow += time.monotonic() - started >= 0.05
    return slow
