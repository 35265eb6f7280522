"""A run that learns in phases, killed in the middle of one, gives the numbers of one that nothing happened to."""

import os
import signal

import pytest

from rollout.adapters import digest, read_peft_folder
from tests.support.real_runs import Runs, rows, saved_iterations, summary, training_rows, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(900)]

PHASES = ("objective.type=dtm", "objective.phase_iterations=3", "objective.buffer_prompts=6", "objective.ema=0.5")
PHASES += ("objective.completions=16", "learner.updates_per_batch=2", "rollout.prompts_per_iteration=2")
PHASES += ("rollout.groups_per_lease=2", "evaluation.every=0", "checkpoint.every=2")


def test_a_run_killed_in_a_phase_goes_on_bit_for_bit(runs: Runs) -> None:
    output = runs.train("whole-dtm", *PHASES)
    assert "trained" in output
    whole, killed = runs["whole-dtm"], runs["killed-dtm"]
    with runs.started("killed-dtm", *PHASES) as run:
        run.wait_for_row(5)
        os.killpg(run.popen.pid, signal.SIGKILL)
        wait_until(lambda: not run.members(), "the end of all processes", 30)
    saved = saved_iterations(killed)
    assert saved and saved[-1] in (2, 4), "both are in the middle of a phase"
    held = killed.checkpoints_dir / f"iteration-{saved[-1]:06d}"
    buffer = sorted(path.name for path in (held / "buffer").iterdir())
    assert len(buffer) == 6 and (held / "phase-teacher.safetensors").exists()

    runs.train("killed-dtm", *PHASES, "resume=auto")
    assert rows(killed) == rows(whole)
    assert summary(killed) == summary(whole)
    assert digest(read_peft_folder(killed.adapter_dir)[0]) == digest(read_peft_folder(whole.adapter_dir)[0])
    consumed = [int(row["ledger/consumed"]) for row in training_rows(killed)]
    assert consumed == [6, 8, 10, 16, 18, 20], "a whole buffer when a phase begins, then two groups an iteration"
