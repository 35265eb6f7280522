"""Run stores as training leaves them, with curves that look like a run's: for the pages, screenshots and speed."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from learner.settings.run import load_config
from services.store.writer import StoreWriter

CONFIG: dict[str, Any] = load_config(["recipe=sudoku", "run.iterations=200"]).model_dump(mode="json")


def figures(iteration: int, *, seed: int = 0, total: int = 200) -> dict[str, float]:
    """Metrics of one iteration; the same for the same iteration and seed."""
    draw = np.random.default_rng([seed, iteration])
    progress = 1 - math.exp(-4 * iteration / total)
    solved = min(1.0, max(0.0, 0.1 + 0.6 * progress + 0.05 * draw.normal()))
    seconds = {"rollout_wait": 1.2 + 0.2 * draw.random(), "update": 1.4 + 0.3 * draw.random(), "publish": 0.02}
    parts = {"cells": 1.7 + 0.8 * progress + 0.05 * draw.normal(), "clues": 0.5, "length": 0.25}
    return {
        "reward/mean": sum(parts.values()),
        **{f"reward/{name}": value for name, value in parts.items()},
        "solve_rate": solved,
        "entropy": 0.05 + 0.1 * (1 - progress) + 0.005 * draw.random(),
        "loss": 0.2 * draw.normal(),
        "grad_norm": 0.05 + 0.1 * draw.random(),
        "clip_fraction/low": 0.01 * draw.random(),
        "clip_fraction/high": 0.02 * draw.random(),
        "ratio/mean": 1 + 0.01 * draw.normal(),
        "ratio/max": 1.5 + draw.random(),
        "importance_weight/max": 9.5 + 0.5 * draw.random(),
        "staleness/mean": 0.6,
        "staleness/max": 1.0,
        "lr": 1e-3,
        "machine/tokens_per_s": 900 + 80 * draw.normal(),
        "forward_equivalents": 1600.0,
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "time/iteration_s": sum(seconds.values()) + 0.1,
        "ledger/issued": 16.0 * iteration + 16,
        "ledger/pending": 8.0,
        "ledger/leased": 4.0,
        "ledger/ready": 4.0,
        "ledger/consumed": 16.0 * iteration - 2,
        "ledger/dropped": 2.0,
        "ledger/dropped/too stale": 2.0,
        "machine/ledger_expired": 3.0,
        "my_own/metric": draw.normal(),
    }


def open_store(runs: Path, name: str, **about: Any) -> StoreWriter:
    """The writer of run ``name`` in the folder ``runs``."""
    (runs / name).mkdir(parents=True, exist_ok=True)
    about = {"task": "sudoku", "objective": "agrpo", "total_iterations": 200, "config": CONFIG} | about
    return StoreWriter(f"sqlite:///{runs / name / 'store.sqlite'}", name, **about)


def fill(store: StoreWriter, iterations: int, *, seed: int = 0, nan_at: int | None = None) -> None:
    """``iterations`` of metrics, and some of everything else; NaN for loss and gradient norm at one iteration."""
    store.event("info", "start", f"run {store.run_id}: started a local Ray with 3 logical CPUs")
    for iteration in range(1, iterations + 1):
        values = figures(iteration, seed=seed)
        if iteration == nan_at:
            values |= {"loss": math.nan, "grad_norm": math.inf}
            store.event("warning", "nonfinite", f"iteration {iteration}: 1 updates skipped, gradient norm inf")
        store.metrics(iteration, values)
        if iteration % 10 == 0 or iteration == 1:
            rates = {"m": 0.0, "m/2": 0.15, "m/4": 0.3}
            store.metrics(
                iteration,
                {f"eval/{steps}/solve_rate": max(0.0, values["solve_rate"] - less) for steps, less in rates.items()},
            )
        if iteration % 50 == 0:
            store.checkpoint(iteration, f"/runs/{store.run_id}/checkpoints/iteration-{iteration:06d}", {})
    add_sample(store, iterations, "<answer>4321123434122143</answer>", correct=True)
    add_sample(store, iterations, "<answer>4321123434122144</answer>", row=1)
    for name, role, version in (("rollout-0", "rollout", 1), ("rollout-1", "rollout", 0), ("learner-0", "learner", 1)):
        store.worker(
            name,
            role=role,
            status="idle" if role == "rollout" else "ready",
            node="node-a" if name != "rollout-1" else "node-b",
            pid=410,
            policy_version=iterations - 1 + version,
            restarts=1 if name == "rollout-1" else 0,
            last_error="ActorDiedError: killed" if name == "rollout-1" else None,
            data={"engine": {"engine": "torch", "device": "cpu", "parameters": 824960}, "memory_bytes": 813 * 2**20},
        )


def add_sample(store: StoreWriter, iteration: int, completion: str, *, row: int = 0, correct: bool = False) -> None:
    """A sampled completion without a trajectory."""
    store.sample(
        iteration,
        kind="train",
        group_id=0,
        row=row,
        problem_id="sudoku-train-0-995",
        prompt="Puzzle: 0000403100003140",
        completion=completion,
        correct=correct,
        rewards={"length": 0.25, "clues": 0.5, "cells": 2.5 if correct else 1.2},
        trajectory=b"",
    )


def finished(runs: Path, name: str, iterations: int = 60, *, seed: int = 0, **about: Any) -> None:
    """A run that has ended."""
    with open_store(runs, name, **about) as store:
        fill(store, iterations, seed=seed)
        store.status("finished", {"base": {"greedy": {"m": 0.0625}}, "trained": {"greedy": {"m": 0.75}}})
        assert store.flush(30)
