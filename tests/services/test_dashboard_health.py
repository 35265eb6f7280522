"""Stores that can't be read, runs that come and go, health and Prometheus."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.dashboard.annotations import Annotations
from services.dashboard.index import RunIndex
from services.dashboard.settings import Settings
from services.store import schema
from services.store.catalog import Catalog
from tests.support.dashboards import Dashboard, Place, dashboard, eventually, is_problem, write_run, writer
from tests.support.databases import Server

ODD = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def several(shared_place: Place) -> Iterator[Dashboard]:
    """Three finished runs and one that is lost."""
    for name in ("one", "two", ODD):
        write_run(shared_place, name, iterations=6)
    with writer(shared_place, "countdown-1") as store:
        store.metrics(1, {"reward/mean": float("nan")})
    shared_place.execute("countdown-1", "UPDATE runs SET heartbeat = heartbeat - 3600 WHERE id = 'countdown-1'")
    with dashboard(shared_place) as service:
        yield service


# ---- stores that can't be read: files, each by itself


@pytest.mark.slow
def test_a_corrupt_store_is_said_and_recovers(tmp_path: Path) -> None:
    write_run(tmp_path, "good")
    write_run(tmp_path, "bad")
    store = tmp_path / "bad" / "store.sqlite"
    whole = store.read_bytes()
    store.write_bytes(b"this is no database, " * 500)
    with dashboard(tmp_path) as service:
        shown = {run["id"]: run for run in service.api("runs")["items"]}
        assert shown["good"]["status"] == "finished"
        assert shown["bad"]["status"] == "unreadable" and shown["bad"]["unreadable"]
        problem = is_problem(service.get("/api/v1/runs/bad"), 503)
        assert problem["detail"]
        assert service.get("/readyz").json() == {"status": "degraded", "runs": 2, "unreadable": 1}
        assert 'unmask_runs{status="unreadable"} 1.0' in service.get("/metrics").text
        aside = tmp_path / "aside"
        aside.write_bytes(whole)
        os.replace(aside, store)
        eventually(lambda: service.get("/api/v1/runs/bad").status_code == 200)
        eventually(lambda: all(run["status"] == "finished" for run in service.api("runs")["items"]))
        assert service.api("runs/bad/metrics", name="loss")["series"]["loss"]["iteration"] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_locked_store_is_said_and_recovers(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    lock = sqlite3.connect(tmp_path / "one" / "store.sqlite", isolation_level=None)
    with contextlib.closing(lock):
        lock.execute("PRAGMA locking_mode = EXCLUSIVE")  # in WAL mode nothing less keeps readers out
        lock.execute("UPDATE runs SET heartbeat = heartbeat")
        with dashboard(tmp_path) as service:
            (run,) = service.api("runs")["items"]
            assert (run["id"], run["status"]) == ("one", "unreadable") and "lock" in run["unreadable"]
            answer = service.get("/api/v1/runs/one/workers")
            assert "lock" in is_problem(answer, 503)["detail"] and answer.headers["retry-after"]
            lock.close()
            eventually(lambda: service.get("/api/v1/runs/one/workers").status_code == 200)
            eventually(lambda: service.api("runs")["items"][0]["status"] == "finished")


# ---- stores that can't be read: one for all


@pytest.mark.slow
def test_locked_tables_are_said_and_recover(tmp_path: Path, postgresql: Server) -> None:
    with postgresql.database() as url:
        write_run(Place(tmp_path, url), "one")
        with dashboard(Place(tmp_path, url)) as service:
            with postgresql.connect(url.rsplit("/", 1)[1]) as other, other.transaction():
                other.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
                for path in ("/api/v1/runs", "/api/v1/runs/one", "/readyz", "/metrics"):
                    answer = service.get(path)
                    assert "lock timeout" in is_problem(answer, 503)["detail"] and answer.headers["retry-after"]
                assert service.get("/healthz").status_code == 200
            assert service.api("runs/one")["status"] == "finished"
            assert service.get("/readyz").json() == {"status": "ok", "runs": 1, "unreadable": 0}


def test_an_empty_database_is_said_until_the_first_run_comes(tmp_path: Path, postgresql: Server) -> None:
    with postgresql.database() as url, dashboard(Place(tmp_path, url)) as service:
        assert "no run has been written into it" in is_problem(service.get("/api/v1/runs"), 503)["detail"]
        write_run(Place(tmp_path, url), "first")
        assert [run["id"] for run in service.api("runs")["items"]] == ["first"]


@pytest.mark.slow
def test_a_server_that_goes_is_said_and_comes_back(tmp_path: Path) -> None:
    server = Server()
    try:
        with server.database() as url:
            place = Place(tmp_path, url)
            for name in ("one", "two"):
                write_run(place, name)
            with dashboard(place) as service:
                assert sorted(run["id"] for run in service.api("runs")["items"]) == ["one", "two"]
                server.kill()
                for path in ("/api/v1/runs/two", "/api/v1/runs/two/events", "/readyz", "/metrics"):
                    eventually(lambda path=path: service.get(path).status_code == 503)
                    is_problem(service.get(path), 503)
                assert service.get("/healthz").status_code == 200
                server.start()
                eventually(lambda: service.get("/api/v1/runs/two/events").status_code == 200)
                eventually(lambda: service.get("/readyz").json()["runs"] == 2)
    finally:
        server.remove()


# ---- both


@pytest.mark.slow
def test_runs_appear_and_vanish_without_a_restart(place: Place) -> None:
    write_run(place, "early")
    with dashboard(place) as service:
        eventually(lambda: [run["id"] for run in service.api("runs")["items"]] == ["early"])
        write_run(place, "late")
        eventually(lambda: [run["id"] for run in service.api("runs")["items"]] == ["late", "early"])
        assert service.get("/api/v1/runs/late").status_code == 200
        place.remove("late")
        eventually(lambda: [run["id"] for run in service.api("runs")["items"]] == ["early"])
        is_problem(service.get("/api/v1/runs/late"), 404)


# ---- Prometheus and health


@pytest.mark.slow
def test_prometheus_figures(several: Dashboard) -> None:
    text = several.get("/metrics").text
    for line in (
        'unmask_runs{status="finished"} 3.0',
        'unmask_runs{status="lost"} 1.0',
        'unmask_run_groups{run="one",state="pending"} 3.0',
        'unmask_run_workers{role="rollout",run="one",status="ready"} 1.0',
        'unmask_run_update_seconds{run="one"} 0.25',
        'unmask_run_staleness_max{run="one"} 1.0',
        'unmask_run_warnings{run="one"} 1.0',
        'unmask_run_lost_rows{run="one"} 0.0',
        'unmask_run_tokens_per_second{run="one"} 1006.0',
        'unmask_run_reward_mean{run="countdown-1"} NaN',
    ):
        assert line in text, line
    assert "unmask_dashboard_process_resident_memory_bytes" in text
    assert f'run="{ODD}"' in text  # as text: the format's own escapes are for quotes, backslashes and newlines


@pytest.mark.slow
def test_prometheus_labels_stay_bounded(store_url: str, tmp_path: Path) -> None:
    with writer(Place(tmp_path, store_url), "run-000") as store:
        store.metrics(1, {"loss": 1.0})
        store.worker("w", role="role-0", status="status-0")
        store.status("finished")
    engine = schema.open_engine(store_url, create=False)
    with engine.begin() as connection:
        (run,), (worker,) = (
            connection.execute(table.select()).mappings().all() for table in (schema.runs, schema.workers)
        )
        more = [f"run-{number:03d}" for number in range(1, 55)]
        connection.execute(schema.runs.insert(), [{**run, "id": name} for name in more])
        odd = [{"run_id": name, "role": f"role-{name}", "status": f"status-{name}"} for name in more]
        connection.execute(schema.workers.insert(), [{**worker, **each} for each in odd])
    engine.dispose()
    with dashboard(Place(tmp_path, store_url)) as service:
        for path in ("/api/v1/nope", *(f"/nope-{number}" for number in range(30))):
            service.get(path)
        text = service.get("/metrics").text
    assert "unmask_runs_without_series 5.0" in text and 'unmask_runs{status="finished"} 55.0' in text
    assert "role-" not in text and "status-" not in text and "nope" not in text
    assert 'role="other"' in text


def test_events_are_counted_once_each_and_anew_for_another_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.dashboard.index.MAX_AGE_S", 0.0)

    def counts() -> tuple[int, int] | None:
        known = index.runs().get("one")
        return known and (known.errors, known.warnings)

    with contextlib.closing(Catalog(place.store or place.folder)) as catalog:
        index = RunIndex(catalog, Annotations(Settings(place.folder, store_url=place.store)))
        with writer(place, "one") as store:
            for number in range(1200):
                store.event("error", "x", f"error {number}")
            store.event("warning", "x", "behind them all")
            eventually(lambda: counts() == (1200, 1))
            store.event("error", "x", "one more")
            eventually(lambda: counts() == (1201, 1))
        place.remove("one")
        write_run(place, "one")
        eventually(lambda: counts() == (0, 1))


def test_health(several: Dashboard) -> None:
    assert several.get("/healthz").json()["status"] == "ok"
    assert several.get("/readyz").json() == {"status": "ok", "runs": 4, "unreadable": 0}
