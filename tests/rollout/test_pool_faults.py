"""A pool whose actors die, hang, deliver garbage or lose their node, and one that gets less room than it wants."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
from ray.core.generated import autoscaler_pb2

from learner.bench.model_free import ModelFreeActor, ModelFreeSettings, prebuilt_group
from rewards.errors import WaitTimeout, WorkerLost
from rewards.task import Problem
from rollout.arrival import report_problem
from rollout.events import ActorLost, Delivery, Event, Refused
from rollout.messages import BASE_WEIGHTS, content_digest
from rollout.pool import MOST_REFUSED, RolloutPool
from rollout.trajectory import GroupSpec, Lease, SamplerSpec
from tests.rollout.test_pool import cluster, far_node  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.heavy]

SIZES = {"size": 2, "prompt": 4, "completion": 16, "block": 8, "steps": 8, "kept": 4, "vocabulary": 100}
SAMPLER = SamplerSpec(16, 8, 8, "random", 0.6, 4, 1.0)
WEIGHTS = BASE_WEIGHTS._replace(version=0)


class HonestActor(ModelFreeActor):
    """Delivers what was asked for."""

    def start(self) -> dict[str, Any]:
        return super().start() | {"node_id": ray.get_runtime_context().get_node_id(), "host": "here"}

    def run_lease(self, lease: Lease, *asked: Any) -> tuple[Any, ...]:
        report, *groups = super().run_lease(lease, *asked)
        groups = [
            replace(group, problem_id=spec.problem.id, seed=spec.seed, adapter_digest="")
            for group, spec in zip(groups, lease.groups, strict=True)
        ]
        told = tuple(replace(t, digest=content_digest(g)) for t, g in zip(report.groups, groups, strict=True))
        return replace(report, groups=told), *groups


class GarbageActor(HonestActor):
    """Spoils one reward after it has hashed the group."""

    def run_lease(self, lease: Lease, *asked: Any) -> tuple[Any, ...]:
        report, *groups = super().run_lease(lease, *asked)
        return report, *(replace(group, rewards=group.rewards + np.float32(1.0)) for group in groups)


class StuckActor(HonestActor):
    """Its engine hangs in every lease, while its process answers."""

    def run_lease(self, lease: Lease, *asked: Any) -> tuple[Any, ...]:
        time.sleep(600.0)
        raise AssertionError("it is not waited for")


class SlowActor(HonestActor):
    """Takes three seconds for a lease."""

    def run_lease(self, lease: Lease, *asked: Any) -> tuple[Any, ...]:
        time.sleep(3.0)
        return super().run_lease(lease, *asked)


class HonestPool(RolloutPool):
    actor_class = HonestActor


class GarbagePool(RolloutPool):
    actor_class = GarbageActor


class StuckPool(RolloutPool):
    actor_class = StuckActor


class SlowPool(RolloutPool):
    actor_class = SlowActor


@pytest.fixture
def start(cluster: dict[str, str]) -> Iterator[Callable[..., RolloutPool]]:  # noqa: F811
    pools = []

    def make(size: int, pool_class: type[RolloutPool] = HonestPool, **changes: Any) -> RolloutPool:
        settings: Any = ModelFreeSettings(SIZES)
        options: dict[str, Any] = {"resources": {"CPU": 1}, "environment": {}, "start_timeout_s": 60.0}
        options["max_restarts"] = 3
        pools.append(pool_class(settings, size=size, **options | changes))
        pools[-1].wait_ready()
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def lease(number: int = 0) -> Lease:
    return Lease(number, (GroupSpec(number, Problem(f"p{number}", {}), 2, seed=5),))


def happened(pool: RolloutPool, within_s: float = 60.0) -> list[Event]:
    deadline = time.monotonic() + within_s
    while not (events := pool.poll(0.0)):
        assert time.monotonic() < deadline, "nothing is noticed"
        time.sleep(0.1)
    return events


def test_idle_actor_that_dies_or_hangs_is_noticed_and_replaced(start: Callable[..., RolloutPool]) -> None:
    pool = start(1, heartbeat_s=4.0)
    quiet = time.monotonic() + 6.0
    while time.monotonic() < quiet:  # the control: one that answers is left alone
        assert pool.poll(0.0) == []
        time.sleep(0.2)
    for action, cause in ((signal.SIGKILL, "died"), (signal.SIGSTOP, "hung")):
        os.kill(pool.workers()[0]["pid"], action)
        began = time.monotonic()
        (event,) = happened(pool, 20.0)
        assert isinstance(event, ActorLost) and (event.cause, event.lease_id) == (cause, None)
        assert time.monotonic() - began < 10.0
        pool.wait_ready()
        pool.submit(lease(), SAMPLER, WEIGHTS)
        (delivery,) = happened(pool)
        assert isinstance(delivery, Delivery)


def test_garbage_is_refused_and_its_actor_given_up_after_three_times(start: Callable[..., RolloutPool]) -> None:
    pool = start(1, GarbagePool)
    first = pool.workers()[0]["pid"]
    for number in range(MOST_REFUSED):
        pool.submit(lease(number), SAMPLER, WEIGHTS)
        events = happened(pool)
        assert isinstance(events[0], Refused) and events[0].lease_id == number
        assert "is not what its actor had hashed" in events[0].error
    assert isinstance(events[1], ActorLost) and events[1].cause == "invalid"
    assert "on node" in events[1].error and "given up after 3" in events[1].error
    pool.wait_ready()
    assert pool.workers()[0]["pid"] != first
    with pytest.raises(WorkerLost, match="in a row"):
        for number in range(9):
            pool.submit(lease(number), SAMPLER, WEIGHTS)
            happened(pool)
            pool.wait_ready()


def test_actor_stuck_in_a_lease_that_counts_no_more_is_replaced(start: Callable[..., RolloutPool]) -> None:
    """Another's delivery has closed the leases, so ``kill_lease`` is never called."""
    pool = start(2, StuckPool)
    pool.submit(lease(0), SAMPLER, WEIGHTS, limit_s=1.0)
    pool.submit(lease(1), SAMPLER, WEIGHTS)  # the control: without a limit it stays busy
    (event,) = happened(pool)
    assert isinstance(event, ActorLost) and (event.cause, event.lease_id) == ("late", 0)
    pool.wait_ready()
    assert [worker["lease_id"] for worker in pool.workers()] == [None, 1] and pool.idle() == 1


