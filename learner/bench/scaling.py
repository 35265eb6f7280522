"""Real runs of actors without a model against the simulation of the same runs.

    python -m learner.bench.scaling [--small] [--out FOLDER]

Real Ray actors wait for as long as a lease would take and return a prebuilt group; ranks that do nothing but wait take
in what they deliver. Pool, feed, ledger, replay buffer, object store and publishing are the product's. Then
``learner.simulation`` gets the service times that this run had (mean and spread of leases, of updates, and what
publishing took) and replays it in virtual time.

*Error* is the simulated throughput's distance from the real one. Since nobody computes, cores matter little.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import concurrent.futures
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from learner.bench import report
from learner.bench.measure import machine
from learner.bench.model_free import ModelFreeSettings
from learner.bench.model_free_pool import start_model_free, tell_fault
from learner.ranks.rank import PublishedAdapter
from learner.runs.local_ray import local_ray
from learner.simulation.cycle import Cycle, make_cycle
from learner.simulation.replay import simulate
from learner.simulation.settings import SimulationConfig, load_simulation
from learner.simulation.spread import Spread
from learner.simulation.times import Times
from learner.supply.publish import publish
from learner.supply.pumping import pump_until
from rollout.adapters import digest, pack
from rollout.ledger import Ledger
from rollout.messages import LeaseReport, Weights
from rollout.replay import ReplayBuffer, ReplayItem

LIMIT_S = 240.0
LARGEST_ERROR = 0.15
TABLES = {
    "Simulated against real": [
        "actors", "max_staleness", "groups/s", "simulated groups/s", "error", "actors idle", "simulated actors idle",
        "learner idle", "simulated learner idle", "staleness", "simulated staleness",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    actors: tuple[int, ...]
    staleness: tuple[int, ...]
    iterations: int
    lease_s: float
    update_s: float
    group: dict[str, int]


FULL = Size(
    actors=(2, 4, 8, 16),
    staleness=(0, 1),
    iterations=10,
    lease_s=0.3,
    update_s=0.6,
    group={"size": 8, "prompt": 64, "completion": 64, "block": 16, "steps": 32, "kept": 50, "vocabulary": 32_000},
)
SMALL = Size(
    actors=(2,),
    staleness=(1,),
    iterations=5,
    lease_s=0.05,
    update_s=0.2,
    group={"size": 2, "prompt": 4, "completion": 16, "block": 8, "steps": 8, "kept": 4, "vocabulary": 100},
)
SPREAD = 0.3
WARM_UP = 3


def run(*, small: bool = False) -> dict[str, Any]:
    """Everything, as ``report`` stores it."""
    size, about = SMALL if small else FULL, machine(threads=1)
    with local_ray(num_cpus=4, object_store_memory=10**9, logging_level=logging.ERROR):
        rows = [compare(actors, staleness, size) for actors in size.actors for staleness in size.staleness]
    worst = max(abs(row["error"]) for row in rows)
    bars = [] if small else [report.bar("largest error of the throughput", worst, LARGEST_ERROR, at_least=False)]
    return {"benchmark": "scaling", "small": small, "machine": about, "rows": rows, "tables": TABLES, "bars": bars}


def compare(actors: int, staleness: int, size: Size) -> dict[str, Any]:
    """One real run, and its simulation with the service times that it had."""
    config = settings(staleness, size)
    ran, cycle, seconds = real_run(config, actors, size)
    first = WARM_UP
    begin, end = cycle.marks.begun[first], cycle.marks.published[-1]
    updates = [b - a for a, b in zip(cycle.marks.gathered, cycle.marks.updated, strict=True)][first:]
    published = [b - a for a, b in zip(cycle.marks.updated, cycle.marks.published, strict=True)][first:]
    leases = ran.lease_s
    times = Times(
        lease_s=statistics.mean(leases),
        lease_spread=statistics.stdev(leases) / statistics.mean(leases),
        load_s=0.0,
        update_s=statistics.mean(updates),
        update_spread=statistics.stdev(updates) / statistics.mean(updates),
        publish_s=statistics.mean(published),
        adapter_mb=0.0,
        group_mb=0.0,
        sources={},
    )
    simulated = simulate(config, times, actors)
    consumed = [stale for iteration in cycle.staleness[first:] for stale in iteration]
    rate = len(consumed) / (end - begin)
    worked = ran.worked_between(begin, end)
    return {
        "actors": actors,
        "max_staleness": staleness,
        "groups/s": rate,
        "simulated groups/s": simulated.groups_per_s,
        "error": simulated.groups_per_s / rate - 1,
        "actors idle": 1 - worked / (actors * (end - begin)),
        "simulated actors idle": simulated.actors_idle,
        "learner idle": 1 - sum(updates) / (end - begin),
        "simulated learner idle": simulated.learner_idle,
        "staleness": statistics.mean(consumed),
        "simulated staleness": simulated.staleness_mean,
        "seconds": seconds,
    }


def settings(staleness: int, size: Size) -> SimulationConfig:
    """Of the real run and of the simulated one."""
    arguments = (
        "recipe=smoke", f"iterations={size.iterations}", f"warm_up={WARM_UP}",
        f"run.iterations={WARM_UP + size.iterations + staleness + 1}",
        "rollout.prompts_per_iteration=16", "rollout.groups_per_lease=1", f"rollout.max_staleness={staleness}",
    )  # fmt: skip
    return load_simulation(arguments, None)[0]


def real_run(config: SimulationConfig, actors: int, size: Size) -> tuple["TimedReplay", Cycle, float]:
    """Leases as they were taken in, the cycle that is over, and how long it took."""
    pool = start_model_free(ModelFreeSettings(size.group, size.lease_s, SPREAD), actors, start_timeout_s=LIMIT_S)
    try:
        replays: list[TimedReplay] = []

        def make_replay(ledger: Ledger) -> ReplayBuffer:
            replays.append(TimedReplay(ledger))
            return replays[0]

        cycle = make_cycle(config, pool, make_replay, time.monotonic, tell_fault)
        learner = WaitingLearner(Spread(size.update_s, SPREAD / 3, "waiting learner"))
        begin = time.monotonic()
        cycle.run(learner, learner.publish(0, lambda: None), time.monotonic, iterations=WARM_UP + size.iterations)
        return replays[0], cycle, time.monotonic() - begin
    finally:
        pool.close()


class TimedReplay(ReplayBuffer):
    """The replay buffer, which notes when which lease came and how long it had taken."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.lease_s: list[float] = []
        self._spans: list[tuple[float, float]] = []

    def deliver(self, report: LeaseReport, refs: Sequence[Any]) -> list[int]:
        now = time.monotonic()
        self.lease_s.append(report.generate_s)
        self._spans.append((now - report.generate_s, now))
        return super().deliver(report, refs)

    def worked_between(self, begin: float, end: float) -> float:
        """Seconds that actors worked on leases which have been delivered."""
        return sum(max(0.0, min(b, end) - max(a, begin)) for a, b in self._spans)


@dataclass
class WaitingLearner:
    """Ranks that take their time and compute nothing; what they publish is put and hashed."""

    seconds: Spread
    adapter: PublishedAdapter = field(init=False)

    def __post_init__(self) -> None:
        state = pack({"model.lora_A.weight": torch.zeros(16, 64)})
        self.adapter = PublishedAdapter(state, digest(state), {})

    def update(self, items: Sequence[ReplayItem], pump: Callable[[], None]) -> None:
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            pump_until(thread.submit(time.sleep, self.seconds.draw()), pump)

    def publish(self, version: int, pump: Callable[[], None]) -> Weights:
        return publish(version, self.adapter)

    def report(self) -> None:
        return


if __name__ == "__main__":
    sys.exit(report.main("scaling", run))
