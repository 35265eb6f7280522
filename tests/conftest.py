"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.rundir import RunDirectory
from tests.databases import Server
from tests.real_runs import Runs


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded reference cases and data sets, which lies beside a checkout and never inside it."""
    path = Path(os.environ.get("UNMASK_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"no recorded cases at {path}; set UNMASK_SHARED to the folder that holds golden/ and data/")
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
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Starts whole runs, which share a folder and a cache of bases."""
    return Runs(tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def undisturbed(runs: Runs) -> RunDirectory:
    """A synchronous run of six iterations that nothing happened to; read only. What it printed is in output.txt."""
    output = runs.train("undisturbed")
    (runs["undisturbed"].path / "output.txt").write_text(output)
    return runs["undisturbed"]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A PostgreSQL server that nobody stops."""
    server = Server()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a run store that isn't there yet, once of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.sqlite'}"
    else:
        with request.getfixturevalue("postgresql").database() as url:
            yield url