def test_reports_are_compared_with_what_was_asked() -> None:
    actor = HonestActor("rollout-0", ModelFreeSettings(SIZES))
    actor._group = prebuilt_group(**SIZES)
    report, *_ = actor.run_lease(lease(), SAMPLER, WEIGHTS)
    assert report_problem(report, lease(), "rollout-0", WEIGHTS) is None
    assert "lease 0 by rollout-0" in str(report_problem(report, lease(1), "rollout-0", WEIGHTS))
    assert "lease 0 by rollout-0" in str(report_problem(report, lease(), "rollout-1", WEIGHTS))
    assert "given out was version 1" in str(report_problem(report, lease(), "rollout-0", WEIGHTS._replace(version=1)))
    assert "in place of a report" in str(report_problem(None, lease(), "rollout-0", WEIGHTS))


def test_pool_begins_with_the_least_and_grows_when_a_node_comes(
    start: Callable[..., RolloutPool],
    cluster: dict[str, str],  # noqa: F811
) -> None:
    with pytest.raises(WaitTimeout, match="short of nowhere"):
        start(2, least=1, resources={"nowhere": 1}, start_timeout_s=4.0)
    with far_node(cluster):
        pool = start(2, least=1, resources={"far": 1}, start_timeout_s=60.0)
        assert (pool.ready, pool.size) == (1, 2)
        pool.submit(lease(), SAMPLER, WEIGHTS)
        assert isinstance(happened(pool)[0], Delivery)
        with far_node(cluster):
            deadline = time.monotonic() + 60.0
            while pool.ready < 2:
                assert time.monotonic() < deadline, "the node that was added is not used"
                pool.poll(0.5)


def drain(node: str, seconds: float) -> None:
    """The notice that it goes in so many seconds."""
    deadline_ms = int(1000 * (time.time() + seconds))
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    gcs = ray._private.worker.global_worker.gcs_client
    assert gcs.drain_node(node, reason, "a test", deadline_ms)[0]


def test_actor_leaves_a_node_that_is_drained(start: Callable[..., RolloutPool], cluster: dict[str, str]) -> None:  # noqa: F811
    """After its lease, if there is time; if not, the lease is free for another actor. An idle one goes at once."""
    deadline = time.monotonic() + 60.0
    while any(node["Alive"] and "far" in node["Resources"] for node in ray.nodes()):
        assert time.monotonic() < deadline, "the nodes of another test are still there"
        time.sleep(0.5)
    with far_node(cluster):
        pool = start(1, SlowPool, resources={"far": 1})
        (old,) = {worker["node_id"] for worker in pool.workers()}
        with far_node(cluster):
            pool.submit(lease(), SAMPLER, WEIGHTS)
            drain(old, 120.0)
            events = happened(pool)
            while len(events) < 2:
                events += happened(pool)
            delivery, left = sorted(events, key=lambda event: isinstance(event, ActorLost))  # in either order
            assert isinstance(delivery, Delivery) and delivery.report.lease_id == 0
            assert isinstance(left, ActorLost) and (left.cause, left.lease_id) == ("preempted", None)
            pool.wait_ready()
            (new,) = {worker["node_id"] for worker in pool.workers()}
            assert new != old
            pool.submit(lease(1), SAMPLER, WEIGHTS)
            drain(new, 0.5)
            (event,) = happened(pool)
            assert isinstance(event, ActorLost) and (event.cause, event.lease_id) == ("preempted", 1)


def test_waiting_for_an_idle_actor_of_a_drained_node_starts_it_elsewhere(
    start: Callable[..., RolloutPool],
    cluster: dict[str, str],  # noqa: F811
) -> None:
    """The last actor at work has just finished its lease there, and nobody has looked around since."""
    with far_node(cluster):
        pool = start(1, resources={"far": 1})
        (old,) = {worker["node_id"] for worker in pool.workers()}
        with far_node(cluster):
            drain(old, 120.0)
            pool._places[0].leaving = time.time() + 120.0
            pool._looked_around = time.monotonic()
            assert pool.idle() == 0
            (left,) = pool.poll(1.0)
            assert isinstance(left, ActorLost) and left.cause == "preempted"
            pool.wait_ready()
            assert pool.idle() == 1 and {worker["node_id"] for worker in pool.workers()} != {old}
