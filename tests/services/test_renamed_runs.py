"""A run whose folder got another name is the same run in its store, and a copy of it is another one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from learner.reporting.starts import note_start
from learner.runs.directory import RunDirectory
from rewards.errors import ConfigError
from services.store import schema
from services.store.actions import request
from services.store.writer import StoreWriter
from tests.support import store_rows
from tests.support.store_contents import put_sample

AT_A_START = {schema.workers.name, schema.events.name}
"""Tables in which a start changes rows: it retires workers, and tells the new name."""


def rows_of(engine: sa.Engine, run_id: str) -> dict[str, list[dict[str, Any]]]:
    """All rows with this name, without it, by table."""
    found = {}
    with engine.connect() as connection:
        for table in schema.OF_A_RUN:
            columns = [column for column in table.c if column.name != "run_id"]
            rows = connection.execute(sa.select(*columns).where(table.c.run_id == run_id)).mappings()
            found[table.name] = [dict(row) for row in rows]
    return found


def fill(url: str, name: str, identity: str) -> None:
    with StoreWriter(url, name, identity=identity) as writer:
        for iteration in (1, 2):
            writer.metrics(iteration, {"loss": 2.0})
            writer.checkpoint(iteration, f"checkpoints/{iteration}")
        writer.event("info", "x", "here")
        writer.worker("learner-0", role="learner", status="busy")
        put_sample(writer, 1)
        writer.truncate_after(1)
        engine = schema.open_engine(url, create=False)
        request(engine, name, "pause", {}, requested_by="me")
        engine.dispose()
        writer.status("stopped")


def test_all_rows_follow_the_name_of_the_folder(store_url: str) -> None:
    for name in ("a", "other"):
        fill(store_url, name, identity=f"that of {name}")
    engine = schema.open_engine(store_url, create=False)
    before, other = rows_of(engine, "a"), rows_of(engine, "other")
    assert all(before.values()), "a table of which nothing is known here"
    with StoreWriter(store_url, "b", identity="that of a") as writer:
        assert not writer.is_new
    now = rows_of(engine, "b")
    assert [name for name in now if now[name] != before[name]] == sorted(AT_A_START)
    assert now["events"][:-1] == before["events"] and "run a is now b" in now["events"][-1]["text"]
    assert [worker["status"] for worker in now["workers"]] == ["retired"]
    assert not any(rows_of(engine, "a").values()) and rows_of(engine, "other") == other
    starts = {run["id"]: run["starts"] for run in store_rows.list_runs(engine)}
    assert starts == {"b": 2, "other": 1}
    with StoreWriter(store_url, "c", identity="another") as control:
        assert control.is_new
    with StoreWriter(store_url, "d") as control:  # of an Unmask that gave no identities: names are all that is known
        assert control.is_new
    assert rows_of(engine, "b") == now
    engine.dispose()


def test_a_run_that_runs_under_its_old_name_keeps_its_rows(store_url: str) -> None:
    running = StoreWriter(store_url, "a", identity="one")
    with pytest.raises(ConfigError, match=r"has this run under the name a, .* stop that process, or wait a minute"):
        StoreWriter(store_url, "b", identity="one")
    running.event("info", "x", "still mine")
    assert running.flush(10) and not running.lost_rows
    running.status("stopped")
    running.close(10)
    StoreWriter(store_url, "b", identity="one").close(10)


def begun(path: Path) -> RunDirectory:
    run = RunDirectory.create(path.parent, path.name)
    start(run)
    return run


def start(run: RunDirectory) -> str:
    """The run's identity, after all that a start writes about it."""
    with run:
        run.write_config("{}")
        identity = run.identity
        note_start(run, [], kind="run", default_recipe=None, after=None, changes=[])
        assert run.identity == identity
    return identity


def copied(run: RunDirectory, name: str) -> Path:
    return Path(shutil.copytree(run.path, run.path.with_name(name)))


def test_a_renamed_folder_is_the_same_run_and_a_copy_another_one(tmp_path: Path) -> None:
    run = begun(tmp_path / "a")
    identity = run.identity
    copy = copied(run, "copy")
    of_the_copy = RunDirectory.open(copy)
    assert (copy / "run.uuid").read_text() == (run.path / "run.uuid").read_text(), "nothing is written before a start"
    assert of_the_copy.identity == start(of_the_copy) != identity
    assert RunDirectory(run.path).identity == identity
    moved = RunDirectory.open(run.path.rename(tmp_path / "b"))
    assert start(moved) == identity
    assert RunDirectory(copy).identity != identity, "also when what it is a copy of is not there any more"
    second = RunDirectory.open(copied(moved, "second"))
    assert start(second) not in (identity, RunDirectory(copy).identity)
