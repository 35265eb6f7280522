"""Rank and actor as one process with one base: the numbers of two processes, bit for bit, also when it is lost."""

import signal

import pytest

from learner.runs.directory import RunDirectory
from tests.support.real_runs import Runs, assert_ledger_balances, send, store_events, store_status
from tests.whole.test_resume import assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.heavy)])
def test_a_run_in_one_process_that_is_lost_has_the_bits_of_two(
    runs: Runs, undisturbed: RunDirectory, how: signal.Signals
) -> None:
    name = f"one-{how.name.lower()}"
    with runs.started(name, "resources.one_process=true", "timeouts.heartbeat=10") as run:
        run.wait_for_row(2)
        assert run.actors() == run.ranks() == [], "they have processes of their own"
        (both,) = run.both()
        send(how, [both])
        assert run.wait() == 0, run.output()
    assert "Traceback" not in run.output()
    assert_same_run(runs[name], undisturbed)
    assert_ledger_balances(runs[name])
    parts = [event["data"]["part"] for event in store_events(runs[name]) if event["kind"] == "fault"]
    assert parts in (["rank"], ["actor", "rank"]), "one loss, told of the actor too if that was noticed first"
    assert store_status(runs[name]) == ("finished", 1)


@pytest.mark.heavy
def test_two_of_them_have_the_bits_of_four(runs: Runs) -> None:
    """ZeRO 2; one is killed, and both are started anew."""
    two = ("learner.ranks=2", "learner.zero_stage=2", "rollout.actors=2")
    runs.train("four", *two)
    with runs.started("two", *two, "resources.one_process=true") as run:
        run.wait_for_row(2)
        first, second = run.both()
        send(signal.SIGKILL, [second])
        assert run.wait() == 0, run.output()
        assert "Traceback" not in run.output()
    assert_same_run(runs["two"], runs["four"])
    assert_ledger_balances(runs["two"])


@pytest.mark.heavy
def test_a_method_that_learns_in_phases_has_the_bits_of_two_processes(runs: Runs) -> None:
    """What the teacher draws goes on while the ranks learn; here both wait for each other."""
    dtm = ("objective.type=dtm", "objective.phase_iterations=2", "objective.buffer_prompts=8")
    runs.train("dtm", *dtm)
    with runs.started("dtm-one", *dtm, "resources.one_process=true") as run:
        run.wait_for_row(3)
        send(signal.SIGKILL, run.both())
        assert run.wait() == 0, run.output()
    assert_same_run(runs["dtm-one"], runs["dtm"])
