"""What a cell's run and evaluation left behind, as one JSON object: ``machine`` depends on the machine, all else
repeats.

Shapes: I iterations, N problems.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from learner.comparison.cells import Cell
from learner.evaluation.drive import REPORT, RESULTS
from learner.evaluation.results import read_chunks
from learner.reporting.metrics_file import read_rows
from learner.runs.directory import RunDirectory
from rewards.errors import DataError


def results_of(cell: Cell, run: RunDirectory, evaluation: Path) -> dict[str, Any]:
    """Of a finished run and its evaluation.

    Raises:
        DataError: they lack something.
    """
    rows = read_rows(run.metrics_path)
    trained = [row for row in rows if "loss" in row]
    if [row["iteration"] for row in trained] != list(range(1, cell.iterations + 1)):
        raise DataError(f"{run.metrics_path} doesn't hold all {cell.iterations} iterations")
    cost_I = np.cumsum([row["forward_equivalents"] for row in trained])
    seconds_I = np.cumsum([row["time/iteration_s"] for row in trained])
    curve = [row for row in rows if any(name.startswith("eval/") for name in row)]
    at = [row["iteration"] for row in curve]
    norms = [row["grad_norm"] for row in trained if isinstance(row["grad_norm"], float)]
    return {
        "iterations": cell.iterations,
        "spent": {"total": float(cost_I[-1]), "an iteration": float(cost_I[-1]) / cell.iterations},
        "solved": _solved(evaluation),
        "curve": {
            "iteration": at,
            "forward_equivalents": [float(cost_I[i - 1]) if i else 0.0 for i in at],
            "solve_rate": {
                str(count): [row.get(_metric(cell.run.rollout.sampler.steps // count)) for row in curve]
                for count in cell.step_counts
            },
        },
        "training_solve_rate": [row.get("solve_rate") for row in trained],
        "grad_norm": {"mean": _mean(norms), "deviation": _deviation(norms)},
        "no_signal_share": _mean([row["groups/no_signal_share"] for row in trained]),
        "machine": {
            "train_s": float(seconds_I[-1]),
            "curve_s": [float(seconds_I[i - 1]) if i else 0.0 for i in at],
            "rollout_s": sum(row["time/rollout_wait_s"] for row in trained),
            "update_s": sum(row["time/update_s"] for row in trained),
        },
    }


def _solved(folder: Path) -> dict[str, dict[str, str]]:
    """By number of denoising steps, of base and trained: a 1 for each problem that is solved and a 0 for each other, in
    the order of problems."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the evaluation in {folder} can't be read: {error}") from error
    if not report["complete"]:
        raise DataError(f"the evaluation in {folder} isn't complete")
    steps = {cell["key"]: str(cell["steps"]) for cell in report["cells"]}
    solved = {count: {"base": "", "trained": ""} for count in steps.values()}
    for at, chunk in sorted(read_chunks(folder / RESULTS).items(), key=lambda item: item[0].chunk):
        policy = "trained" if at.policy == "adapter" else "base"
        solved[steps[at.cell]][policy] += "".join(str(problem["correct"][0]) for problem in chunk.problems)
    return solved


def _metric(divisor: int) -> str:
    """Of an evaluation on the way, in so many times fewer steps than in training."""
    return f"eval/{'m' if divisor == 1 else f'm/{divisor}'}/solve_rate"


def outcomes(solved: str) -> np.ndarray:
    """[N] float64, 1 where a problem is solved."""
    return np.array([float(digit) for digit in solved])


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
