"""The run store's writer: what it keeps, in SQLite and in PostgreSQL."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from learner.control.opening import About, begun_run, found_run
from learner.settings.run import load_config
from rewards.errors import ConfigError, StoreError
from services.store import reader, schema
from services.store.writer import StoreWriter
from tests.support import store_rows
from tests.support.databases import wait_until


@pytest.fixture
def url(store_url: str) -> str:
    return store_url


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
    (run,) = store_rows.list_runs(engine)
    assert (run["id"], run["task"], run["status"], run["starts"], run["lost_rows"]) == (
        "run-1",
        "sudoku",
        "finished",
        1,
        0,
    )
    assert run["config"] == {"seed": 1} and run["summary"] == {"base": {"greedy": {"m": 0.1}}}
    assert store_rows.metric_series(engine, "run-1", ["loss", "reward/mean", "none"]) == {
        "loss": [(1, 0.25)],
        "reward/mean": [(1, 1.5)],
        "none": [],
    }
    (event,) = store_rows.list_events(engine, "run-1")
    assert event["data"] == {"actor": 2, "where": "/x"} and event["level"] == "warning"
    (sample,) = store_rows.list_samples(engine, "run-1")
    assert sample["reward"] == 2.5 and sample["data"]["seed"] == 2**62
    trajectory = store_rows.sample_trajectory(engine, sample["id"])
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
    values = [value for _, value in store_rows.metric_series(schema.open_engine(url, create=False), "r", ["kl"])["kl"]]
    assert math.isnan(values[0]) and values[1:] == [math.inf, -math.inf, 1.0]


def test_hostile_text_is_kept_as_text(url):
    text = "'); DROP TABLE runs;-- <script> \0 \ud800 \N{SNOWMAN}"
    with StoreWriter(url, "r", config={"name": math.nan}) as writer:
        put_sample(writer, 1, completion=text)
        writer.event("info", "x", text)
    assert writer.lost_rows == 0
    engine = schema.open_engine(url, create=False)
    assert store_rows.list_samples(engine, "r")[0]["completion"] == text.replace("\0", "\ufffd").replace("\ud800", "?")


def test_a_report_is_what_it_was_when_it_was_made(url):
    writer = StoreWriter(url, "r")
    data = {"count": 1}
    for _ in range(500):
        writer.event("info", "x", "y", data)
    data["count"] = 2
    writer.close(10)
    assert {event["data"]["count"] for event in store_rows.list_events(schema.open_engine(url, create=False), "r")} == {
        1
    }


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
    (run,) = store_rows.list_runs(engine)
    assert (run["status"], run["starts"], run["total_iterations"], run["ended"]) == ("running", 2, 8, None)
    assert store_rows.metric_series(engine, "r", ["loss"])["loss"] == [(1, 1.0), (2, 2.0), (3, 33.0), (4, 44.0)]
    assert [sample["iteration"] for sample in store_rows.list_samples(engine, "r")] == [1, 2, 3]
    assert len(store_rows.list_events(engine, "r")) == 1


def test_truncation_leaves_other_runs_alone(url):
    with StoreWriter(url, "a") as first, StoreWriter(url, "b") as second:
        first.metrics(5, {"loss": 1.0})
        second.metrics(5, {"loss": 2.0})
        assert first.flush(10) and second.flush(10)
        first.truncate_after(1)
        engine = schema.open_engine(url, create=False)
        assert store_rows.metric_series(engine, "a", ["loss"])["loss"] == []
        assert store_rows.metric_series(engine, "b", ["loss"])["loss"] == [(5, 2.0)]


def test_a_commit_that_went_through_unheard_is_not_written_twice(url):
    with StoreWriter(url, "r") as writer:
        writer.event("info", "x", "first")
        assert writer.flush(10)
        writer._revision -= 1  # as after a connection that broke before the answer came: the same call comes again
        writer.event("info", "x", "first")
        assert writer.flush(10)
        writer.event("info", "x", "second")
    engine = schema.open_engine(url, create=False)
    assert [event["text"] for event in store_rows.list_events(engine, "r")] == ["first", "second"]
    assert writer.lost_rows == 0


def test_a_writer_whose_run_was_taken_over_writes_nothing_more(url):
    with StoreWriter(url, "r") as old:
        old.metrics(1, {"loss": 1.0})
        assert old.flush(10)
        with StoreWriter(url, "r") as new:
            old.metrics(2, {"loss": 2.0})
            new.metrics(3, {"loss": 3.0})
            assert old.flush(10) and new.flush(10)
            with pytest.raises(StoreError, match="taken it over"):
                old.truncate_after(0)
    assert old.lost_rows == 1 and "taken it over" in (old.last_error or "") and new.lost_rows == 0
    kept = store_rows.metric_series(schema.open_engine(url, create=False), "r", ["loss"])["loss"]
    assert kept == [(1, 1.0), (3, 3.0)]


def test_a_paused_run_has_not_ended(url):
    with StoreWriter(url, "r") as writer:
        writer.status("paused")
        assert writer.flush(10)
        engine = schema.open_engine(url, create=False)
        assert store_rows.list_runs(engine)[0]["ended"] is None
        writer.status("stopped")
    assert store_rows.list_runs(engine)[0]["ended"] is not None


def test_the_newest_values_follow_replacement_and_truncation(url):
    with StoreWriter(url, "r") as writer:
        for iteration in range(1, 30):
            writer.metrics(iteration, {"loss": float(iteration)} | ({"late": 1.0} if iteration > 20 else {}))
        writer.metrics(3, {"loss": -3.0})  # an old row is replaced: the newest stays
        assert writer.flush(10)
        found = reader.Reader(schema.open_engine(url, create=False, read_only=True))
        latest = found.latest_metrics("r")
        assert (latest["loss"]["iteration"], latest["loss"]["value"]) == (29, 29.0) and found.metric_names("r") == [
            "late",
            "loss",
        ]
        writer.truncate_after(10)
        assert found.latest_metrics("r")["loss"]["value"] == 10.0 and found.metric_names("r") == ["loss"]
        writer.metrics(11, {"loss": math.nan})
        assert writer.flush(10)
        assert math.isnan(found.latest_metrics("r")["loss"]["value"])


def test_a_run_never_goes_on_with_another_of_its_name(url):
    StoreWriter(url, "r", identity="one", task="first").close(10)
    for other in ("two", ""):
        with pytest.raises(ConfigError, match="another run named r: choose another run.name, or another store.url"):
            StoreWriter(url, "r", identity=other, task="second")
    engine = schema.open_engine(url, create=False)
    (run,) = store_rows.list_runs(engine)
    assert (run["task"], run["starts"], run["identity"]) == ("first", 1, "one")
    StoreWriter(url, "r", identity="one").close(10)  # the control
    assert store_rows.list_runs(engine)[0]["starts"] == 2
    engine.dispose()


def test_a_run_replaced_by_another_of_its_name_takes_no_rows_of_it(url):
    with StoreWriter(url, "r", identity="one") as old:
        old.event("info", "x", "of the old")
        assert old.flush(10)
        engine = schema.open_engine(url, create=False)
        with engine.begin() as connection:
            connection.execute(schema.runs.delete())
        with StoreWriter(url, "r", identity="two") as new:
            new.event("info", "x", "of the new")  # as many revisions and starts as the other
            assert new.flush(10)
            old.event("info", "x", "of the old, and late")
            wait_until(lambda: old.lost_rows == 1)
    assert "deleted" in (old.last_error or "")
    assert [event["text"] for event in store_rows.list_events(engine, "r")] == ["of the new"]
    engine.dispose()


def test_a_run_is_recorded_where_its_settings_say(url, tmp_path):
    def record(folder: str, *settings: str) -> None:
        place = (f"run.dir={tmp_path / folder}", "run.name=a", f"store.url={url}")
        config = load_config(["recipe=smoke", *place, *settings])
        about = About(
            config=config,
            run=config.run,
            store=config.store,
            trackers=(),
            kind="run",
            task="sudoku",
            objective="agrpo",
            iterations=3,
            argv=["recipe=smoke", *settings],
            default_recipe=None,
        )
        with found_run(about) as found, begun_run(about, found) as begun:
            begun.reporter.iteration(1, {"reward/mean": 1.5})
        assert not begun.run_dir.store_path.exists() and begun.run_dir.store_url == url

    url = url.replace(".sqlite", "-shared.sqlite")
    record("here")
    engine = schema.open_engine(url, create=False)
    assert store_rows.metric_series(engine, "a", ["reward/mean"])["reward/mean"] == [(1, 1.5)]
    for settings in ((), ("run.resume=auto",)):  # refused, and not let in by going on with what was refused
        with pytest.raises(ConfigError, match="choose another run.name"):
            record("there", *settings)
    assert store_rows.list_runs(engine)[0]["starts"] == 1
    record("here", "run.resume=auto")  # the control: the run itself goes on
    assert store_rows.list_runs(engine)[0]["starts"] == 2
    engine.dispose()


def test_a_silent_run_gives_signs_of_life(url, monkeypatch):
    monkeypatch.setattr("services.store.writer.HEARTBEAT_S", 0.05)
    with StoreWriter(url, "r") as writer:
        engine = schema.open_engine(url, create=False)
        first = store_rows.list_runs(engine)[0]["heartbeat"]
        wait_until(lambda: store_rows.list_runs(engine)[0]["heartbeat"] > first)
    assert writer.last_error is None
