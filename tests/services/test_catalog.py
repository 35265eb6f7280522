"""The list of all runs: folders of run directories whose stores come, go, lock and break, and one store by URL."""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rewards.errors import StoreError
from services.store import schema
from services.store.catalog import MAX_RUNS, UNREADABLE, Catalog
from services.store.schema import sqlite_url
from services.store.writer import StoreWriter
from tests.support.dashboards import writer
from tests.support.databases import Server, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are looked through more often, for the sake of the tests' time."""
    monkeypatch.setattr("services.store.catalog._SCAN_S", 0.1)
    monkeypatch.setattr("services.store.catalog._RETRY_S", 0.1)


@pytest.fixture
def catalog(folder: Path) -> Iterator[Catalog]:
    catalog = Catalog(folder)
    yield catalog
    catalog.close()


def make_run(folder: Path, name: str, **columns: str) -> Path:
    """Store of a run directory with one metric row and one event; whole when a catalog first sees it, so that nothing
    is left in a write-ahead log that a reader kept from being folded in."""
    (folder / name).mkdir()
    making = folder / name / "making.sqlite"
    with StoreWriter(sqlite_url(making), name, **columns) as writer:
        writer.metrics(1, {"loss": 1.0})
        writer.event("info", "x", f"of {name}")
    return making.rename(folder / name / "store.sqlite")


def reason(catalog: Catalog, run_id: str) -> str | None:
    rows = {row["id"]: row["unreadable"] for row in catalog.list_runs().rows}
    return rows.get(run_id, "not listed")


def test_runs_come_and_go(folder, catalog):
    assert catalog.run_ids() == [] and catalog.list_runs().rows == [] and catalog.run("a") is None
    make_run(folder, "a", task="sudoku")
    make_run(folder, "b", task="gsm8k")
    wait_until(lambda: catalog.run_ids() == ["a", "b"])
    assert [(row["id"], row["task"]) for row in catalog.list_runs().rows] == [("b", "gsm8k"), ("a", "sudoku")]
    row = catalog.list_runs().rows[-1]
    assert row["latest"]["loss"]["value"] == 1.0 and row["unreadable"] is None
    assert catalog.reader("a").events("a")[0]["text"] == "of a" and catalog.folder("a") == folder / "a"
    run = catalog.run("b")
    assert run is not None and run["config"] == {} and run["unreadable"] is None
    shutil.rmtree(folder / "a")
    wait_until(lambda: catalog.run_ids() == ["b"])
    with pytest.raises(KeyError):
        catalog.reader("a")


def test_a_folder_that_is_not_there_yet(tmp_path):
    with closing(Catalog(tmp_path / "later")) as catalog:
        assert catalog.run_ids() == []
        (tmp_path / "later").mkdir()
        make_run(tmp_path / "later", "a")
        wait_until(lambda: catalog.run_ids() == ["a"])


def test_what_a_run_writes_shows_in_the_list(folder, catalog):
    (folder / "a").mkdir()
    with StoreWriter(f"sqlite:///{folder}/a/store.sqlite", "a") as writer:
        for iteration in (1, 2):
            writer.metrics(iteration, {"loss": float(iteration)})
            wait_until(
                lambda now=iteration: (
                    [row["latest"].get("loss", {}).get("iteration") for row in catalog.list_runs().rows] == [now]
                )
            )
        writer.status("finished")
    wait_until(lambda: [row["status"] for row in catalog.list_runs().rows] == ["finished"])


