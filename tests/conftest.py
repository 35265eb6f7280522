"""Fixtures that several test files share."""

import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.runs.directory import RunDirectory
from rollout.process import prepare_process
from services.store.reader import Reader
from services.store.schema import sqlite_url
from services.store.writer import StoreWriter
from tests.support.browsers import chromium
from tests.support.dashboards import Place
from tests.support.databases import Server
from tests.support.real_runs import Runs
from tests.support.store_contents import reading

prepare_process()  # as a command does, and before a test loads torch
# Under nohup, or in a shell's background, they are ignored, and what tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

DATABASES = ("sqlite", "postgresql")


class FailuresAtOnce:
    """Names a test that fails when it does: pytest tells at the end, which a session that is cut off hasn't."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
            crash = getattr(report.longrepr, "reprcrash", None) or ""
            text = f"FAILED {report.nodeid} ({report.when}, {report.duration:.0f} s): {crash}"
            terminal.write_line("\n" + text[:1000])


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist, the process that gathers the reports
        config.pluginmanager.register(FailuresAtOnce(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the engine over vLLM run in its own environment only: `make test-vllm`."""
    if importlib.util.find_spec("vllm") is None:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("vllm")])
        items[:] = [item for item in items if not item.get_closest_marker("vllm")]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the data sets, which lies beside a checkout and never inside it."""
    path = Path(os.environ.get("UNMASK_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no data sets at {path}; set UNMASK_SHARED to the folder that holds data/")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small random LLaDA with its tokenizer (d 64, 2 layers)."""
    import torch

    from rollout.models.llada import LLaDAConfig, LLaDAModelLM
    from rollout.models.tokenizer import build_tokenizer

    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = build_tokenizer()
    config = LLaDAConfig(
        d_model=64,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=128,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LLaDAModelLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Cache of trained bases, the same for all processes of the test session."""
    own = tmp_path_factory.getbasetemp()
    return (own if worker_id == "master" else own.parent) / "bases"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> Runs:
    """Starts whole runs in one folder."""
    return Runs(tmp_path_factory.mktemp("runs"), bases)


@pytest.fixture(scope="session")
def undisturbed(runs: Runs) -> RunDirectory:
    """A synchronous run of six iterations on two actors that nothing happened to; read only. What it printed is in
    output.txt."""
    output = runs.train("undisturbed", "rollout.actors=2", forked=False)
    (runs["undisturbed"].path / "output.txt").write_text(output)
    return runs["undisturbed"]


@pytest.fixture(scope="module")  # playwright keeps an event loop going, which other modules' tests must not meet
def browser() -> Iterator[Any]:
    """A Chromium, or a skip."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A PostgreSQL server that nobody stops."""
    server = Server()
    yield server
    server.remove()


@pytest.fixture(params=DATABASES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a run store that isn't there yet, once of each kind."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "store.sqlite")
    else:
        with request.getfixturevalue("postgresql").database() as url:
            yield url


@pytest.fixture
def pair(store_url: str) -> Iterator[tuple[StoreWriter, Reader]]:
    """A run being written, and a reader of its store, once of each kind."""
    with StoreWriter(store_url, "r") as writer, reading(store_url) as reader:
        yield writer, reader


@pytest.fixture(params=DATABASES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place for runs, once of each kind: a folder, and a PostgreSQL database."""
    (tmp_path / "runs").mkdir()
    with _place(request, tmp_path / "runs") as place:
        yield place


@pytest.fixture(scope="module", params=DATABASES)
def shared_place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The same for all tests of a file."""
    with _place(request, tmp_path_factory.mktemp("runs")) as place:
        yield place


@contextlib.contextmanager
def _place(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield Place(folder)
    else:
        with request.getfixturevalue("postgresql").database() as url:
            yield Place(folder, url)
