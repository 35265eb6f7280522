"""Run folders that come from somebody else: whatever lies in them, the other runs are shown as ever."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from rewards.errors import StoreError
from services.store import rows, schema
from services.store.files import NotAFile, opened, require_sqlite_files
from services.store.reader import Reader
from tests.support.dashboards import Dashboard, dashboard, eventually, is_problem, write_run

ENDLESS = "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n)"
PAGES = ("", "/metrics?name=reward/mean", "/events", "/samples", "/samples/1", "/order-map", "/workers", "/ledger")

UNREADABLE = {
    "view": ["DROP TABLE runs", f"CREATE VIEW Runs AS {ENDLESS} SELECT x AS id FROM n"],
    "view-beside": [
        "ALTER TABLE latest_metrics RENAME TO old",
        f"CREATE VIEW latest_metrics AS {ENDLESS} SELECT old.* FROM old, n",
    ],
    "computed": ["ALTER TABLE runs ADD COLUMN x/**/AS/**/(hex(zeroblob(400000000)))"],
    "virtual": ["DROP TABLE truncations", "CREATE VIRTUAL TABLE truncations USING fts5(after)"],
    "trigger": [
        "CREATE TRIGGER t AFTER INSERT ON actions BEGIN INSERT INTO truncations (run_id, revision, after) "
        f"{ENDLESS} SELECT 'trigger', x, 0 FROM n; END"
    ],
    "version": [
        *("DROP TABLE schema_version", "CREATE TABLE schema_version (version)"),
        "INSERT INTO schema_version VALUES ('two')",
    ],
    "no-time": ["UPDATE runs SET created = 'long ago'"],
    "no-number": ["UPDATE latest_metrics SET value = NULL"],
    "no-kind": ["UPDATE latest_metrics SET nonfinite = 'none'"],
    "no-count": ["UPDATE workers SET restarts = 'many'"],
    "no-text": ["UPDATE runs SET task = CAST(x'ff' AS TEXT)"],
    "long-name": ["UPDATE runs SET id = hex(zeroblob(200))"],
    "long-host": ["UPDATE runs SET host = hex(zeroblob(1000000))"],
}
"""What was done to the store, by run."""

ODD = {
    "blob": ["UPDATE samples SET trajectory = zeroblob(70000000)"],
    "no-blob": ["UPDATE samples SET trajectory = 900000000000"],
    "no-value": ["UPDATE metrics SET value = 'high'", "UPDATE metric_buckets SET low = 'deep'"],
    "no-json": ["UPDATE events SET data = '{\"x\": NaN}'"],
    "deep-json": [f"UPDATE events SET data = '{'[' * 100_000}'"],
    "far-off": ["UPDATE runs SET created = 1e308, heartbeat = 9e999"],
    "huge-texts": ["UPDATE events SET text = hex(zeroblob(30000000))"],
}
"""Readable as far as the list goes."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("made")
    write_run(runs, "good", iterations=2)
    return runs / "good"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Iterator[Dashboard]:
    """Of a good run among foreign ones."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(good, runs / "good")
    for name, statements in (UNREADABLE | ODD).items():
        foreign(good, runs / name, *statements)
    for name, place in OF_FILES.items():
        place(foreign(good, runs / name, *LAST_SEEN))
    for name, content in LINES.items():
        foreign(good, runs / name, *LAST_SEEN)
        (runs / name / "metrics.jsonl").write_bytes(content)
    os.truncate(runs / "endless-line" / "metrics.jsonl", 2**40)
    with dashboard(runs) as service:
        yield service


def foreign(good: Path, folder: Path, *statements: str) -> Path:
    """A run's folder as the good one, with this done to its store."""
    folder.mkdir()
    shutil.copy(good / "store.sqlite", folder)
    with closing(sqlite3.connect(folder / "store.sqlite")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        for table in ("metrics", "latest_metrics", "metric_buckets", "events", "workers", "samples", "checkpoints"):
            connection.execute(f"UPDATE {table} SET run_id = ?", [folder.name])
        connection.execute("UPDATE runs SET id = ?", [folder.name])
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return folder


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in the place of a file."""

    def place(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return place


def link(path: Path) -> None:
    """To a file that is good."""
    target = path.parent.parent / "good" / "store.sqlite"
    path.symlink_to(target)


LAST_SEEN = ["UPDATE runs SET status = 'running', heartbeat = heartbeat - 40"]
"""A run that is alive and behind: its metrics.jsonl is looked into."""

OF_FILES = {
    "fifo": instead("store.sqlite", os.mkfifo),
    "link": instead("store.sqlite", link),
    "loop": instead("store.sqlite", lambda path: path.symlink_to(path.name)),
    "device": instead("store.sqlite", lambda path: path.symlink_to("/dev/zero")),
    "folder": instead("store.sqlite", Path.mkdir),
    "fifo-journal": instead("store.sqlite-journal", os.mkfifo),
    "link-wal": instead("store.sqlite-wal", link),
    "fifo-shm": instead("store.sqlite-shm", os.mkfifo),
    "fifo-lines": instead("metrics.jsonl", os.mkfifo),
    "link-lines": instead("metrics.jsonl", link),
    "device-lines": instead("metrics.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "folder-lines": instead("metrics.jsonl", Path.mkdir),
}

LINES = {
    "deep-line": b"{}\n" + b"[" * 100_000 + b"\n",
    "endless-line": b"x",
    "far-line": b'{"iteration": 1e999}\n',
    "huge-line": b'{"iteration": 1, "machine/store_lost_rows": 1' + b"0" * 400 + b"}\n",
    "list-line": b"[1, 2]\n",
    "no-line": bytes(range(256)) + b"\n",
}


@pytest.mark.slow
def test_the_good_run_is_shown_and_the_others_say_what_they_are(service: Dashboard) -> None:
    began = time.monotonic()
    found = {run["id"]: run for run in service.api("runs", limit=200)["items"]}
    told = service.get("/metrics")
    assert time.monotonic() - began < 15
    assert found["good"]["status"] == "finished"
    assert told.status_code == 200 and 'unmask_run_iteration{run="good"} 2.0' in told.text
    for path in PAGES:
        answer = service.client.get(f"/api/v1/runs/good{path}")
        assert answer.status_code in ((200, 409) if path in ("/samples/1", "/order-map") else (200,)), answer.text
    names = {*UNREADABLE, *OF_FILES}
    assert {name for name, run in found.items() if run["status"] == "unreadable"} == names
    for name in UNREADABLE:
        sentence = found[name]["unreadable"]
        assert sentence and "\n" not in sentence and len(sentence) < 400
    for name in OF_FILES:
        assert found[name]["unreadable"].endswith("is no regular file"), found[name]
    for name in ("view", "view-beside", "computed", "virtual", "trigger"):
        assert "was not made by Unmask" in found[name]["unreadable"]
    assert {*ODD, *LINES} <= {*found} - names
    assert all(found[name]["lost_rows"] == 0 for name in LINES)


@pytest.mark.parametrize("name", [*UNREADABLE, *OF_FILES, *ODD, *LINES])
def test_pages_of_a_foreign_run_answer(service: Dashboard, name: str) -> None:
    for path in PAGES:
        answer = service.client.get(f"/api/v1/runs/{name}{path}")
        if answer.status_code != 200:
            assert is_problem(answer, answer.status_code)["status"] in (404, 409, 503), answer.text
    if name in ("trigger", "view"):
        headers = {"Authorization": f"Bearer {service.token}"}
        is_problem(service.client.post(f"/api/v1/runs/{name}/actions", json={"action": "stop"}, headers=headers), 503)
    if name in ("blob", "no-blob"):
        reason = is_problem(service.get(f"/api/v1/runs/{name}/samples/1"), 409)["detail"]
        assert ("more than 64 MiB" if name == "blob" else "is no bytes") in reason


def test_it_ends_promptly(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "runs" / "good")
    foreign(good, tmp_path / "runs" / "view", *UNREADABLE["view"])
    OF_FILES["fifo-lines"](foreign(good, tmp_path / "runs" / "fifo-lines", *LAST_SEEN))
    with dashboard(tmp_path / "runs") as service:
        eventually(lambda: service.api("runs")["total"] == 3)
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(timeout=4)


# ---- the controls: without the protection each of these holds up whoever reads


def test_a_view_would_never_end(good: Path, tmp_path: Path) -> None:
    folder = foreign(good, tmp_path / "view", *UNREADABLE["view"])
    with closing(sqlite3.connect(folder / "store.sqlite")) as connection:
        looks = iter(range(20))
        connection.set_progress_handler(lambda: next(looks, None) is None, 100_000)
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            connection.execute("SELECT count(*) FROM runs").fetchall()


def test_a_pipe_would_be_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["cat", tmp_path / "pipe"], timeout=1)
    for follow in (False, True):
        with pytest.raises(NotAFile), opened(tmp_path / "pipe", follow=follow):
            pass


def test_only_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    for name, follow in (("file", False), ("link", True)):
        with opened(tmp_path / name, follow=follow) as descriptor:
            assert os.read(descriptor, 10) == b"text"
    for name in ("link", "."):
        with pytest.raises(NotAFile, match="no regular file"), opened(tmp_path / name):
            pass
    with pytest.raises(FileNotFoundError), opened(tmp_path / "nothing"):
        pass
    require_sqlite_files(tmp_path / "file")
    (tmp_path / "file-wal").symlink_to("file")
    with pytest.raises(NotAFile, match="file-wal is no regular file"):
        require_sqlite_files(tmp_path / "file")


def test_a_transaction_is_given_up(good: Path) -> None:
    url = schema.sqlite_url(good / "store.sqlite")
    query = sa.text(f"{ENDLESS} SELECT count(*) AS count FROM (SELECT x FROM n LIMIT 2000000)").columns(
        count=sa.Integer
    )
    limited = schema.open_engine(url, create=False, read_only=True, transaction_s=1e-6)
    with limited.connect() as connection, pytest.raises(sa.exc.OperationalError) as caught:
        connection.execute(query).all()
    assert schema.short_reason(caught.value) == "reading it takes too long, it was given up"
    with pytest.raises(StoreError, match="it was given up"):
        Reader(limited).select(query)  # type: ignore[arg-type]
    patient = schema.open_engine(url, create=False, read_only=True, transaction_s=600.0)
    with patient.connect() as connection:
        assert connection.execute(query).all() == [(2_000_000,)], "the control"
    for engine in (limited, patient):
        engine.dispose()


def test_answers_are_bounded(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = foreign(good, tmp_path / "texts", "UPDATE events SET text = hex(zeroblob(1000000))")
    reader = Reader(schema.open_engine(schema.sqlite_url(folder / "store.sqlite"), create=False, read_only=True))
    assert len(reader.events("texts")) == 2, "the control"
    monkeypatch.setattr(rows, "MAX_ANSWER_BYTES", 3_000_000)
    with pytest.raises(StoreError, match="no run writes that"):
        reader.events("texts")


def test_the_lock_of_a_live_store_is_not_lost(good: Path, tmp_path: Path) -> None:
    """Looking at a database's files must not open them: closing one would end this process's locks on it."""
    path = shutil.copy(good / "store.sqlite", tmp_path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = DELETE")
        writer.execute("BEGIN EXCLUSIVE")
        require_sqlite_files(Path(path))
        script = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('SELECT 1 FROM runs')"
        locked = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=30)
        assert "database is locked" in locked.stderr
