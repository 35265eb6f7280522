"""A fine-tuning run does what it is asked while it runs, confirms it, and computes the same bits as one left alone."""

import signal

import httpx
import pytest

from services.store.reader import Reader
from tests.learner.test_sft_group import adapter_digest, data_file, sft_runs  # noqa: F401  (fixtures)
from tests.support.actions import answer, ask, run_row, store
from tests.support.real_runs import Runs, command_line, iterations, rows, saved_iterations, send, summary, wait_until
from tests.whole.test_dashboard_of_a_run import address_in

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(1200)]

LONG = ("sft.epochs=16", "sft.evaluate_every=0", "checkpoint.every=100")
UPDATES = 96


@pytest.mark.heavy
def test_paused_saved_stopped_and_resumed_run_has_the_same_bits(sft_runs: Runs) -> None:  # noqa: F811
    sft_runs.train("left-alone", *LONG)
    alone = sft_runs["left-alone"]
    with sft_runs.started("asked", *LONG, "run.dashboard=true") as run:
        run.wait_for_row(1)
        paused = answer(run, "pause")
        at = iterations(run.dir)[-1]
        assert (paused.status, paused.result) == ("done", f"paused after iteration {at}"), paused
        assert at < UPDATES, "too late: the run is over"
        wait_until(lambda: run_row(run.dir)["status"] == "paused", "the status", 30)
        assert answer(run, "pause").result == "the run is paused already"
        assert saved_iterations(run.dir) == []
        saved = answer(run, "checkpoint")
        assert (saved.status, saved.result) == ("done", f"saved after iteration {at}")
        assert saved_iterations(run.dir) == [at]
        resized = answer(run, "set_actors", actors=3)
        assert (resized.status, resized.result) == ("refused", "a fine-tuning run has no rollout actors")

        with store(run.dir) as engine:
            (rank,) = Reader(engine).workers(run.dir.id)
        assert (rank["worker_id"], rank["role"], rank["policy_version"]) == ("learner-0", "learner", at)
        assert rank["data"]["memory_bytes"] > 50 << 20, "what the rank uses"
        run.wait_for("the dashboard", lambda: address_in(run.dir) is not None)
        shown = httpx.get(f"{address_in(run.dir)}api/v1/runs/asked", trust_env=False, timeout=30).json()
        assert (shown["status"], shown["iteration"]) == ("paused", at)

        assert iterations(run.dir)[-1] == at, "it went on while it was paused"
        resumed = answer(run, "resume")
        assert (resumed.status, resumed.result) == ("done", f"goes on with iteration {at + 1}")
        run.wait_for_row(at + 1)
        stopped = answer(run, "stop")
        assert run.wait() == 128 + signal.SIGTERM, run.output()
    left = iterations(run.dir)[-1]
    assert (stopped.status, stopped.result) == ("done", f"stopped after iteration {left}; resume=auto goes on there")
    assert at < left < UPDATES and saved_iterations(run.dir) == [at, left]
    assert adapter_digest(run.dir.adapter_dir) != adapter_digest(alone.adapter_dir), "the control: bits can differ"

    sft_runs.train("asked", *LONG, "resume=auto")
    assert rows(run.dir) == rows(alone) and summary(run.dir) == summary(alone)
    assert adapter_digest(run.dir.adapter_dir) == adapter_digest(alone.adapter_dir)
    over = ask(run.dir, "pause")
    assert (over.status, over.result) == ("refused", "the run is over (finished)")


@pytest.mark.heavy
def test_a_lost_rank_costs_a_few_updates_and_no_bit(sft_runs: Runs) -> None:  # noqa: F811
    sft_runs.train("whole", *LONG)
    with sft_runs.started("rank-lost", *LONG) as run:
        run.wait_for_row(3)
        (rank,) = [pid for pid in run.members() if command_line(pid).startswith("ray::SftRank")]
        send(signal.SIGKILL, [rank])
        assert run.wait() == 0, run.output()
    assert "the ranks are started again" in run.output()
    assert iterations(run.dir) == list(range(1, UPDATES + 1)), "rows of what was done again are there once"
    assert rows(run.dir) == rows(sft_runs["whole"])
    assert adapter_digest(run.dir.adapter_dir) == adapter_digest(sft_runs["whole"].adapter_dir)
