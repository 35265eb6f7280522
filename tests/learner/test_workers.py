"""What a run tells of its actors, on a real Ray: what they do, since when, and when they were heard from."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.reporting.workers import Workers
from rollout.messages import Weights
from rollout.pool import RolloutPool
from services.store.reader import Reader
from services.store.writer import StoreWriter
from tests.rollout.test_pool import SAMPLER, build_pool, cluster, new_replay, plan, weights  # noqa: F401  (fixtures)
from tests.support.real_runs import wait_until

pytestmark = pytest.mark.slow


def test_heartbeat_of_an_actor_is_its_last_answer(
    cluster: None,  # noqa: F811
    tiny_model: str,
    weights: Callable[[int], Weights],  # noqa: F811
    pair: tuple[StoreWriter, Reader],
    tmp_path: Path,
) -> None:
    store, reader = pair
    workers = Workers(store)
    workers.tell(0)  # nobody is there yet

    def told() -> dict[str, Any]:
        workers.tell(0)
        assert store.flush(30)
        (row,) = reader.workers("r")
        assert time.time() - 60 < row["data"]["told"]
        return row | {name: row["data"][name] for name in ("doing", "since", "told")}

    began = time.time()
    pool = workers.pool = build_pool(tiny_model, 1)
    try:
        starting = told()
        assert (starting["status"], starting["doing"]) == ("starting", "start")
        assert began <= starting["since"] == starting["heartbeat"] <= time.time()
        pool.wait_ready()
        ready = told()
        assert (ready["status"], ready["doing"], ready["since"]) == ("idle", None, None)
        assert starting["told"] <= ready["heartbeat"] <= ready["told"]

        gate = tmp_path / "gate"
        gate.touch()
        submit(pool, weights(0), gate)
        wait_until(lambda: gate.with_name("gate.reached").exists(), "the actor at the gate", 120)
        assert pool.poll(0.0) == []
        busy = told()
        assert (busy["status"], busy["doing"]) == ("busy", "lease 0")
        assert busy["heartbeat"] == ready["heartbeat"] < busy["since"] < busy["told"], "nothing was heard of it since"
        gate.unlink()
        assert pool.poll(120.0)
        idle = told()
        assert (idle["status"], idle["doing"]) == ("idle", None)
        assert busy["told"] < idle["heartbeat"] <= idle["told"]

        pool.set_size(0)
        retired = told()
        assert (retired["status"], retired["heartbeat"]) == ("retired", idle["heartbeat"])
    finally:
        pool.close()


def submit(pool: RolloutPool, weights: Weights, gate: Path) -> None:  # noqa: F811
    """A lease whose grader waits at the gate."""
    replay = new_replay()
    replay.ledger.issue(0, plan(2, gate=str(gate)))
    lease = replay.ledger.lease(policy_version=0, timeout_s=120.0)
    assert lease is not None
    pool.submit(lease, SAMPLER, weights)