@pytest.mark.parametrize("content", [b"", b"this is no database at all" * 1000, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_damaged_store_is_listed_with_its_reason_and_recovers(folder, catalog, content):
    make_run(folder, "good")
    wait_until(lambda: catalog.run_ids() == ["good"])
    whole = make_run(folder, "bad").read_bytes()
    path = folder / "bad" / "store.sqlite"
    (folder / "worse").mkdir()
    (folder / "worse" / "store.sqlite").write_bytes(content)  # never was readable
    wait_until(lambda: catalog.run_ids() == ["bad", "good", "worse"] and reason(catalog, "bad") is None)
    path.write_bytes(content)  # was readable once
    wait_until(lambda: reason(catalog, "bad") not in (None, "not listed"))
    rows = {row["id"]: row for row in catalog.list_runs().rows}
    assert rows["bad"]["status"] == "running" and rows["worse"]["status"] == UNREADABLE
    assert rows["good"]["unreadable"] is None and catalog.reader("good").events("good")
    for name in ("bad", "worse"):
        run = catalog.run(name)
        assert run is not None and run["unreadable"] and "store.sqlite" in run["unreadable"]
    with pytest.raises(StoreError):
        catalog.reader("worse")
    path.write_bytes(whole)
    shutil.copy(path, folder / "worse" / "store.sqlite")
    wait_until(lambda: reason(catalog, "bad") is None)
    assert catalog.reader("bad").events("bad")[0]["text"] == "of bad"
    wait_until(lambda: "copy of" in (reason(catalog, "worse") or ""))  # its run is the other's
    shutil.rmtree(folder / "bad")
    wait_until(lambda: catalog.run_ids() == ["bad", "good"] and catalog.folder("bad") == folder / "worse")


def test_a_locked_store_is_listed_with_its_reason_and_recovers(folder, catalog):
    path = make_run(folder, "a")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # in WAL mode nobody can lock a reader out
        connection.execute("BEGIN EXCLUSIVE")
        wait_until(lambda: "locked" in (reason(catalog, "a") or ""))
        with pytest.raises(StoreError, match="locked"):
            catalog.reader("a").events("a")
        make_run(folder, "b")  # the locked one holds up nobody
        wait_until(lambda: catalog.run_ids() == ["a", "b"])
        connection.execute("COMMIT")
    wait_until(lambda: reason(catalog, "a") is None)
    assert catalog.reader("a").events("a")


def test_a_folders_store_does_not_fill_the_list(folder, catalog):
    make_run(folder, "good")
    for name, number in (("few", MAX_RUNS - 1), ("many", MAX_RUNS)):
        with closing(sqlite3.connect(make_run(folder, name))) as connection:
            connection.execute("CREATE TEMP TABLE other AS SELECT * FROM runs")
            for index in range(number):
                connection.execute("UPDATE other SET id = ?", [f"{name}-{index}"])
                connection.execute("INSERT INTO runs SELECT * FROM other")
            connection.commit()
    wait_until(lambda: f"more than {MAX_RUNS} runs" in (reason(catalog, "many") or ""))
    wait_until(lambda: reason(catalog, "few") is None)
    assert "many-0" not in catalog.run_ids() and "few-0" in catalog.run_ids(), "with the control"
    assert reason(catalog, "good") is None


def test_stores_of_other_versions_say_what_to_do(folder, catalog):
    for name, version in (("old", 1), ("new", 99)):
        with closing(sqlite3.connect(make_run(folder, name))) as connection:
            connection.execute("UPDATE schema_version SET version = ?", [version])
            connection.commit()
    wait_until(lambda: "python -m services.store upgrade" in (reason(catalog, "old") or ""))
    wait_until(lambda: "newer Unmask" in (reason(catalog, "new") or ""))


def test_a_store_replaced_by_another_of_the_same_name(folder, catalog):
    make_run(folder, "a", task="first")
    wait_until(lambda: catalog.run_ids() == ["a"])
    assert catalog.reader("a").run("a")["task"] == "first"
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    make_run(elsewhere, "a", task="second")
    os.replace(elsewhere / "a" / "store.sqlite", folder / "a" / "store.sqlite")
    wait_until(lambda: catalog.list_runs().rows[0]["task"] == "second")
    assert catalog.reader("a").run("a")["task"] == "second"


def test_names_that_look_like_paths_are_only_names(folder, catalog):
    make_run(folder.parent, "outside")
    make_run(folder, "a'; DROP TABLE runs; -- <b>%2e%2e")
    wait_until(lambda: len(catalog.run_ids()) == 1)
    for name in ("../outside", "..", "", "a/../../outside", str(folder.parent / "outside"), "\0", "\ud800"):
        assert catalog.run(name) is None
        with pytest.raises(KeyError):
            catalog.reader(name)


def open_files(folder: Path) -> int:
    count = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{entry}").startswith(str(folder))
        except OSError:
            continue
    return count


@pytest.mark.parametrize(("bound", "at_most"), [(2, 2 * 3), (100, 100 * 3)])
def test_few_stores_are_open_at_a_time(folder, bound, at_most):
    for number in range(8):
        make_run(folder, f"run-{number}")
    with closing(Catalog(folder, max_engines=bound)) as catalog:
        wait_until(lambda: len(catalog.run_ids()) == 8)
        for _ in range(2):
            for run_id in catalog.run_ids():
                assert catalog.reader(run_id).events(run_id)
        held = open_files(folder)
        assert 0 < held <= at_most
        assert bound == 2 or held > 2 * 3  # the control: without the bound more stay open
    wait_until(lambda: open_files(folder) == 0)


def test_many_threads_share_it(place):
    for number in range(6):
        with writer(place, f"run-{number}") as store:
            store.event("info", "x", f"of run-{number}")
    with closing(Catalog(place.store or place.folder)) as catalog:
        wait_until(lambda: len(catalog.run_ids()) == 6)
        assert_shared(catalog)


def assert_shared(catalog: Catalog) -> None:
    errors: list[BaseException] = []

    def look() -> None:
        try:
            for turn in range(30):
                run_id = f"run-{turn % 6}"
                assert catalog.reader(run_id).events(run_id)[0]["text"] == f"of {run_id}"
                assert len(catalog.list_runs(limit=3).rows) == 3
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_one_store_by_url(store_url):
    with closing(Catalog(store_url)) as catalog:
        with pytest.raises(StoreError, match="is empty|no run store"):
            catalog.list_runs()
        for name in ("a", "b"):
            with StoreWriter(store_url, name) as writer:
                writer.event("info", "x", f"of {name}")
        assert catalog.run_ids() == ["a", "b"]  # and it recovers
        assert [row["id"] for row in catalog.list_runs().rows] == ["b", "a"]
        assert catalog.list_runs().rows[0]["unreadable"] is None
        run = catalog.run("a")
        assert run is not None and run["config"] == {} and catalog.run("c") is None
        assert catalog.reader("b").events("b")[0]["text"] == "of b"
        assert catalog.store_url("a") == store_url and catalog.folder("a") is None
        with pytest.raises(KeyError):
            catalog.reader("c")


def test_locked_tables_and_cut_connections_pass(postgresql):
    with postgresql.database() as url, StoreWriter(url, "a"), closing(Catalog(url)) as catalog:
        assert catalog.run_ids() == ["a"]
        with postgresql.connect(url.rsplit("/", 1)[1]) as other, other.transaction():
            other.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
            for ask in (catalog.run_ids, catalog.list_runs, lambda: catalog.run("a"), lambda: catalog.store_url("a")):
                with pytest.raises(StoreError, match="lock timeout"):
                    ask()
        assert catalog.run_ids() == ["a"]
        postgresql.disconnect(url.rsplit("/", 1)[1])
        assert catalog.run_ids() == ["a"]  # a restart of the server costs no error


def test_other_versions_of_a_store_by_url_say_what_to_do(store_url):
    StoreWriter(store_url, "a").close(10)
    engine = schema.open_engine(store_url, create=False)
    for version, told in ((1, "python -m services.store upgrade"), (99, "newer Unmask"), (2, "")):
        with engine.begin() as connection:
            connection.execute(schema.schema_version.update().values(version=version))
        with closing(Catalog(store_url)) as catalog:
            if told:
                with pytest.raises(StoreError, match=told):
                    catalog.list_runs()
            else:
                assert catalog.run_ids() == ["a"]
    engine.dispose()


@pytest.mark.slow
def test_a_killed_server_is_told_and_comes_back():
    server = Server()
    try:
        with server.database() as url, StoreWriter(url, "a"), closing(Catalog(url)) as catalog:
            assert catalog.run_ids() == ["a"]
            server.kill()
            started = time.monotonic()
            with pytest.raises(StoreError, match="OperationalError"):
                catalog.list_runs()
            assert time.monotonic() - started < 20
            server.start()
            assert catalog.run_ids() == ["a"]
    finally:
        server.remove()
