"""Stores that can't be read, runs that come and go, health and Prometheus."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.store.writer import StoreWriter
from tests.dashboards import Dashboard, dashboard, eventually, figures, is_problem, write_run, writer
from tests.databases import Server

ODD = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Three finished runs and one that is lost."""
    runs = tmp_path_factory.mktemp("runs")
    for name in ("one", "two", ODD):
        write_run(runs, name, iterations=6)
    with writer(runs, "countdown-1") as store:
        store.metrics(1, {"reward/mean": float("nan")})
    with contextlib.closing(sqlite3.connect(runs / "countdown-1" / "store.sqlite")) as connection, connection:
        connection.execute("UPDATE runs SET heartbeat = heartbeat - 3600")
    with dashboard(runs) as service:
        yield service


# ---- stores that can't be read


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


def test_runs_appear_and_vanish_without_a_restart(tmp_path: Path) -> None:
    with dashboard(tmp_path) as service:
        assert service.api("runs")["items"] == []
        write_run(tmp_path, "late")
        eventually(lambda: [run["id"] for run in service.api("runs")["items"]] == ["late"])
        assert service.get("/api/v1/runs/late").status_code == 200
        for path in (tmp_path / "late").iterdir():
            path.unlink()
        (tmp_path / "late").rmdir()
        eventually(lambda: service.api("runs")["items"] == [])
        is_problem(service.get("/api/v1/runs/late"), 404)


# ---- Prometheus and health


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


def test_prometheus_labels_stay_bounded(tmp_path: Path) -> None:
    for number in range(55):
        with writer(tmp_path, f"run-{number:03d}") as store:
            store.metrics(1, figures(1))
            store.worker(f"w-{number}", role=f"role-{number}", status=f"status-{number}")
            store.status("finished")
    with dashboard(tmp_path) as service:
        for path in ("/api/v1/nope", *(f"/nope-{number}" for number in range(30))):
            service.get(path)
        text = service.get("/metrics").text
    assert "unmask_runs_without_series 5.0" in text and 'unmask_runs{status="finished"} 55.0' in text
    assert "role-" not in text and "status-" not in text and "nope" not in text
    assert 'role="other"' in text


def test_health(several: Dashboard) -> None:
    assert several.get("/healthz").json()["status"] == "ok"
    assert several.get("/readyz").json() == {"status": "ok", "runs": 4, "unreadable": 0}


# ---- PostgreSQL


@pytest.mark.slow
def test_one_server_for_many_runs_goes_and_comes_back(tmp_path: Path) -> None:
    server = Server()
    try:
        with server.database() as url:
            for name in ("one", "two"):
                with StoreWriter(url, name, task="sudoku", objective="agrpo", total_iterations=5) as store:
                    for iteration in range(1, 6):
                        store.metrics(iteration, figures(iteration))
                    store.event("info", "start", f"run {name} starts")
                    store.status("finished")
                    assert store.flush(30)
            with dashboard(tmp_path, "--store", url) as service:
                found = service.api("runs")
                assert sorted(run["id"] for run in found["items"]) == ["one", "two"] and found["folder"] == ""
                assert service.api("runs/two/metrics", name="loss")["series"]["loss"]["iteration"] == [1, 2, 3, 4, 5]
                assert service.api("runs/two/events")["items"][0]["text"] == "run two starts"
                is_problem(service.get("/api/v1/runs/three"), 404)
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
