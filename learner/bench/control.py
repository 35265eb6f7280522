"""The control path without models: groups per second, bytes per group, and publish-to-loaded time.

    python -m learner.bench.control [--small] [--out FOLDER]

Groups go the way of a run, through the product's feed, pool, ledger and replay buffer: leased, returned by real Ray
actors (which answer at once with a prebuilt group of LLaDA-8B size), delivered, found in the object store, committed.
The ranks take no time at all, so the controller and the actors, who share the machine's cores, are what limits.
``groups/s`` is by the wall clock; ``controller s`` is the controller's CPU time per group. ``plan s`` and
``build batches s`` are what a rank then does with a group (AGRPO, k 24), and no part of the rate.

Publish-to-loaded: from the controller's ``publish`` (digest, one put) until every actor has fetched the adapter, copied
it into its parameters and found the published digest in them.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from learner.bench import report
from learner.bench.adapter_holder import AdapterHolder, adapter_shapes
from learner.bench.measure import machine
from learner.bench.model_free import ModelFreeSettings, prebuilt_group
from learner.bench.model_free_pool import ModelFreePool, start_model_free, tell_fault
from learner.likelihood.views import build_batch
from learner.objectives.agrpo import Agrpo
from learner.ranks.plan import plan_update
from learner.ranks.rank import PublishedAdapter
from learner.runs.local_ray import local_ray
from learner.settings.methods.states import AgrpoConfig
from learner.settings.run import load_config
from learner.simulation.cycle import make_cycle
from learner.supply.publish import publish
from rollout.adapters import digest, pack
from rollout.messages import BASE_WEIGHTS, Weights
from rollout.replay import ReplayBuffer, ReplayItem
from rollout.waits import bounded_get

LIMIT_S = 240.0
"""For any one wait, but for actors to start."""
START_LIMIT_S = 900.0
ACTOR_BYTES = 60e6
"""Of memory that an actor without a model takes."""

TABLES = {
    "Groups through the control path": [
        "actors", "groups per lease", "groups", "groups/s", "MB/group", "MB/s", "controller s", "plan s",
        "build batches s",
    ],
    "Publish to loaded": ["holders", "adapter MB", "publish s", "all loaded s", "per actor s"],
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    group: dict[str, int]
    actors: tuple[int, ...]
    groups_per_lease: tuple[int, ...]
    groups_per_iteration: int
    iterations: int
    k: int
    holders: tuple[int, ...]
    adapter: dict[str, int]


FULL = Size(
    group={"size": 8, "prompt": 256, "completion": 384, "block": 12, "steps": 128, "kept": 150, "vocabulary": 126_464},
    actors=(1, 4, 16, 64, 256),
    groups_per_lease=(1, 4),
    groups_per_iteration=64,
    iterations=8,
    k=24,
    holders=(1, 4, 16),
    adapter={"d_model": 4096, "mlp": 12288, "layers": 32, "r": 64},
)
SMALL = Size(
    group={"size": 2, "prompt": 4, "completion": 16, "block": 8, "steps": 8, "kept": 4, "vocabulary": 100},
    actors=(2,),
    groups_per_lease=(1,),
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
        work = rank_work(size)
        rows = []
        for actors in size.actors:
            if actors * ACTOR_BYTES > _available():
                print(f"control: {actors} actors don't fit into free memory", file=sys.stderr)
                continue
            pool = start_model_free(ModelFreeSettings(size.group), actors, start_timeout_s=START_LIMIT_S)
            rows += [pass_groups(pool, each, size) | work for each in size.groups_per_lease]
            pool.close()
        rows += [publish_to(count, size) for count in size.holders]
    return {"benchmark": "control", "small": small, "machine": about, "rows": rows, "tables": TABLES, "bars": []}


def pass_groups(pool: ModelFreePool, groups_per_lease: int, size: Size) -> dict[str, Any]:
    """Send all iterations' groups through these actors. Enough iterations are leased ahead to keep all of them busy."""
    per_iteration = size.groups_per_iteration
    ahead = -(-2 * pool.size * groups_per_lease // per_iteration)
    config = load_config(
        [
            "recipe=smoke",
            f"run.iterations={size.iterations}",
            f"rollout.prompts_per_iteration={per_iteration}",
            f"rollout.groups_per_lease={groups_per_lease}",
            f"rollout.max_staleness={ahead}",
        ]
    )
    cycle = make_cycle(config, pool, ReplayBuffer, time.monotonic, tell_fault)
    begin, worked = time.perf_counter(), time.process_time()
    cycle.run(_Ranks(), BASE_WEIGHTS._replace(version=0), time.monotonic, iterations=size.iterations)
    seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    groups, nbytes = size.iterations * per_iteration, prebuilt_group(**size.group).nbytes
    return {
        "actors": pool.size,
        "groups per lease": groups_per_lease,
        "groups": groups,
        "groups/s": groups / seconds,
        "MB/group": nbytes / 1e6,
        "MB/s": nbytes * groups / seconds / 1e6,
        "controller s": worked / groups,
    }


def rank_work(size: Size) -> dict[str, Any]:
    """Seconds that a rank of one needs for a group before its first forward."""
    count = 16
    groups = [dataclasses.replace(prebuilt_group(**size.group), group_id=number) for number in range(count)]
    marks = [time.perf_counter()]
    plan = plan_update(
        groups,
        objective=Agrpo(AgrpoConfig(k=size.k, timestep_sampling="uniform")),
        run_seed=0,
        update_index=0,
        eos_ids=(),
        ranks=1,
        views_per_forward=16,
    )
    marks.append(time.perf_counter())
    for forward in plan.forwards[0]:
        build_batch(forward.views, groups, mask_id=0, pad_id=1)
    marks.append(time.perf_counter())
    return {"plan s": (marks[1] - marks[0]) / count, "build batches s": (marks[2] - marks[1]) / count}


def publish_to(count: int, size: Size) -> dict[str, Any]:
    """Publish one adapter to ``count`` actors, each with parameters of its own. Figures are None where it doesn't fit
    into this machine's memory."""
    shapes = adapter_shapes(**size.adapter)
    nbytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    row: dict[str, Any] = {"holders": count, "adapter MB": nbytes / 1e6}
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if count * (1.1 * nbytes + 0.4e9) + 3 * nbytes > max(free, _available()):
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


class _Ranks:
    """They are ready at once."""

    def update(self, items: Sequence[ReplayItem], pump: Callable[[], None]) -> None:
        return

    def publish(self, version: int, pump: Callable[[], None]) -> Weights:
        return BASE_WEIGHTS._replace(version=version)

    def report(self) -> None:
        return


def _available() -> int:
    with open("/proc/meminfo") as lines:
        kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), "0")
    return int(kilobytes) * 1024


if __name__ == "__main__":
    sys.exit(report.main("control", run))
