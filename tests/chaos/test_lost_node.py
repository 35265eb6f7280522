"""Whole nodes of a cluster die under a run: one with an actor, then the one with the learner rank."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.local_clusters import PORT, LocalCluster, short_folder
from tests.support.real_runs import (
    Runs,
    StartedRun,
    adapter_digest,
    assert_ledger_balances,
    iterations,
    rows,
    store_events,
    training_rows,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(1200)]

CPUS = 3
"""Of a node: enough for the rank and both actors."""
SETTINGS = ("recipe=smoke", "run.iterations=40", "rollout.actors=2", "timeouts.heartbeat=5", "checkpoint.every=20")

KEEP_THE_HEAD = f"""
import ray
from ray.util import placement_group
ray.init(log_to_driver=False, logging_level="error")
kept = placement_group([{{"CPU": {CPUS}, "node:__internal_head__": 0.001}}], name="head", lifetime="detached")
assert kept.wait(60)
"""
"""The controller is a client of the head's raylet, and nothing that is killed may lie there."""


def faults(run: StartedRun, part: str) -> list[str]:
    return [
        event["text"] for event in store_events(run.dir) if event["kind"] == "fault" and event["data"]["part"] == part
    ]


def lose_node(run: StartedRun, raylet: int, part: str) -> None:
    """Kill a node's raylet, with which all its workers end, and wait until that was told and work has gone on."""
    before, told, began = iterations(run.dir)[-1], len(faults(run, part)), time.monotonic()
    os.kill(raylet, signal.SIGKILL)
    run.wait_for(f"a fault of the {part}", lambda: len(faults(run, part)) > told)
    told_s = time.monotonic() - began
    run.wait_for("another iteration", lambda: iterations(run.dir)[-1] > before + 1)
    print(f"{part}: told after {told_s:.1f} s, went on after {time.monotonic() - began:.1f} s: {faults(run, part)}")


def test_lost_nodes_cost_nothing_but_time(tmp_path: Path, bases: Path) -> None:
    runs = Runs(tmp_path, bases, settings=SETTINGS)
    runs.train("whole")
    with short_folder() as folder:
        cluster = LocalCluster(folder, PORT, CPUS_PER_NODE=str(CPUS))
        with cluster.running(4):
            kept = cluster.python("-c", KEEP_THE_HEAD)
            assert kept.returncode == 0, kept.stderr
            with runs.started("lost", forked=False, **cluster.joining()) as run:
                run.wait_for_row(2)
                (learns,) = cluster.raylets("ray::LearnerRank")
                draws = cluster.raylets("ray::RolloutActor") - {learns}
                assert draws, "both actors lie on the rank's node"
                lose_node(run, draws.pop(), "actor")
                (learns,) = cluster.raylets("ray::LearnerRank")
                lose_node(run, learns, "rank")
                assert run.wait() == 0, run.output()
    assert "joined the Ray cluster" in run.output()
    assert rows(runs["lost"]) == rows(runs["whole"])
    assert any(row["grad_norm"] > 0 for row in training_rows(runs["whole"])), "nothing was learned that could differ"
    assert adapter_digest(runs["lost"]) == adapter_digest(runs["whole"])
    assert_ledger_balances(runs["lost"])
    assert not [event for event in store_events(runs["whole"]) if event["kind"] == "fault"]
