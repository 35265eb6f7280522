"""Ray's own processes die under a run: it says so within seconds, what it learned is saved, and it can be resumed."""

import signal
import subprocess
import sys
import time

import pytest

from learner.runs.directory import RunDirectory
from tests.support.real_runs import (
    Runs,
    StartedRun,
    assert_ledger_balances,
    command_line,
    iterations,
    rows,
    saved_iterations,
    send,
    store_events,
    store_status,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(600)]

AT_ONCE_S, SILENT_S = 15.0, 45.0
"""Ray itself takes a minute, or says nothing."""


def core_process(run: StartedRun, name: str) -> int:
    (pid,) = [pid for pid in run.members() if name in command_line(pid).split(" ")[0]]
    return pid


@pytest.mark.parametrize(("process", "called"), [("gcs_server", "Ray's GCS"), ("raylet/raylet", "Ray's raylet")])
def test_a_dead_ray_ends_the_run_at_once_with_all_that_it_learned(
    runs: Runs, undisturbed: RunDirectory, process: str, called: str
) -> None:
    name = f"without-{process.partition('/')[0].replace('_', '-')}"
    with runs.started(name, "checkpoint.every=100") as run:
        run.wait_for_row(3)
        send(signal.SIGKILL, [core_process(run, process)])
        assert ended_after(run) < AT_ONCE_S
    assert called in run.output() and "has died" in run.output() and "Traceback" not in run.output()
    assert saved_iterations(runs[name]) == [iterations(runs[name])[-1]]
    assert store_status(runs[name]) == ("failed", 1)
    (fault,) = [event for event in store_events(runs[name]) if event["kind"] == "fault"]
    assert (fault["data"]["part"], fault["data"]["cause"]) == ("ray", "died")
    runs.train(name, "resume=auto")
    assert rows(runs[name]) == rows(undisturbed)
    assert_ledger_balances(runs[name])


@pytest.mark.parametrize(("process", "called"), [("gcs_server", "Ray's GCS"), ("raylet/raylet", "Ray's raylet")])
def test_a_ray_that_hangs_does_too(runs: Runs, process: str, called: str) -> None:
    name = f"hanging-{process.partition('/')[0].replace('_', '-')}"
    with runs.started(name, "checkpoint.every=10000", "run.iterations=5000", "evaluation.every=0") as run:
        run.wait_for_row(3)
        send(signal.SIGSTOP, [core_process(run, process)])
        assert ended_after(run) < SILENT_S
    assert f"{called} at" in run.output() and "doesn't answer any more" in run.output()
    assert "Traceback" not in run.output()
    assert saved_iterations(run.dir) == [iterations(run.dir)[-1]] and store_status(run.dir) == ("failed", 1)
    (fault,) = [event for event in store_events(run.dir) if event["kind"] == "fault"]
    assert (fault["data"]["part"], fault["data"]["cause"]) == ("ray", "hung") and fault["data"]["silent_s"] >= 15


def ended_after(run: StartedRun) -> float:
    """Seconds until it ended, with status 1."""
    began = time.monotonic()
    assert run.wait() == 1, run.output()
    print(f"{run.dir.id}: ended after {time.monotonic() - began:.1f} s")
    return time.monotonic() - began


@pytest.mark.parametrize("status", [0, 1])
def test_the_status_of_a_command_is_its_own_also_without_ray(status: int) -> None:
    program = (
        "import sys\n"
        "from learner.runs.stopping import exit_status\n"
        "from rollout.given_up import give_ray_up\n"
        "def command():\n"
        "    give_ray_up('Ray is gone')\n"
        "    print('done')\n"
        f"    return {status}\n"
        "sys.exit(exit_status(command))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (status, "done\n")
