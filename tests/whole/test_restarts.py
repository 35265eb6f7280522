"""``run.restarts``: a run whose process is killed goes on by itself, and ends when somebody asks for that."""

import os
import signal
import time

import pytest

from learner.runs.directory import RunDirectory
from tests.support.real_runs import (
    Runs,
    StartedRun,
    adapter_digest,
    assert_ledger_balances,
    rows,
    saved_iterations,
    session_members,
    store_events,
    store_status,
    wait_until,
    workers_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(600)]


def kill_worker(run: StartedRun) -> int:
    (pid,) = workers_of(run)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_killed_run_goes_on_by_itself(runs: Runs, undisturbed: RunDirectory) -> None:
    with runs.started("restarted", "run.restarts=1", "checkpoint.every=2") as run:
        run.wait_for_row(3)
        kill_worker(run)
        assert run.wait() == 0, run.output()
    run_dir = runs["restarted"]
    assert "the run ended with SIGKILL: it is started again" in run.output()
    assert rows(run_dir) == rows(undisturbed) and adapter_digest(run_dir) == adapter_digest(undisturbed)
    assert_ledger_balances(run_dir)
    assert store_status(run_dir) == ("finished", 2)
    (fault,) = [event for event in store_events(run_dir) if event["kind"] == "fault"]
    assert (fault["data"]["part"], fault["data"]["cause"]) == ("controller", "died")


def test_one_that_hangs_does_too(runs: Runs, undisturbed: RunDirectory) -> None:
    with runs.started("frozen", "run.restarts=1", "checkpoint.every=2", "timeouts.heartbeat=10") as run:
        run.wait_for_row(3)
        (pid,) = workers_of(run)
        os.kill(pid, signal.SIGSTOP)
        assert run.wait() == 0, run.output()
    assert "the run gave no sign of life for 10 s" in run.output()
    assert rows(runs["frozen"]) == rows(undisturbed) and adapter_digest(runs["frozen"]) == adapter_digest(undisturbed)
    assert store_status(runs["frozen"]) == ("finished", 2)


def test_it_is_not_started_more_often_than_that(runs: Runs) -> None:
    with runs.started("killed-again", "run.restarts=1", "run.iterations=300") as run:
        run.wait_for_row(1)
        first = kill_worker(run)
        wait_until(lambda: workers_of(run) not in ([], [first]), "the second start", 60)
        kill_worker(run)
        assert run.wait() == 128 + signal.SIGKILL, run.output()


def test_who_asks_it_to_stop_is_heard(runs: Runs) -> None:
    with runs.started("asked", "run.restarts=3", "run.iterations=300", "checkpoint.every=100") as run:
        run.wait_for_row(2)
        (worker,) = workers_of(run)
        os.kill(run.popen.pid, signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM, run.output()
        wait_until(lambda: not session_members(worker), "the end of all processes", 60)
    assert "started again" not in run.output()
    assert saved_iterations(runs["asked"]) and store_status(runs["asked"]) == ("stopped", 1)


def test_its_own_death_is_the_end_of_the_run(runs: Runs) -> None:
    with runs.started("both", "run.restarts=3", "run.iterations=300") as run:
        run.wait_for_row(1)
        (worker,) = workers_of(run)
        os.kill(run.popen.pid, signal.SIGKILL)
        run.popen.wait(timeout=30)
        wait_until(lambda: not workers_of(run), "the end of the process that works", 30)
        assert worker not in workers_of(run)


def test_what_another_start_can_t_mend_is_not_tried_again(runs: Runs, undisturbed: RunDirectory) -> None:
    began = time.monotonic()
    output = runs.train(undisturbed.id, "run.restarts=3", status=2, forked=False)
    assert "exists already" in output and "started again" not in output
    print(f"refused after {time.monotonic() - began:.1f} s")
