"""The head of a cluster is lost under a run that looks after itself: it goes on when there is a head again."""

import contextlib
import signal
from pathlib import Path

import pytest

from tests.support.local_clusters import PORT, LocalCluster, short_folder
from tests.support.real_runs import (
    Runs,
    StartedRun,
    adapter_digest,
    assert_ledger_balances,
    rows,
    store_status,
    training_rows,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(900)]

SETTINGS = ("recipe=smoke", "run.iterations=12", "checkpoint.every=2")

REFUSED = "the run ended with exit status 2: it is started again"


def started(runs: Runs, name: str, cluster: LocalCluster) -> contextlib.AbstractContextManager[StartedRun]:
    return runs.started(name, "run.restarts=1", forked=False, **cluster.joining())


def test_a_run_waits_for_the_next_head(tmp_path: Path, bases: Path) -> None:
    runs = Runs(tmp_path, bases, settings=SETTINGS)
    runs.train("whole")
    with short_folder() as folder:
        cluster = LocalCluster(folder, PORT, RAY_AUTH_MODE="disabled")  # another head would want another token
        # One restart is enough: starts that are refused because nobody answers don't count.
        with cluster.running(1), started(runs, "headless", cluster) as run:
            run.wait_for_row(3)
            assert cluster.call("stop").returncode == 0
            run.wait_for("two starts that are refused", lambda: run.output().count(REFUSED) > 1)
            assert "no Ray answers at" in run.output()
            assert cluster.call("start", "1").returncode == 0
            assert run.wait() == 0, run.output()
    assert rows(runs["headless"]) == rows(runs["whole"])
    assert any(row["grad_norm"] > 0 for row in training_rows(runs["whole"])), "nothing was learned that could differ"
    assert adapter_digest(runs["headless"]) == adapter_digest(runs["whole"])
    assert_ledger_balances(runs["headless"])
    assert store_status(runs["headless"]) == ("finished", 2)


def test_who_asks_is_heard_while_it_waits(tmp_path: Path, bases: Path) -> None:
    runs = Runs(tmp_path, bases, settings=SETTINGS)
    with short_folder() as folder:
        cluster = LocalCluster(folder, PORT, RAY_AUTH_MODE="disabled")
        with cluster.running(1), started(runs, "given-up", cluster) as run:
            run.wait_for_row(3)
            assert cluster.call("stop").returncode == 0
            run.wait_for("a start that is refused", lambda: REFUSED in run.output())
            run.popen.send_signal(signal.SIGTERM)
            assert run.wait() in (2, 128 + signal.SIGTERM), run.output()
