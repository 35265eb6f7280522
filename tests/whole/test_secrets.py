"""No secret that lies in a run's environment comes into its files, its output, Ray's files or a command line."""

import base64
import contextlib
import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from services.store.writer import StoreWriter
from tests.support.judges import by_text, echoes, judge_server
from tests.support.real_runs import Runs, command_line, wait_until

NAMES = ("RAY_AUTH_TOKEN", "JUDGE_KEY", "WANDB_API_KEY", "PGPASSWORD", "UNMASK_DASHBOARD_TOKEN", "HF_TOKEN")
PLANTED = {name: hashlib.sha256(name.encode()).hexdigest() for name in (*NAMES, "in RAY_AUTH_TOKEN_PATH's file")}
"""The value of each variable, and what a file holds."""

SHOWN = 12
"""So many characters of a secret's beginning or end give it away: some logs shorten what they show."""

Text = tuple[str, bytes]
"""Where it stands, and what."""


def marks(secret: str) -> list[bytes]:
    """What in a text shows the secret: a part of it, or its middle in base64, wherever in a longer text it began."""
    plain = secret.encode()
    coded = [base64.b64encode(bytes(shift) + plain)[4:-4] for shift in range(3)]
    return [plain[:SHOWN], plain[-SHOWN:], *(each[8 : 8 + 2 * SHOWN] for each in coded)]


def leaks(secrets: Mapping[str, str], texts: Iterable[Text]) -> list[str]:
    """Which secret stands where."""
    looked_for = {name: marks(secret) for name, secret in secrets.items()}
    return [
        f"{name} in {place}"
        for place, text in texts
        for name, shown in looked_for.items()
        if any(mark in text for mark in shown)
    ]


