"""More groups than the object store has room for: Ray spills them to disk, and a ledger that is full leases no more."""

import logging
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from learner.bench.model_free import ModelFreeSettings
from learner.runs.local_ray import local_ray
from rewards.task import Problem
from rollout.events import Delivery
from rollout.ledger import Ledger
from rollout.messages import content_digest
from rollout.replay import ReplayBuffer
from rollout.trajectory import GroupSpec, SamplerSpec
from rollout.waits import bounded_get
from tests.rollout.test_pool_faults import WEIGHTS, HonestPool, happened

pytestmark = pytest.mark.slow

STORE_BYTES = 80 * 2**20
"""About the least that Ray takes."""
SIZES = {"size": 32, "prompt": 4, "completion": 1024, "block": 1024, "steps": 1024, "kept": 64, "vocabulary": 1000}
SAMPLER = SamplerSpec(1024, 1024, 1024, "random", 0.6, 64, 1.0)
GROUPS, LATER = 14, 2
"""Of the first iteration and of the next; a group has 9 MB."""


def room() -> int:
    """Bytes that Ray's store holds in memory."""
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return int(stats.object_store_bytes_avail)


def test_groups_beyond_the_object_store_are_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    ledger = Ledger(capacity=GROUPS, groups_per_lease=1, max_staleness=1)
    replay = ReplayBuffer(ledger)
    specs = [GroupSpec(number, Problem(f"p{number}", {}), SIZES["size"], seed=5) for number in range(GROUPS + LATER)]
    ledger.issue(0, specs[:GROUPS])
    ledger.issue(1, specs[GROUPS:])
    with local_ray(num_cpus=2, object_store_memory=STORE_BYTES, logging_level=logging.ERROR):
        settings: Any = ModelFreeSettings(SIZES)
        options: dict[str, Any] = {
            "resources": {"CPU": 1},
            "environment": {},
            "start_timeout_s": 60.0,
            "max_restarts": 1,
        }
        pool = HonestPool(settings, size=1, **options)
        pool.wait_ready()

        def draw() -> int:
            """Until the ledger leases no more; how many groups are ready then."""
            while (lease := ledger.lease(policy_version=0, timeout_s=60.0)) is not None:
                pool.submit(lease, SAMPLER, WEIGHTS)
                (event,) = happened(pool)
                assert isinstance(event, Delivery), event
                replay.deliver(event.report, event.refs)
            return int(ledger.counts()["ready"])

        assert draw() == GROUPS and ledger.counts()["pending"] == LATER
        items = replay.take(0, 0)
        sizes = [bounded_get(item.ref.whole, who="a group", timeout_s=60.0).nbytes for item in items]
        # So what follows reads some of them from disk, in whichever of its files Ray keeps them.
        assert sum(sizes) > 1.5 * room() > 0
        assert replay.find_lost({item.group_id: item.ref for item in items}, timeout_s=60.0) == []
        for item in items:
            assert content_digest(bounded_get(item.ref.whole, who="a group", timeout_s=60.0)) == item.report.digest
        replay.commit(items, 0)
        assert draw() == LATER and ledger.counts()["refused"] == ledger.counts()["failed"] == 0
        pool.close()
