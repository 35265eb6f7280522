"""A user's task in a module beside where the command is started: nothing of ours is touched, nothing is set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.infill import SEPARATOR
from services.dashboard.playback import playback
from services.store import schema
from services.store.reader import Reader
from tests.support import gapped
from tests.support.real_runs import Runs, clean_environment, iterations

TASK = """
from helper_beside_it import LENGTH
from rewards.task import Grade, Problem, Task

class Words(Task):
    name = "words"
    components = ("length",)
    def problems(self, split, *, seed, size, path=None):
        return [Problem(f"{split}-{n}", {"n": n, "split": split}) for n in range(size)]
    def messages(self, fields):
        return [{"role": "user", "content": f"Puzzle: {fields['n']}"}]
    def validate_fields(self, fields):
        pass
    def grade(self, fields, completion):
        return Grade(len(completion) > LENGTH, {"length": float(len(completion))})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "words_of_mine.py").write_text(TASK)
    (tmp_path / "helper_beside_it.py").write_text("LENGTH = 3\n")
    return tmp_path


def test_grading_finds_it_in_the_working_directory(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    command = [sys.executable, "-m", "rewards.grade", "--task", "words_of_mine:Words"]
    lines = "".join(json.dumps({"id": text, "n": 1, "completion": text}) + "\n" for text in ("ab", "abcd")).encode()
    done = subprocess.run(command, input=lines, cwd=folder, env=clean_environment(), capture_output=True, timeout=60)
    assert [json.loads(line)["correct"] for line in done.stdout.splitlines()] == [False, True], done.stderr
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, input=lines, cwd=elsewhere, env=clean_environment(), capture_output=True, timeout=60)
    assert done.returncode == 2 and b"No module named 'words_of_mine'" in done.stderr, "it is found by its folder alone"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_finds_it_in_the_working_directory(folder: Path, tiny_model: str) -> None:
    runs = Runs(folder, folder / "cache")
    runs.train("own", "task.name=words_of_mine:Words", f"model.path={tiny_model}", "run.iterations=2")
    assert iterations(runs["own"]) == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.heavy
def test_a_run_fills_gaps(tmp_path: Path, tiny_model: str) -> None:
    """With its playback."""
    (tmp_path / "gapped.py").write_text(Path(gapped.__file__).read_text())
    runs = Runs(tmp_path, tmp_path / "cache")
    settings = [
        "rollout.sampler.block_length=12",
        "rollout.sampler.steps=4",
        "task.name=gapped:Gapped",
        f"model.path={tiny_model}",
    ]
    runs.train("gaps", *settings, "run.iterations=2", "rollout.sampler.completion_length=12")
    assert iterations(runs["gaps"]) == [1, 2]
    store = runs["gaps"].store_url
    reader = Reader(schema.open_engine(store, create=False))
    (kept,) = [reader.sample("gaps", sample["id"]) for sample in reader.samples("gaps", kind="train", limit=1).rows]
    assert kept is not None and " … " in kept["prompt"] and SEPARATOR in kept["completion"]
    shown = playback(kept)
    first = len(shown.cells.text) - 3
    assert first in (4, 6) and [piece.before for piece in shown.context] == [0, first, first + 3]
    assert all(token.position < first + 3 for view in shown.scored for token in view.tokens)
