"""Whole comparisons: a method that fails doesn't stop the others, and one that is killed and started again finds the
same."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.comparison.drive import RESULTS, TABLE
from learner.comparison.plot import PLOT
from learner.runs.directory import RunDirectory
from tests.support.real_runs import clean_environment, kill_session, saved_iterations, send, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2600)]

LIMIT_S = 1200.0
"""A free machine needs two minutes."""
# The learning rate of the second method is beyond float32, so that its weights are after one update.
PLAN = """
recipe: smoke
settings: [rollout.actors=1, learner.max_nonfinite=1]
methods:
  agrpo:
  broken: {settings: [objective.type=wd1], grid: {learner.lr: [1.0e+38]}}
learning_rates: [1.0e-3]
budget: 2000
seeds: [0]
tuning_seeds: [100]
problems: 8
curve_points: 2
gradient_batches: 4
statistics: {resamples: 500}
"""
TUNED, REPORTED, BROKEN = "agrpo-lr0.001-s100", "agrpo-lr0.001-s0", "broken-lr1e_38-s100"


@contextlib.contextmanager
def started(folder: Path, bases: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A comparison under way, in ``folder``; with the block, whatever is left of it ends."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.yaml").write_text(PLAN)
    command = [sys.executable, "-m", "learner.compare", "plan=plan.yaml", "out=out", "--parallel", "1"]
    with (folder / "output.txt").open("ab") as output:
        popen = subprocess.Popen(
            command,
            cwd=folder,
            env=clean_environment() | {"UNMASK_CACHE": str(bases)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield popen
        finally:
            kill_session(popen.pid)
            for run in (folder / "out").glob("*/run.lock"):
                kill_run(run)
            popen.wait(timeout=60)


def kill_run(lock: Path) -> None:
    """The session of the run that holds this lock, if one does."""
    with contextlib.suppress(ValueError, KeyError):
        kill_session(json.loads(lock.read_text())["pid"])


def findings(folder: Path) -> dict[str, Any]:
    """results.json without what depends on the machine."""
    report = json.loads((folder / "out" / RESULTS).read_text())
    del report["machine"]
    return report


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    with started(folder, bases) as comparison:
        assert comparison.wait(LIMIT_S) == 1, (folder / "output.txt").read_text()
    return folder


@pytest.mark.heavy
def test_a_run_that_fails_is_reported_and_the_others_are_run(undisturbed: Path) -> None:
    report = findings(undisturbed)
    assert report["complete"]
    assert report["methods"]["broken"]["point"] is None and list(report["methods"]["broken"]["failed"]) == [BROKEN]
    assert report["cells"][BROKEN]["failed"] == report["methods"]["broken"]["failed"][BROKEN] != ""
    agrpo = report["methods"]["agrpo"]
    assert agrpo["seeds"] == [0] and agrpo["failed"] == {}
    assert 0 < agrpo["spent"] <= 1.1 * 2000
    noise = agrpo["gradient_noise"]
    assert (
        noise["batches"] == 4
        and noise["noise"] > 0
        and "| noise / signal |" in (undisturbed / "out" / TABLE).read_text()
    )
    assert report["methods"]["broken"]["gradient_noise"] is None, "its settings are not known"
    assert report["cells"][REPORTED]["iterations"] == report["cells"][REPORTED]["curve"]["iteration"][-1]
    assert f"- `{BROKEN}`: " in (undisturbed / "out" / TABLE).read_text()
    assert (undisturbed / "out" / PLOT).stat().st_size > 10_000


@pytest.mark.heavy
def test_killed_in_the_middle_of_a_run_it_goes_on_and_finds_the_same(
    undisturbed: Path, tmp_path: Path, bases: Path
) -> None:
    folder = tmp_path / "killed"
    run = RunDirectory(folder / "out" / REPORTED)
    with started(folder, bases) as comparison:
        wait_until(lambda: bool(saved_iterations(run)) or comparison.poll() is not None, "a checkpoint", LIMIT_S)
        assert comparison.poll() is None, (folder / "output.txt").read_text()
        send(signal.SIGKILL, [comparison.pid])
        kill_run(run.path / "run.lock")
    assert not (folder / "out" / "cells" / f"{REPORTED}.json").exists(), "it was over before it was killed"
    with started(folder, bases) as comparison:
        assert comparison.wait(LIMIT_S) == 1, (folder / "output.txt").read_text()
    assert findings(folder) == findings(undisturbed)
    assert "goes on after iteration" in (folder / "out" / "logs" / f"{REPORTED}.log").read_text()


@pytest.mark.heavy
def test_a_comparison_that_is_over_is_only_reported_again(undisturbed: Path, bases: Path) -> None:
    """But for what failed, which is tried again."""
    before = findings(undisturbed), (undisturbed / "out" / "logs" / f"{REPORTED}.log").stat().st_mtime_ns
    with started(undisturbed, bases) as comparison:
        assert comparison.wait(LIMIT_S) == 1
    assert (findings(undisturbed), (undisturbed / "out" / "logs" / f"{REPORTED}.log").stat().st_mtime_ns) == before


def test_asked_to_stop_it_stops_its_runs_and_says_how_to_go_on(tmp_path: Path, bases: Path) -> None:
    folder = tmp_path / "stopped"
    with started(folder, bases) as comparison:
        lock = folder / "out" / TUNED / "run.lock"
        wait_until(lambda: lock.exists() and b"pid" in lock.read_bytes(), "a run", LIMIT_S)
        send(signal.SIGTERM, [comparison.pid])
        assert comparison.wait(180) == 128 + signal.SIGTERM, (folder / "output.txt").read_text()
        assert lock.read_bytes() == b"", "the run has let go of its folder"
    assert "the same command goes on" in (folder / "output.txt").read_text()
