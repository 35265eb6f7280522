"""Rows that a run could not write: training goes on, and what was lost is counted and shown by the dashboard, in its
API and to Prometheus. While the store takes nothing the count is in the run's own output and its metrics.jsonl, where
the dashboard finds it if that lies beside the store; it gets into the store with the first transaction that goes
through.
"""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.store.writer import StoreWriter
from tests.support.browsers import watched
from tests.support.dashboards import Dashboard, Place, clean_environment, dashboard, eventually, write_run, writer
from tests.support.databases import Server, wait_until
from tests.support.store_contents import put_sample

REPOSITORY = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def locked(place: Place, name: str, request: pytest.FixtureRequest) -> Iterator[None]:
    """Nobody else writes into the run's store."""
    if place.store is None:
        with contextlib.closing(sqlite3.connect(place.folder / name / "store.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield
    else:
        server: Server = request.getfixturevalue("postgresql")
        with server.connect(place.store.rsplit("/", 1)[1]) as other, other.transaction():
            other.execute("LOCK TABLE metrics, events, runs IN EXCLUSIVE MODE")  # as a dump's, or an upgrade's
            yield


def shows(service: Dashboard, name: str, lost: int) -> bool:
    """Whether API and Prometheus say so."""
    listed = {run["id"]: run["lost_rows"] for run in service.api("runs")["items"]}
    told = f'unmask_run_lost_rows{{run="{name}"}} {float(lost)}' in service.get("/metrics").text
    return listed.get(name) == service.api(f"runs/{name}")["lost_rows"] == lost and told


def test_rows_lost_to_a_lock_are_shown(place: Place, request: pytest.FixtureRequest) -> None:
    write_run(place, "whole")
    with writer(place, "one", max_queued_bytes=10_000) as training, dashboard(place) as service:
        eventually(lambda: shows(service, "one", 0))
        with locked(place, "one", request):
            for iteration in range(300):
                training.metrics(iteration, {"loss": 1.0})
            lost = training.lost_rows
            assert 0 < lost < 300
            assert service.api("runs/one")["lost_rows"] == 0  # readers aren't held up, and can't know yet
        assert training.flush(30)
        training.metrics(300, {"loss": 1.0})
        eventually(lambda: shows(service, "one", lost))
        assert training.lost_rows == lost
        kept = service.api("runs/one/metrics", name="loss", points=2000)["series"]["loss"]
        assert sum(kept["count"]) == 301 - lost
        assert shows(service, "whole", 0)  # the control


def stuck(runs: Path, name: str, *lines: str) -> None:
    """What a run leaves whose store has taken nothing for 90 s after iteration 3, and that has gone on."""
    with writer(runs, name) as store:
        store.metrics(3, {"loss": 1.0})
    Place(runs).execute(name, "UPDATE runs SET heartbeat = heartbeat - 90")
    (runs / name / "metrics.jsonl").write_text("".join(lines))


def line(iteration: int, lost: int) -> str:
    return json.dumps({"iteration": iteration, "loss": 1.0, "machine/store_lost_rows": float(lost)}) + "\n"


def test_a_run_whose_store_takes_nothing_is_no_lost_run(tmp_path: Path) -> None:
    stuck(tmp_path, "goes-on", line(3, 0), line(9, 40))
    stuck(tmp_path, "writes", line(3, 0), line(9, 40), line(10, 50)[:20])
    stuck(tmp_path, "died-long-ago", line(3, 0), line(9, 40))
    os.utime(tmp_path / "died-long-ago" / "metrics.jsonl", (time.time() - 65,) * 2)
    stuck(tmp_path, "died", line(3, 0))  # the controls: nothing beyond the store
    os.utime(tmp_path / "died" / "metrics.jsonl", (time.time() - 90,) * 2)
    stuck(tmp_path, "odd", '["no row"]\n')
    with writer(tmp_path, "writes-both") as store:
        store.metrics(3, {"loss": 1.0})
        assert store.flush(20)
        (tmp_path / "writes-both" / "metrics.jsonl").write_text(line(4, 0))
        with dashboard(tmp_path) as service:
            listed = {run["id"]: run for run in service.api("runs")["items"]}
            told = {name: (run["status"], run["unstored_iterations"], run["lost_rows"]) for name, run in listed.items()}
            assert told == {
                "goes-on": ("running", 6, 40),
                "writes": ("running", 6, 40),
                "died-long-ago": ("lost", 6, 40),
                "died": ("lost", 0, 0),
                "odd": ("lost", 0, 0),
                "writes-both": ("running", 0, 0),
            }
            for name, run in listed.items():
                assert {key: service.api(f"runs/{name}")[key] for key in run} == run
            assert 'unmask_run_lost_rows{run="goes-on"} 40.0' in service.get("/metrics").text


@pytest.mark.slow
def test_page_says_that_the_store_takes_nothing(browser: Any, tmp_path: Path) -> None:
    stuck(tmp_path / "runs", "one", line(3, 0), line(9, 40))
    with dashboard(tmp_path / "runs") as service, watched(browser, service.url) as page:
        page.open("/run/one")
        page.shows(".banners", "6 iterations are in metrics.jsonl only")
        page.shows(".banners", "40 rows could not be written")
        for iteration in (10, 11):  # the first may be news of the stream's begin
            (tmp_path / "runs" / "one" / "metrics.jsonl").write_text(line(3, 0) + line(iteration, 5 * iteration))
            page.shows(".banners", f"{iteration - 3} iterations are in metrics.jsonl only")
            page.shows(".banners", f"{5 * iteration} rows could not be written")


TRAIN = """
import pathlib, sys, time
from services.store.writer import StoreWriter
store, ballast = map(pathlib.Path, sys.argv[1:3])
writer = StoreWriter(f"sqlite:///{store}", "one", max_queued_bytes=200_000)
writer.metrics(0, {"loss": 1.0})
assert writer.flush(30)
slow = 0
for iteration in range(1, 1500):
    start = time.monotonic()
    writer.event("info", "fill", "x" * 2000)
    slow += time.monotonic() - start >= 0.05
    time.sleep(0.0002)
lost, full = writer.lost_rows, writer.last_error
ballast.unlink()
assert writer.flush(30)
writer.event("info", "end", "and on it goes")
writer.close(30)
print(lost, writer.lost_rows, slow, full)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size_kib", "full"), [(4096, True), (65536, False)])
def test_rows_lost_to_a_full_disk_are_shown(tmp_path: Path, size_kib: int, full: bool) -> None:
    """A real one: a small file system in memory, half of it taken by a file that goes later."""
    disk, runs = tmp_path / "disk", tmp_path / "runs"
    disk.mkdir()
    (runs / "one").mkdir(parents=True)
    train = [sys.executable, "-c", TRAIN, str(disk / "store.sqlite"), str(disk / "ballast")]
    script = (
        'mount -t tmpfs -o size="$1"k none "$2" || exit 77; head -c "$(($1 * 512))" /dev/zero > "$2/ballast"; '
        'target="$3"; from="$2"; shift 3; "$@" && cp "$from"/store.sqlite* "$target"'
    )
    inside = ["unshare", "-m", "sh", "-c", script, "sh", str(size_kib), str(disk), str(runs / "one"), *train]
    done = subprocess.run(inside, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=clean_environment())
    if "Operation not permitted" in done.stderr or done.returncode == 77:
        pytest.skip("file systems can't be mounted here: only root can, outside of most containers")
    assert done.returncode == 0, done.stderr
    lost, at_the_end, slow, error = done.stdout.strip().split(" ", 3)
    assert int(slow) <= 5, "training was held up"
    assert ("disk is full" in error) == full  # the control: the same program with room
    assert int(lost) > 0 or not full
    assert int(at_the_end) == int(lost)
    with dashboard(runs) as service:
        eventually(lambda: shows(service, "one", int(lost)))
        assert service.api("runs/one/events")["items"][0]["text"] == "and on it goes"


@pytest.mark.slow
def test_rows_lost_to_the_servers_full_disk_are_shown(tmp_path: Path) -> None:
    server = Server()
    try:
        server.kill()
        server.start(largest_file=20 * 2**20)  # stands for a full disk: files stop growing
        with server.database() as url, StoreWriter(url, "one", max_queued_bytes=10 * 2**20) as training:
            started = time.monotonic()
            for number in range(60):
                put_sample(training, number, trajectory=os.urandom(2**20))
                time.sleep(0.01)
            assert time.monotonic() - started < 30, "training was held up"
            wait_until(lambda: "File too large" in (training.last_error or ""))
            lost = training.lost_rows
            assert lost > 0
            server.kill()
            server.start()
            assert training.flush(60)
            training.event("info", "end", "and on it goes")
            with dashboard(Place(tmp_path, url)) as service:
                eventually(lambda: shows(service, "one", lost))
                eventually(lambda: bool(service.api("runs/one/events")["items"]))
    finally:
        server.remove()