def texts_below(folder: Path) -> Iterator[Text]:
    """Every file as it lies there. Of SQLite's also each value, which its pages may cut in two."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield str(path), data
            if data.startswith(b"SQLite format 3\0"):
                yield from values(path)


def values(path: Path) -> Iterator[Text]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for row in database.execute(f'SELECT * FROM "{table}"'):
                for value in row:
                    yield f"{path}, table {table}", value if isinstance(value, bytes) else str(value).encode()


def keep(session: Path, kept: Path) -> None:
    """Hard links to all files there, which Ray writes on and which go with the run."""
    with contextlib.suppress(FileNotFoundError):  # it goes just now
        for path in session.rglob("*"):
            link = kept / str(path.relative_to(session)).replace("/", "|")
            if path.is_file() and not path.is_symlink() and not link.exists():
                os.link(path, link)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="um-", dir="/tmp") as folder:
        for name in ("ray", "kept"):
            (Path(folder) / name).mkdir()
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_run_keeps_what_its_environment_holds_to_itself(runs: Runs, short_folder: Path) -> None:
    """Now and then the judge says its key back in an error, which drops a group and is told."""
    secrets, lines, kept = dict(PLANTED), set[str](), short_folder / "kept"
    token = short_folder / "token"
    token.write_text(PLANTED["in RAY_AUTH_TOKEN_PATH's file"])
    environment = {name: PLANTED[name] for name in NAMES} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(short_folder / "ray"),
    }
    with judge_server() as server:
        scores = by_text("12345")
        server.usual = scores
        server.faults = [*11 * [scores], echoes(400)] * 6
        judge = (f"task.judge.url={server.url}", "task.judge.model=tiny", "task.judge.rubric=It has many ones.")
        more = ("task.judge.key_variable=JUDGE_KEY", "task.judge.timeout_s=20", "rollout.grade_timeout_s=30")
        arguments = (*judge, *more, "run.iterations=2", "evaluation.problems=4")
        with runs.started("secretive", *arguments, forked=False, **environment) as run:

            def over() -> bool:
                keep(short_folder / "ray", kept)
                for pid in run.members():
                    lines.add(command_line(pid))
                    if "gcs_server" in command_line(pid):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            secrets["the token of its Ray"] = psutil.Process(pid).environ()["RAY_AUTH_TOKEN"]
                return run.popen.poll() is not None

            process = psutil.Process(run.popen.pid)
            wait_until(lambda: NAMES[0] in process.environ(), "the command, in the place of what started it", 60)
            held = process.environ()
            assert all(held[name] == secret for name, secret in environment.items()), "it had them"
            wait_until(over, "the end of the run", 600)
            assert run.wait() == 0, run.output()
    assert all(headers["Authorization"] == f"Bearer {PLANTED['JUDGE_KEY']}" for headers in server.headers)
    assert len(set(secrets.values())) == len(PLANTED) + 1, "its Ray has a token of its own"

    def texts() -> list[Text]:
        told = [("its output", run.output().encode()), ("a command line", "\n".join(lines).encode())]
        return [*told, *(text for folder in (run.dir.path, kept, runs.cache) for text in texts_below(folder))]

    found = texts()
    assert leaks(secrets, found) == []
    assert any(b"repeats the key" in text for _, text in found), "the judge's error was told"
    files = {Path(place).name.rpartition("|")[2] for place, _ in found}
    ours = {"config.json", "starts.jsonl", "metrics.jsonl", "summary.json", "state.json", "adapter_config.json"}
    assert {*ours, "store.sqlite", "completions.jsonl"} <= files, "the run's files were searched"
    assert {"raylet.out", "gcs_server.out"} <= files and any(name.startswith("worker-") for name in files), files
    assert any("ray::RolloutActor" in line for line in lines)

    with StoreWriter(run.dir.store_url, run.dir.id, identity=run.dir.identity) as writer:
        writer.event("info", "planted", f"the key is {secrets['JUDGE_KEY'][:SHOWN]}...")
    for path, name in ((run.dir.config_path, "PGPASSWORD"), (next(kept.glob("*raylet.out")), "the token of its Ray")):
        path.write_text(path.read_text() + secrets[name])
    seen = leaks(secrets, texts())
    for name, place in (("JUDGE_KEY", "events"), ("PGPASSWORD", "config.json"), ("the token of its Ray", "raylet.out")):
        assert [each for each in seen if each.startswith(f"{name} in ") and each.endswith(place)], "the control"


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    """The control, in each place: a text, bytes, base64 in a header, a store; and nothing where there is nothing."""
    (tmp_path / "checkpoints" / "deep").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    with StoreWriter(f"sqlite:///{tmp_path / 'store.sqlite'}", "r") as writer:
        writer.event("info", "nothing", "to see")
    assert leaks(PLANTED, texts_below(tmp_path)) == []
    ways = dict(zip(NAMES, ("state.json", "tensor", "header", "short", "text of the store", "json"), strict=True))
    secret = dict(PLANTED)
    (tmp_path / "checkpoints" / "deep" / "state.json").write_text(f'{{"token": "{secret[NAMES[0]]}"}}')
    (tmp_path / "tensor").write_bytes(b"\xff\x00" + secret[NAMES[1]].encode() + b"\x80")
    for shift in range(3):
        coded = base64.b64encode(b"u" * shift + f"user:{secret[NAMES[2]]}".encode())
        (tmp_path / "header").write_bytes(b"Basic " + coded)
        assert f"{NAMES[2]} in {tmp_path / 'header'}" in leaks(secret, texts_below(tmp_path))
    (tmp_path / "short").write_text(f"{secret[NAMES[3]][:SHOWN]}...")
    with StoreWriter(f"sqlite:///{tmp_path / 'store.sqlite'}", "r") as writer:
        for lead in range(4000, 4200, 10):  # wherever a page ends
            writer.event("info", "told", "x" * lead + secret[NAMES[4]][-SHOWN:])
    (tmp_path / "json").write_text(f"...{secret[NAMES[5]][-SHOWN:]}")
    found = leaks(secret, texts_below(tmp_path))
    for name, way in ways.items():
        assert [each for each in found if each.startswith(f"{name} in ")], way
    in_the_store = [each for each in found if each.endswith("table events")]
    assert len(in_the_store) == 20, "each value is looked at whole"
