"""Service times of a run: given, measured by a run, or estimated by ``learner.plan``."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.planning.fit import plan_run
from learner.planning.hardware import on_gpus, this_machine
from learner.planning.prompts import prompt_tokens
from learner.planning.shapes import model_shape
from learner.reporting.metrics_file import read_rows
from learner.settings.run import RunConfig
from learner.simulation.settings import SimulationConfig
from rewards.errors import DataError

LEASE_SPREAD, UPDATE_SPREAD = 0.2, 0.05
LOAD_MB_S, PUBLISH_MB_S = 1000.0, 500.0
"""Assumed where nothing is known: how fast an actor copies and hashes, and rank 0 and the controller together."""


@dataclass(frozen=True)
class Times:
    """What things take: seconds, shares, 10^6 bytes."""

    lease_s: float
    """Of a whole lease, weights held."""
    lease_spread: float
    load_s: float
    update_s: float
    update_spread: float
    publish_s: float
    adapter_mb: float
    group_mb: float
    sources: Mapping[str, str]
    """Where each figure is from."""


def times_of(config: SimulationConfig, run: Path | None, before: RunConfig | None, gpu: str | None) -> Times:
    """What is given counts first, then what ``run`` measured with its settings ``before``, then the estimate for the
    settings; spreads and the pace of copies are assumed where nobody knows.

    Args:
        gpu: model of the GPUs that an estimate assumes; None: the CPUs of this machine.

    Raises:
        DataError: the run has no finished iterations to measure.
        ConfigError: the settings can't be planned.
    """
    given = {name: value for name in _NAMES if (value := getattr(config, name)) is not None}
    measured = {} if run is None or before is None else _scaled(measured_by(run, before), before, config)
    found = {**measured, **given}
    source = {name: "given" if name in given else "the run" for name in found}
    if absent := [name for name in _NAMES if name not in found and name not in _ASSUMED]:
        estimate = estimated(config, gpu)
        found |= {name: estimate[name] for name in absent}
        source |= dict.fromkeys(absent, "learner.plan")
    for name in _ASSUMED:
        if name not in found:
            found[name] = _ASSUMED[name](found["adapter_mb"])
            source[name] = "assumed"
    return Times(**{name: found[name] for name in _NAMES}, sources=source)


def measured_by(run: Path, before: RunConfig) -> dict[str, float]:
    """What the rows of a run say, the first one left out because it warms up."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if "time/update_s" in row and "time/lease/load_s" in row]
    if len(rows) < 3:
        raise DataError(
            f"{run / 'metrics.jsonl'} has {len(rows)} finished iterations with the times of their leases, at least 3 "
            "are needed; give lease_s=..., update_s=... and publish_s=..., or a run that got further"
        )
    rows = rows[1:]
    rollout = before.rollout
    leases = -(-rollout.prompts_per_iteration // rollout.groups_per_lease)
    lease = [row["time/lease/generate_s"] + row["time/lease/grade_wait_s"] for row in rows]
    update = [row["time/update_s"] for row in rows]
    loading = min(rollout.wanted_actors, leases)
    found = {
        "lease_s": statistics.mean(lease),
        # A row has the mean over an iteration's leases, whose deviation is smaller by the root of their number.
        "lease_spread": _spread(lease) * leases**0.5,
        # Actors load once a version, and the rows have the mean over all leases.
        "load_s": statistics.median(row["time/lease/load_s"] for row in rows) * leases / loading,
        "update_s": statistics.mean(update),
        "update_spread": _spread(update),
        "publish_s": statistics.median(row["time/publish_s"] for row in rows),
    }
    adapter = run / "adapter" / "adapter_model.safetensors"
    return found | ({"adapter_mb": adapter.stat().st_size / 1e6} if adapter.is_file() else {})


def estimated(config: RunConfig, gpu: str | None) -> dict[str, float]:
    """``learner.plan``'s estimate for these settings."""
    processes = config.learner.ranks + config.rollout.wanted_actors
    if gpu is not None:
        of_one = {"gpus_per_rank": 1.0, "gpus_per_actor": 1.0}
        config = config.model_copy(update={"resources": config.resources.model_copy(update=of_one)})
    hardware = on_gpus(processes, None, gpu) if gpu is not None else this_machine(config)
    prompt, source = prompt_tokens(config)
    plan = plan_run(config, model_shape(config), hardware, prompt=prompt, prompt_source=source)
    rollout = config.rollout
    leases = -(-rollout.prompts_per_iteration // rollout.groups_per_lease)
    of_the_busiest = -(-leases // rollout.wanted_actors)
    return {
        "lease_s": plan.time.rollout / of_the_busiest,
        "update_s": plan.time.learn,
        "adapter_mb": plan.work.published / 1e6,
        "group_mb": plan.work.trajectories / 1e6 / rollout.prompts_per_iteration,
    }


_ASSUMED: Mapping[str, Any] = {
    "lease_spread": lambda adapter_mb: LEASE_SPREAD,
    "update_spread": lambda adapter_mb: UPDATE_SPREAD,
    "load_s": lambda adapter_mb: adapter_mb / LOAD_MB_S,
    "publish_s": lambda adapter_mb: adapter_mb / PUBLISH_MB_S,
}
_NAMES = (
    "lease_s", "lease_spread", "load_s", "update_s", "update_spread", "publish_s", "adapter_mb", "group_mb",
)  # fmt: skip


def _scaled(measured: dict[str, float], before: RunConfig, now: RunConfig) -> dict[str, float]:
    """Leases take as long as they have completions, and so do updates."""
    size = now.rollout.group_size / before.rollout.group_size
    lease = size * now.rollout.groups_per_lease / before.rollout.groups_per_lease
    update = size * now.rollout.prompts_per_iteration / before.rollout.prompts_per_iteration
    return measured | {"lease_s": measured["lease_s"] * lease, "update_s": measured["update_s"] * update}


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) / statistics.mean(values)
