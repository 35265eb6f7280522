"""Retention, and the commands that care for run stores, SQLite's and PostgreSQL's alike."""

import math
import time

import pytest
import sqlalchemy as sa

from rewards.errors import ConfigError, StoreError
from services.store import schema
from services.store.__main__ import main
from services.store.retention import Retention
from services.store.writer import StoreWriter
from tests.support.store_contents import put_sample, put_walk, reading

# ---- retention


def test_old_samples_go_by_kind(pair, capsys, store_url):
    writer, reader = pair
    for iteration in range(1, 11):
        put_sample(writer, iteration)
    put_sample(writer, 0, kind="base")
    assert writer.flush(30)
    assert main(["prune", store_url, "--keep-samples", "3"]) == 0
    assert "removed 7 samples, 0 metric rows" in capsys.readouterr().out
    kept = reader.samples("r").rows
    assert [(row["iteration"], row["kind"]) for row in kept] == [(10, "train"), (9, "train"), (8, "train"), (0, "base")]


@pytest.mark.slow
def test_old_rows_give_way_to_their_buckets(pair, store_url, capsys):
    writer, reader = pair
    put_walk(writer, 2000)
    before = reader.series("r", ["line"], points=100)["line"]
    week_ago = time.time() - 7 * 86400
    with writer._engine.begin() as connection:
        for table in (schema.metrics, schema.metric_buckets):
            column = table.c.iteration if table is schema.metrics else table.c.last_iteration
            connection.execute(table.update().where(column < 1600).values(time=week_ago))
    assert main(["prune", store_url, "--metric-days", "3"]) == 0
    assert f"removed 0 samples, {1600 + 160} metric rows" in capsys.readouterr().out
    after = reader.series("r", ["line"], points=100)["line"]
    means = [series.pop("value") for series in (after, before)]  # PostgreSQL sums in any order
    assert after == before and means[0] == pytest.approx(means[1], rel=1e-12, nan_ok=True)  # the curve is as it was
    close = reader.series("r", ["line"], first=770, last=790)["line"]  # a closer look is not, but the spike is there
    assert close["count"] == [8, 8, 8] and max(close["high"]) == 1e6
    across = reader.series("r", ["line"], first=1580, last=1620)["line"]
    assert across["count"] == [8, 8, 8] + [1] * 21
    assert main(["prune", store_url, "--metric-days", "3"]) == 0 and "removed 0" in capsys.readouterr().out

    writer.truncate_after(1003)  # a run that resumes where its rows are pruned
    put_walk(writer, 1040, first=1004)
    line = reader.series("r", ["line"], first=980, last=1040)["line"]
    assert line["iteration"] == [983, 991, 999, *range(1004, 1041)]
    assert reader.latest_metrics("r")["line"]["iteration"] == 1040


def test_the_writer_applies_its_retention(store_url, monkeypatch):
    monkeypatch.setattr("services.store.writer._PRUNE_S", 0.0)
    with StoreWriter(store_url, "r", retention=Retention(samples=2)) as writer, reading(store_url) as reader:
        for iteration in range(20):
            put_sample(writer, iteration)
            assert writer.flush(30)
        deadline = time.monotonic() + 30
        while len(reader.samples("r").rows) > 2:
            writer.event("info", "x", "wakes the writer")
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert writer.lost_rows == 0


def test_retention_that_makes_no_sense_is_refused():
    for settings in ({"samples": -1}, {"metric_days": -1.0}, {"metric_days": math.nan}):
        with pytest.raises(ConfigError, match="can't"):
            Retention(**settings)


# ---- care


def test_runs_move_into_one_store(tmp_path, store_url, capsys):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        with StoreWriter(
            f"sqlite:///{tmp_path}/runs/{name}/store.sqlite", name, identity=name, config={"x": name}
        ) as writer:
            for iteration in range(100):
                writer.metrics(iteration, {"loss": math.nan if iteration == 5 else float(iteration)})
            put_sample(writer, 1)
            writer.event("info", "x", "hello")
    url = f"{store_url}-all" if store_url.startswith("sqlite") else store_url
    assert main(["copy", str(tmp_path / "runs"), url]) == 0
    assert "copied a" in capsys.readouterr().out
    assert main(["copy", str(tmp_path / "runs"), url]) == 0
    assert "copied no run; left out, being there already: a" in capsys.readouterr().out
    with reading(f"sqlite:///{tmp_path}/runs/a/store.sqlite") as old, reading(url) as new:
        assert new.run_ids() == ["a", "b"] and new.run("a") == old.run("a")
        assert str(new.series("a", ["loss"], points=9)) == str(old.series("a", ["loss"], points=9))
        marker = old.marker("a")
        assert new.marker("a") == marker and not new.changes_since("a", marker).reset
        (sample,) = new.samples("b").rows
        found = new.sample("b", sample["id"])
        assert found is not None and found["trajectory"] == b"bytes"
    with StoreWriter(url, "a", identity="a") as writer:  # the copy can be gone on with
        writer.metrics(100, {"loss": 1.0})
        writer.event("info", "x", "more")
    assert writer.lost_rows == 0, writer.last_error
    other = tmp_path / "another"
    other.mkdir()
    StoreWriter(f"sqlite:///{other}/store.sqlite", "a", identity="another").close(10)
    assert main(["copy", str(other), url]) == 0
    assert "copied no run; left out, being there already: a (another run of this name)" in capsys.readouterr().out


def test_what_the_command_cannot_do_it_says(tmp_path, capsys):
    assert main(["upgrade", str(tmp_path)]) == 1 and "no run store at" in capsys.readouterr().err
    StoreWriter(f"sqlite:///{tmp_path}/store.sqlite", "r").close(10)
    assert main(["upgrade", str(tmp_path)]) == 0 and "schema version 2" in capsys.readouterr().out
    assert main(["prune", str(tmp_path), "--run", "x"]) == 1 and "no run x" in capsys.readouterr().err
    assert main(["prune", str(tmp_path), "--keep-samples", "-2"]) == 2 and "-2 samples" in capsys.readouterr().err


def test_a_store_that_stops_answering_is_told_in_a_sentence(pair):
    writer, reader = pair
    with writer._engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE events"))
    with pytest.raises(StoreError, match="cannot read the run store .*events"):
        reader.events("r")
    assert reader.run("r") is not None
