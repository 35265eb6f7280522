"""A run of a user who may write its own folders only: home, caches, the environment's built op are somebody else's."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.runs.directory import RunDirectory
from tests.support.real_runs import RUN_LIMIT_S, Runs, clean_environment, iterations

AS_A_USER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.getuid() == 0 else ()
"""What takes from root the right to write what its mode forbids."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(AS_A_USER) and shutil.which("setpriv") is None, reason="root without setpriv writes all"),
]


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that name folders which can't be written."""
    found = {"HOME": tmp_path / "home", "HF_HOME": tmp_path / "hf", "MPLCONFIGDIR": tmp_path / "matplotlib"}
    for folder in found.values():
        folder.mkdir(mode=0o555)
    yield {name: str(folder) for name, folder in found.items()}


def train(run: RunDirectory, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    first = ["recipe=smoke", "run.iterations=1", "rollout.actors=1", f"run.dir={run.path.parent}", f"run.name={run.id}"]
    command = [*AS_A_USER, sys.executable, "-m", "learner.main", *first, *settings]
    environment = clean_environment() | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_LIMIT_S)


def test_the_folders_can_t_be_written(folders: dict[str, str]) -> None:
    """The control."""
    for folder in folders.values():
        done = subprocess.run([*AS_A_USER, "touch", f"{folder}/x"], capture_output=True, text=True, timeout=30)
        assert done.returncode != 0 and "denied" in done.stderr


@pytest.mark.heavy
def test_a_run_needs_no_folder_but_its_own_once_its_base_is_built(
    runs: Runs, tmp_path: Path, folders: dict[str, str]
) -> None:
    cache, run = tmp_path / "cache", RunDirectory(tmp_path / "runs" / "a")
    cache.mkdir(mode=0o555)
    environment = folders | {"UNMASK_CACHE": str(cache)}
    done = train(run, **environment)
    (told,) = done.stderr.splitlines()
    assert done.returncode == 1 and told.startswith(f"error: cannot write {cache}/sudoku-")
    assert "Permission denied" in told and "UNMASK_CACHE" in told

    cache.chmod(0o755)
    command = [sys.executable, "-m", "learner.small_base.base_model", "recipe=smoke"]
    subprocess.run(command, env=clean_environment() | environment, check=True, timeout=RUN_LIMIT_S)
    cache.chmod(0o555)
    done = train(run, **environment)
    assert done.returncode == 0, done.stderr
    assert iterations(run) == [1]


@pytest.mark.heavy
def test_an_op_that_is_built_where_nothing_can_be_written_is_refused(
    tiny_model: str, tmp_path: Path, folders: dict[str, str]
) -> None:
    extensions = tmp_path / "extensions"
    extensions.mkdir(mode=0o555)
    done = train(
        RunDirectory(tmp_path / "runs" / "b"),
        f"model.path={tiny_model}",
        TORCH_EXTENSIONS_DIR=str(extensions),
        **folders,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: DeepSpeed's op can't be kept in {extensions} (Permission")
