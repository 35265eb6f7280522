"""A run of a method that has more to save or to draw than weights and completions (branches, heads, an order of its
own), killed, gives the numbers of one that nothing happened to; so do two actors."""

import os
import signal

import pytest

from rollout.adapters import digest, read_peft_folder
from tests.support.real_runs import Runs, rows, saved_iterations, summary, training_rows, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(900)]

BRANCHES = {"branches/reward", "branches/solve_rate", "branches/missing_share"}
METHODS = {
    "egspo": (("objective.type=egspo", "objective.k=2"), BRANCHES),
    "dispo": (("objective.type=dispo", "objective.degree=1"), BRANCHES),
    "agrpo_fills": (("objective.type=agrpo_fills", "objective.fills=2"), BRANCHES),
    "trafl": (("objective.type=trafl", "objective.head_lr=0.02"), {"normaliser"}),
    "trace_rl_values": (
        ("objective.type=trace_rl", "objective.value_lr=0.02", "objective.value_lambda=0.5"),
        {"value", "value/error"},
    ),
    "just_grpo": (
        ("objective.type=just_grpo", "rollout.sampler.position_rule=left_to_right", "rollout.sampler.steps=24"),
        {"ratio/mean"},
    ),
}
"""The settings of each, and what its rows tell of it."""


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_the_method_goes_on_bit_for_bit(runs: Runs, method: str) -> None:
    settings, told = METHODS[method]
    settings = (*settings, "learner.updates_per_batch=2", "checkpoint.every=2", "evaluation.every=0")
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
        assert told <= row.keys()
