"""A run whose completions are branched, killed, gives the numbers of one that nothing happened to; so do two actors."""

import os
import signal

import pytest

from rollout.adapters import digest, read_peft_folder
from tests.support.real_runs import Runs, rows, saved_iterations, summary, training_rows, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(900)]

METHODS = {
    "egspo": ("objective.type=egspo", "objective.k=2"),
    "dispo": ("objective.type=dispo", "objective.degree=1"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_branches_goes_on_bit_for_bit(runs: Runs, method: str) -> None:
    settings = (*METHODS[method], "learner.updates_per_batch=2", "checkpoint.every=2", "evaluation.every=0")
    runs.train(f"whole-{method}", *settings, "rollout.actors=2")
    whole, killed = runs[f"whole-{method}"], runs[f"killed-{method}"]
    with runs.started(f"killed-{method}", *settings) as run:
        run.wait_for_row(3)
        os.killpg(run.popen.pid, signal.SIGKILL)
        wait_until(lambda: not run.members(), "the end of all processes", 30)
    assert saved_iterations(killed)

    runs.train(f"killed-{method}", *settings, "resume=auto")
    assert rows(killed) == rows(whole)
    assert summary(killed) == summary(whole)
    assert digest(read_peft_folder(killed.adapter_dir)[0]) == digest(read_peft_folder(whole.adapter_dir)[0])
    for row in training_rows(killed):
        assert {"branches/reward", "branches/solve_rate", "branches/missing_share"} <= row.keys()
