"""A run whose completions draw thresholds by a learned law, killed, gives the numbers of one that nothing happened to,
the law that its actors draw by among them; so do two actors."""

import os
import signal

import pytest

from rollout.adapters import digest, head_tensors, read_peft_folder, unpack
from tests.support.real_runs import Runs, rows, saved_iterations, summary, training_rows, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(900)]

SETTINGS = (
    *("objective.type=diffpo", "objective.threshold_lr=0.05", "rollout.sampler.threshold=[0.2,0.5,0.9]"),
    *("reward.speed_weight=0.2", "learner.updates_per_batch=2", "checkpoint.every=2", "evaluation.every=0"),
)


def test_a_run_with_learned_thresholds_goes_on_bit_for_bit(runs: Runs) -> None:
    runs.train("thresholds-whole", *SETTINGS, "rollout.actors=2")
    whole, killed = runs["thresholds-whole"], runs["thresholds-killed"]
    with runs.started("thresholds-killed", *SETTINGS) as run:
        run.wait_for_row(3)
        os.killpg(run.popen.pid, signal.SIGKILL)
        wait_until(lambda: not run.members(), "the end of all processes", 30)
    assert saved_iterations(killed)

    runs.train("thresholds-killed", *SETTINGS, "resume=auto")
    assert rows(killed) == rows(whole)
    assert summary(killed) == summary(whole)
    ours, theirs = (read_peft_folder(run.adapter_dir)[0] for run in (killed, whole))
    assert digest(ours) == digest(theirs)
    assert unpack(head_tensors(ours)["prompt_head.3.weight"]).any(), "the law was learned"
    for row in training_rows(killed):
        assert {"threshold", "threshold/ratio/mean", "reward/speed"} <= row.keys()
    assert all("threshold" in summary(killed)[name]["greedy"] for name in ("base", "trained"))
