"""Stores with broken bytes, by a disk or by somebody: their runs say so, nothing else comes of it."""

import logging
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rewards.errors import StoreError
from services.dashboard import guards
from services.dashboard.app import create_app
from services.dashboard.rate import Rate
from services.dashboard.settings import Settings
from services.store import schema
from services.store.reader import Reader
from tests.services.test_foreign_stores import PAGES, foreign
from tests.support.dashboards import Dashboard, dashboard, is_problem, write_run

NO_WORDS = "no-words"
"""SQLite's own sentence about this one is no text: it quotes the file."""
BROKEN = [f"broken-{number}" for number in range(24)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("made")
    write_run(runs, "good", iterations=3)
    return runs / "good"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Iterator[Dashboard]:
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(good, runs / "good")
    without_words(foreign(good, runs / NO_WORDS))
    for number, name in enumerate(BROKEN):
        broken(foreign(good, runs / name), number)
    with dashboard(runs) as service:
        yield service


def without_words(folder: Path) -> Path:
    path = folder / "store.sqlite"
    path.write_bytes(path.read_bytes().replace(b"tableworkers", b"tablew\xeb\xff\xc3ers"))
    return path


def broken(folder: Path, number: int) -> None:
    """Single bits, single bytes or pieces, a few or many, sparing the first page in two of three."""
    draw = random.Random(number)
    path = folder / "store.sqlite"
    data = bytearray(path.read_bytes())
    for _ in range((1, 10, 100, 500)[number % 4]):
        place = draw.randrange(4096 if number % 3 else 0, len(data) - 64)
        piece = draw.randbytes((1, 1, 40)[number % 3])
        data[place : place + len(piece)] = piece
    path.write_bytes(data)


@pytest.mark.slow
def test_pages_of_a_damaged_run_answer(service: Dashboard) -> None:
    found = {run["id"]: run for run in service.api("runs", limit=200)["items"]}
    assert found["good"]["status"] == "finished"
    assert found[NO_WORDS]["unreadable"].endswith("its file is damaged")
    statuses = set()
    for name in (NO_WORDS, *found):
        for path in (*PAGES, "/checkpoints", "/actions"):
            answer = service.client.get(f"/api/v1/runs/{name}{path}")
            statuses.add(answer.status_code)
            if answer.status_code != 200:
                assert is_problem(answer, answer.status_code)["status"] in (404, 409, 503), answer.text
    is_problem(service.client.get(f"/api/v1/runs/{NO_WORDS}"), 503)
    headers = {"Authorization": f"Bearer {service.token}"}
    asked = service.client.post(f"/api/v1/runs/{NO_WORDS}/actions", json={"action": "stop"}, headers=headers)
    is_problem(asked, 503)
    assert {200, 503} <= statuses
    assert service.get("/metrics").status_code == service.get("/readyz").status_code == 200
    assert "Traceback" not in service.log() and len(service.log()) < 20_000


def test_sqlites_words_are_no_text(good: Path, tmp_path: Path) -> None:
    """The control: what reading it raises."""
    path = without_words(foreign(good, tmp_path / NO_WORDS))
    with closing(sqlite3.connect(path)) as connection, pytest.raises(UnicodeDecodeError):
        connection.execute("SELECT * FROM runs")
    with pytest.raises(StoreError, match="its file is damaged"):
        schema.open_engine(schema.sqlite_url(path), create=False, read_only=True)


def test_an_index_that_leads_to_other_rows(good: Path, tmp_path: Path) -> None:
    """SQLite believes its index; the row there has another name."""
    path = foreign(good, tmp_path / "index") / "store.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("CREATE TABLE other AS SELECT * FROM latest_metrics")
        connection.execute("UPDATE other SET run_id = 'another'")
        connection.commit()
        [(root,)] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'other'")
        connection.execute("UPDATE sqlite_master SET rootpage = ? WHERE name = 'latest_metrics'", [root])
        connection.commit()
    reader = Reader(schema.open_engine(schema.sqlite_url(path), create=False, read_only=True))
    with pytest.raises(StoreError, match="what it was not asked for|cannot read"):
        reader.latest_metrics("index")


def test_a_fault_fills_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "_faults", Rate(burst=10, every_s=600.0))
    app = create_app(Settings(runs_dir=tmp_path))

    @app.get("/fault")
    def fault() -> None:
        raise ZeroDivisionError

    with TestClient(app, base_url="http://127.0.0.1") as client, caplog.at_level(logging.ERROR):
        for _ in range(50):
            assert client.get("/fault").status_code == 500
    assert sum(record.exc_info is not None for record in caplog.records) == 10
    assert app.state.answers["GET", "/fault", 500] == 50, "all are counted"
