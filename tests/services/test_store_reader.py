"""Reading the run store, SQLite's and PostgreSQL's alike: series, pages, changes."""

import math
import threading
import time

import pytest
import sqlalchemy as sa

from services.store import schema
from services.store.reader import Changes, Reader
from services.store.writer import StoreWriter
from tests.support.store_contents import put_sample, put_walk, reading
from tests.support.store_load import rebuild

# ---- series


def finite(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def test_down_sampling_loses_no_spike_no_nan_and_no_row(pair):
    writer, reader = pair
    put_walk(writer, 2000)
    for points in (3, 50, 249, 500, 1999, 5000):
        line = reader.series("r", ["line"], points=points)["line"]
        assert len(line["iteration"]) <= points and sum(line["count"]) == 2001
        assert line["iteration"] == sorted(set(line["iteration"])) and line["iteration"][-1] == 2000
        assert max(finite(line["high"])) == 1e6 and min(finite(line["low"])) == -1e6
        assert sum(math.isnan(value) for value in line["value"]) == 1
    assert reader.series("r", ["line"], points=10)["line"]["count"][0] > 100  # the control: it was down-sampled


def test_a_point_is_the_mean_of_its_rows(pair):
    writer, reader = pair
    for iteration in range(1000):
        writer.metrics(iteration, {"line": float(iteration)})
    assert writer.flush(60)
    line = reader.series("r", ["line"], points=4)["line"]
    begin = 0
    for iteration, value, low, high, count in zip(*line.values(), strict=True):
        assert (low, high, count) == (begin, iteration, iteration - begin + 1)
        assert value == pytest.approx((low + high) / 2)
        begin = iteration + 1


def test_a_closer_look_is_exact(pair):
    writer, reader = pair
    put_walk(writer, 2000)
    series = reader.series("r", ["line", "eval", "none"], first=770, last=790, points=500)
    assert series["line"]["iteration"] == list(range(770, 791)) and series["line"]["value"][7] == 1e6
    assert series["eval"]["iteration"] == [770, 780, 790] and series["none"]["value"] == []
    assert reader.series("r", ["line"], first=3000)["line"]["value"] == []
    assert reader.series("r", ["line"], first=5, last=4)["line"]["value"] == []
    assert reader.series("absent", ["line"])["line"]["value"] == []
    assert reader.series("r", ["line"], last=10**30, first=-(10**30), points=1)["line"]["count"] == [2001]


def test_buckets_follow_replaced_rows_and_truncation(pair):
    writer, reader = pair
    put_walk(writer, 2000)
    writer.metrics(777, {"line": 0.0})
    assert writer.flush(60)
    assert max(reader.series("r", ["line"], points=20)["line"]["high"]) < 1e6
    writer.truncate_after(1200)
    line = reader.series("r", ["line"], points=20)["line"]
    assert line["iteration"][-1] == 1200 and sum(line["count"]) == 1201 and min(line["low"]) == 0.0
    put_walk(writer, 1400, first=1201)
    with writer._engine.begin() as connection:  # what grew bit by bit is what all rows together give
        everything = sa.select(schema.metric_buckets).order_by(*schema.metric_buckets.primary_key.columns)
        grown = [dict(row) for row in connection.execute(everything).mappings()]
        connection.execute(schema.metric_buckets.delete())
        rebuild(connection, "r")
        made = [dict(row) for row in connection.execute(everything).mappings()]
    means = [[row.pop("mean") for row in rows] for rows in (made, grown)]
    assert made == grown and len(grown) > 200
    assert means[0] == pytest.approx(means[1], rel=1e-12), "a database sums in any order"


# ---- pages


def test_pages_of_runs_neither_repeat_nor_skip_while_runs_come(store_url):
    for number in range(7):
        StoreWriter(store_url, f"run-{number}", task="sudoku").close(10)
    with reading(store_url) as reader:
        seen, cursor = [], None
        while True:
            page = reader.list_runs(limit=2, cursor=cursor)
            seen += [row["id"] for row in page.rows]
            StoreWriter(store_url, f"new-{len(seen)}", task="other").close(10)  # belongs before the first page
            cursor = page.next
            if cursor is None:
                break
        assert seen == [f"run-{number}" for number in reversed(range(7))]


def test_a_listed_run_comes_with_its_last_values_and_without_its_settings(store_url):
    for run_id, value in {"a": 2.0, "b": math.nan}.items():
        with StoreWriter(store_url, run_id) as writer:
            writer.metrics(1, {"loss": value})
    with reading(store_url) as reader:
        rows = {row["id"]: row for row in reader.list_runs().rows}
    assert rows["a"]["latest"]["loss"]["value"] == 2.0 and math.isnan(rows["b"]["latest"]["loss"]["value"])
    assert "config" not in rows["a"] and "summary" not in rows["a"]


@pytest.mark.parametrize(
    "cursor", ["", "x", "W10", "\ud800", "null", "WyItY3JlYXRlZCIsICJ4IiwgInkiXQ", "\0" * 5, "[" * 9999, "e30="]
)
def test_cursors_that_are_none_are_said_to_be(pair, cursor):
    _, reader = pair
    with pytest.raises(ValueError, match="cursor"):
        reader.list_runs(cursor=cursor)
    with pytest.raises(ValueError, match="cursor"):
        reader.samples("r", cursor=cursor)


@pytest.mark.parametrize("text", ["\0", "\ud800", "'; DROP TABLE runs; --", "x" * 100_000, "%s%(a)s:b"])
def test_hostile_words_find_nothing_and_break_nothing(pair, text):
    _, reader = pair
    assert reader.run(text) is None and reader.events(text) == [] and reader.samples(text).rows == []
    assert reader.series("r", [text])[text]["value"] == [] and reader.series(text, ["a"])["a"]["value"] == []
    assert reader.events("r", level=text, kind=text) == [] and reader.samples("r", kind=text).rows == []
    assert reader.changes_since("r", text).reset and reader.changes_since(text, "0-0").run is None
    assert reader.sample("r", 2**200) is None and reader.events("r", after_id=-(2**200), before_id=2**200) == []
    assert reader.list_runs().rows[0]["id"] == "r"


def test_samples_page_by_page_while_more_come(pair):
    writer, reader = pair
    for iteration in range(1, 6):
        for row in range(3):
            put_sample(writer, iteration, row, correct=row == 0)
    assert writer.flush(30)
    seen, cursor = [], None
    while True:
        page = reader.samples("r", limit=4, cursor=cursor)
        seen += [(row["iteration"], row["row"]) for row in page.rows]
        put_sample(writer, 100 + len(seen))
        assert writer.flush(30)
        cursor = page.next
        if cursor is None:
            break
    assert seen == [(iteration, row) for iteration in range(5, 0, -1) for row in range(3)]
    right = reader.samples("r", iteration=2, correct=True).rows
    assert [(row["iteration"], row["row"]) for row in right] == [(2, 0)] and "trajectory" not in right[0]
    found = reader.sample("r", right[0]["id"])
    assert found is not None and found["trajectory"] == b"bytes" and reader.sample("other", right[0]["id"]) is None


def test_events_from_either_end(pair):
    writer, reader = pair
    for number in range(10):
        writer.event("warning" if number % 2 else "info", "x", str(number))
    assert writer.flush(30)
    assert [row["text"] for row in reader.events("r", limit=3)] == ["0", "1", "2"]
    last = reader.events("r", limit=3, newest=True)
    assert [row["text"] for row in last] == ["7", "8", "9"]
    assert [row["text"] for row in reader.events("r", limit=2, newest=True, before_id=last[0]["id"])] == ["5", "6"]
    assert [row["text"] for row in reader.events("r", level="warning", limit=2)] == ["1", "3"]


# ---- changes


class Follower:
    """A client of the stream: what it has put together from changes alone."""

    def __init__(self, reader: Reader, marker: str | None = None) -> None:
        self.reader = reader
        self.marker = marker or reader.marker("r").partition("-")[0] + "-0"
        self.metrics: dict[tuple[str, int], float] = {}
        self.events: list[str] = []
        self.deliveries: list[tuple[str, int, int]] = []

    def poll(self, limit: int = 5000) -> Changes:
        while True:
            changes = self.reader.changes_since("r", self.marker, limit=limit)
            assert not changes.reset
            after = changes.truncated_after
            if after is not None:
                self.metrics = {key: value for key, value in self.metrics.items() if key[1] <= after}
            for row in changes.metrics:
                self.metrics[row["name"], row["iteration"]] = row["value"]
                self.deliveries.append((row["name"], row["iteration"], row["revision"]))
            self.events += [row["text"] for row in changes.events]
            self.marker = changes.marker
            if not changes.more:
                return changes

    def stored(self) -> dict[tuple[str, int], float]:
        series = self.reader.series("r", self.reader.metric_names("r"), points=10**6)
        return {
            (name, iteration): value
            for name, one in series.items()
            for iteration, value in zip(one["iteration"], one["value"], strict=True)
        }


def test_changes_while_a_run_writes_miss_nothing_and_repeat_nothing(store_url):
    with StoreWriter(store_url, "r") as writer, reading(store_url) as reader:

        def train() -> None:
            for iteration in range(400):
                writer.metrics(iteration, {"loss": float(iteration), "kl": 1.0})
                writer.event("info", "x", str(iteration))
                time.sleep(0.002)

        training = threading.Thread(target=train)
        training.start()
        follower = Follower(reader)
        polls = 0
        while training.is_alive():
            follower.poll(limit=7)
            polls += 1
        training.join()
        assert writer.flush(30)
        follower.poll()
    assert polls > 2 and len(follower.deliveries) == len(set(follower.deliveries)) == 800
    assert follower.events == [str(number) for number in range(400)]
    assert len(follower.metrics) == 800


def test_a_resumed_run_is_followed_through_truncation_and_replacement(store_url):
    with StoreWriter(store_url, "r") as writer, reading(store_url) as reader:
        for iteration in range(1, 11):
            writer.metrics(iteration, {"loss": float(iteration)})
        assert writer.flush(30)
        follower = Follower(reader)
        follower.poll()
        asleep = Follower(reader, follower.marker)
        asleep.metrics = dict(follower.metrics)
    with StoreWriter(store_url, "r") as writer, reading(store_url) as reader:
        follower.reader = asleep.reader = reader
        writer.truncate_after(4)
        changes = follower.poll()
        assert changes.truncated_after == 4 and changes.run is not None and changes.run["starts"] == 2
        for iteration in range(5, 8):
            writer.metrics(iteration, {"loss": -float(iteration)})
        writer.metrics(2, {"loss": 22.0})
        assert writer.flush(30)
        follower.poll()
        writer.truncate_after(6)
        writer.metrics(7, {"loss": 77.0})
        assert writer.flush(30)
        follower.poll()
        asleep.poll()
        assert follower.metrics == asleep.metrics == follower.stored()
        assert follower.metrics["loss", 7] == 77.0 and follower.metrics["loss", 2] == 22.0
        without = reader.changes_since("r", follower.marker)  # the control: nothing new, nothing told
        assert (without.metrics, without.truncated_after, without.more, without.reset) == ([], None, False, False)


def test_a_run_made_anew_under_the_same_name_resets_its_followers(store_url):
    with StoreWriter(store_url, "r") as writer, reading(store_url) as reader:
        writer.metrics(1, {"loss": 1.0})
        assert writer.flush(30)
        marker = reader.marker("r")
        with writer._engine.begin() as connection:
            connection.execute(schema.runs.delete())
        gone = reader.changes_since("r", marker)
        assert gone.reset and gone.run is None
        time.sleep(0.01)
        with StoreWriter(store_url, "r") as other:
            for iteration in range(5):
                other.metrics(iteration, {"loss": 2.0})
                assert other.flush(30)
            changes = reader.changes_since("r", marker)
            assert changes.reset and changes.metrics == [] and changes.marker == reader.marker("r")


def test_changes_come_in_pages_of_whole_transactions(pair):
    writer, reader = pair
    for iteration in range(30):
        writer.metrics(iteration, {"a": 1.0, "b": 2.0})
        assert writer.flush(30)
    marker = reader.marker("r").partition("-")[0] + "-0"
    sizes = []
    while True:
        changes = reader.changes_since("r", marker, limit=7)
        sizes.append(len(changes.metrics))
        marker = changes.marker
        if not changes.more:
            break
    assert sum(sizes) == 60 and max(sizes) == 6
    whole = reader.changes_since("r", reader.marker("r").partition("-")[0] + "-0", limit=1)
    assert len(whole.metrics) == 2  # one transaction always fits


def test_workers_checkpoints_and_samples_are_changes_too(pair):
    writer, reader = pair
    marker = reader.marker("r")
    writer.worker("actor-0", role="actor", status="starting")
    writer.worker("actor-0", role="actor", status="alive")
    writer.checkpoint(3, "checkpoints/3")
    put_sample(writer, 3)
    assert writer.flush(30)
    changes = reader.changes_since("r", marker)
    assert [row["status"] for row in changes.workers] == ["alive"]
    assert [row["iteration"] for row in changes.checkpoints] == [3]
    assert [row["iteration"] for row in changes.samples] == [3] and "completion" not in changes.samples[0]
    writer.checkpoint(4, "checkpoints/4")
    writer.checkpoints_gone([3])
    assert writer.flush(30)
    assert [row["iteration"] for row in reader.checkpoints("r")] == [4]
