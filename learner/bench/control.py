"""The control path without models: groups per second, bytes per group, and publish-to-loaded time.

    python -m learner.bench.control [--small] [--out FOLDER]

Groups go the way of a run: leased by the ledger, returned by real Ray actors (which answer at once with a prebuilt
group of LLaDA-8B size), delivered into the replay buffer, taken, planned (AGRPO, k 24) and built into the learner's
batches, committed. The actors and this process share the machine's cores. ``groups/s`` counts the whole path by the
wall clock; the ``s`` columns say where the controller's time goes, per group.

Publish-to-loaded: from the controller's ``publish`` (digest, one put) until every actor has fetched the adapter, copied
it into its parameters and found the published digest in them.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch

from learner.bench import report
from learner.bench.adapter_holder import AdapterHolder, adapter_shapes
from learner.bench.measure import machine
from learner.bench.model_free import ModelFreeActor, prebuilt_group
from learner.likelihood.views import build_batch
from learner.objectives.agrpo import Agrpo
from learner.ranks.plan import plan_update
from learner.ranks.rank import PublishedAdapter
from learner.runs.local_ray import local_ray
from learner.settings.methods.states import AgrpoConfig
from learner.supply.publish import publish
from rewards.task import Problem
from rollout.adapters import digest, pack
from rollout.ledger import Ledger
from rollout.messages import GroupReport, LeaseReport
from rollout.replay import ReplayBuffer
from rollout.trajectory import GroupSpec
from rollout.waits import bounded_get, bounded_wait

LIMIT_S = 240.0
"""For any one wait."""

TABLES = {
    "Groups through the control path": [
        "actors", "groups", "groups/s", "MB/group", "MB/s", "lease, deliver s", "fetch s", "plan s", "build batches s",
    ],
    "Publish to loaded": ["holders", "adapter MB", "publish s", "all loaded s", "per actor s"],
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    group: dict[str, int]
    actors: tuple[int, ...]
    groups_per_iteration: int
    iterations: int
    k: int
    holders: tuple[int, ...]
    adapter: dict[str, int]


FULL = Size(
    group={"size": 8, "prompt": 256, "completion": 384, "block": 12, "steps": 128, "kept": 150, "vocabulary": 126_464},
    actors=(4, 16, 64),
    groups_per_iteration=16,
    iterations=8,
    k=24,
    holders=(1, 4, 16),
    adapter={"d_model": 4096, "mlp": 12288, "layers": 32, "r": 64},
)
SMALL = Size(
    group={"size": 2, "prompt": 4, "completion": 16, "block": 8, "steps": 8, "kept": 4, "vocabulary": 100},
    actors=(2,),
    groups_per_iteration=4,
    iterations=2,
    k=2,
    holders=(1,),
    adapter={"d_model": 32, "mlp": 64, "layers": 2, "r": 4},
)


def run(*, small: bool = False) -> dict[str, Any]:
    """Everything, as ``report`` stores it."""
    torch.set_num_threads(1)
    size, about = SMALL if small else FULL, machine(threads=1)
    # The CPUs are also how many workers Ray starts at once.
    with local_ray(num_cpus=4, object_store_memory=2 * 10**9, logging_level=logging.ERROR):
        actor_class: Any = ray.remote(ModelFreeActor).options(num_cpus=0)
        actors = [actor_class.remote(size.group) for _ in range(max(size.actors))]
        bounded_get([actor.ready.remote() for actor in actors], who="the model-free actors", timeout_s=LIMIT_S)
        rows = [pass_groups(actors[:count], size) for count in size.actors]
        for actor in actors:
            ray.kill(actor)
        rows += [publish_to(count, size) for count in size.holders]
    return {"benchmark": "control", "small": small, "machine": about, "rows": rows, "tables": TABLES, "bars": []}


def pass_groups(actors: list[Any], size: Size) -> dict[str, Any]:
    """Send all iterations' groups through these actors. Enough iterations are leased ahead to keep all actors busy."""
    count, per_iteration = len(actors), size.groups_per_iteration
    ahead = -(-2 * count // per_iteration)
    ledger = Ledger(capacity=per_iteration * (ahead + 1), groups_per_lease=1, max_staleness=ahead)
    replay = ReplayBuffer(ledger)
    path = _Path(replay, actors)
    nbytes = prebuilt_group(**size.group).nbytes
    problem = Problem("bench", {})
    spent = {"lease": 0.0, "fetch": 0.0, "plan": 0.0, "build": 0.0}
    begin = time.perf_counter()
    for iteration in range(size.iterations):
        for planned in range(ledger.last_iteration + 1, min(iteration + ahead, size.iterations - 1) + 1):
            ids = range(planned * per_iteration, (planned + 1) * per_iteration)
            ledger.issue(planned, [GroupSpec(i, problem, size.group["size"], seed=i) for i in ids])
        marks = [time.perf_counter()]
        while not ledger.complete(iteration):
            path.pump(iteration)
        items = replay.take(iteration, iteration)
        marks.append(time.perf_counter())
        assert not replay.find_lost({item.group_id: item.ref for item in items}, timeout_s=LIMIT_S)
        groups = bounded_get([item.ref for item in items], who="the object store", timeout_s=LIMIT_S)
        marks.append(time.perf_counter())
        plan = plan_update(
            groups,
            objective=Agrpo(AgrpoConfig(k=size.k, timestep_sampling="uniform")),
            run_seed=0,
            update_index=iteration,
            eos_ids=(),
            ranks=1,
            views_per_forward=16,
        )
        marks.append(time.perf_counter())
        for forward in plan.forwards[0]:
            build_batch(forward.views, groups, mask_id=0, pad_id=1)
        marks.append(time.perf_counter())
        replay.commit(items, iteration)
        for name, start, end in zip(spent, marks[:-1], marks[1:], strict=True):
            spent[name] += end - start
    seconds, groups_done = time.perf_counter() - begin, size.iterations * per_iteration
    counts = ledger.counts()
    assert counts["consumed"] == counts["issued"] == groups_done, f"groups went astray: {counts}"
    return {
        "actors": count,
        "groups": groups_done,
        "groups/s": groups_done / seconds,
        "MB/group": nbytes / 1e6,
        "MB/s": nbytes * groups_done / seconds / 1e6,
        "lease, deliver s": spent["lease"] / groups_done,
        "fetch s": spent["fetch"] / groups_done,
        "plan s": spent["plan"] / groups_done,
        "build batches s": spent["build"] / groups_done,
    }


def publish_to(count: int, size: Size) -> dict[str, Any]:
    """Publish one adapter to ``count`` actors, each with parameters of its own. Figures are None where it doesn't fit
    into this machine's memory: every actor holds the adapter twice while it hashes what it has loaded."""
    shapes = adapter_shapes(**size.adapter)
    nbytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    row: dict[str, Any] = {"holders": count, "adapter MB": nbytes / 1e6}
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if count * (2.2 * nbytes + 0.4e9) + 3 * nbytes > max(free, _available()):
        print(f"control: {count} holders of {nbytes / 1e6:.0f} MB don't fit into free memory", file=sys.stderr)
        return {**row, "publish s": None, "all loaded s": None, "per actor s": None}
    holder_class: Any = ray.remote(AdapterHolder).options(
        num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
    )
    holders = [holder_class.remote(shapes) for _ in range(count)]
    bounded_get([holder.ready.remote() for holder in holders], who="the adapter's holders", timeout_s=LIMIT_S)
    state = pack({name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()})
    adapter = PublishedAdapter(state, digest(state), {})
    begin = time.perf_counter()
    weights = publish(1, adapter)
    put = time.perf_counter()
    answers = [holder.load.remote(weights.refs, weights.digest, LIMIT_S) for holder in holders]
    loads = bounded_get(answers, who="the adapter's holders", timeout_s=LIMIT_S)
    end = time.perf_counter()
    for holder in holders:
        ray.kill(holder)
    return {
        **row,
        "publish s": put - begin,
        "all loaded s": end - begin,
        "per actor s": sum(loads) / count,
    }


class _Path:
    """What ``learner.supply.feed`` and ``rollout.pool`` do with a lease, for actors that report nothing but its id."""

    def __init__(self, replay: ReplayBuffer, actors: list[Any]) -> None:
        self._replay, self._idle = replay, list(actors)
        self._running: dict[ray.ObjectRef[Any], tuple[Any, list[ray.ObjectRef[Any]], tuple[int, ...]]] = {}

    def pump(self, version: int) -> None:
        while self._idle:
            lease = self._replay.ledger.lease(policy_version=version, timeout_s=LIMIT_S)
            if lease is None:
                break
            actor = self._idle.pop()
            first, *refs = actor.run_lease.options(num_returns=1 + len(lease.groups)).remote(lease)
            self._running[first] = (actor, refs, tuple(spec.group_id for spec in lease.groups))
        done, _ = bounded_wait(list(self._running), who="model-free actors", timeout_s=LIMIT_S)
        assert done, "no model-free actor answered"
        for ref in done:
            actor, refs, group_ids = self._running.pop(ref)
            lease_id = bounded_get(ref, who="a model-free actor", timeout_s=LIMIT_S)
            reports = tuple(GroupReport(i, "bench", 0, 0, 0, None, None) for i in group_ids)
            self._replay.deliver(LeaseReport(lease_id, "bench", 0, "bench", reports, 0.0, 0.0, 0.0), refs)
            self._idle.append(actor)


def _available() -> int:
    with open("/proc/meminfo") as lines:
        kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), "0")
    return int(kilobytes) * 1024


if __name__ == "__main__":
    sys.exit(report.main("control", run))
