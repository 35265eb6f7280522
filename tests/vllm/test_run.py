"""A whole run whose actors hold vLLM: it learns, the death of one of them costs a lease and nothing else, and its
figures are those of a run through the embedded engine."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from learner.runs.directory import RunDirectory
from tests.support.metrics_rows import deterministic
from tests.support.real_runs import Runs, iterations, training_rows, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(1800)]

SETTINGS = (
    *("recipe=sudoku", "run.iterations=18", "evaluation.every=0", "rollout.actors=1", "rollout.engine=vllm"),
    *("model.base.n_heads=4", "model.base.d_model=128"),  # vLLM's attention on the CPU takes no heads narrower than 32
)
GAIN = 0.1
"""Absolute rise of the greedy solve rate. They brought 0.23 when this was written."""


def test_a_run_learns_and_goes_on_when_its_actor_is_killed(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tmp_path / "cache", settings=SETTINGS)
    with runs.started("learns") as run:
        wait_until(lambda: 3 in iterations(run.dir) or run.popen.poll() is not None, "the third iteration", 900.0)
        (victim,) = run.actors()
        os.kill(victim, signal.SIGKILL)
        assert run.wait(1500) == 0, run.output()
        wait_until(lambda: not run.working(), "the end of all that the run started", 60.0)
    rows = training_rows(runs["learns"])
    assert [row["iteration"] for row in rows] == list(range(1, 19))
    last = rows[-1]
    assert last["machine/ledger_failed"] == last["machine/ledger_relet"] == 1, "the kill came between two leases"
    assert last["ledger/dropped"] == 0 and last["ledger/consumed"] == last["ledger/issued"]
    summary = json.loads(runs["learns"].summary_path.read_text())
    base, trained = summary["base"]["greedy"], summary["trained"]["greedy"]
    assert trained["m"] - base["m"] >= GAIN
    runs.train("embedded", "rollout.engine=torch", "run.iterations=3")
    for ours, theirs in zip(rows_of(runs["embedded"]), rows_of(runs["learns"]), strict=False):
        differing = {key for key in ours if ours[key] != pytest.approx(theirs[key], rel=1e-3, abs=1e-5, nan_ok=True)}
        # How far apart actor and learner compute a log-prob: 1e-6 and 2e-5.
        assert {key for key in differing if not key.startswith("log_ratio/")} == set(), differing


def rows_of(run_dir: RunDirectory) -> list[dict[str, Any]]:
    """Without times and machine figures."""
    return [deterministic(row) for row in training_rows(run_dir)]
