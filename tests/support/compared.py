"""Comparisons at the size of tests, and findings as their runs would leave them."""

import json
from pathlib import Path
from typing import Any

from learner.comparison.budget import planned_cost
from learner.comparison.cells import Cell, Findings, reported_cells, tuning_cells
from learner.comparison.report import comparison_report
from learner.comparison.settings import ComparisonConfig, load_comparison


def plan(*arguments: str, **how: Any) -> ComparisonConfig:
    return load_comparison(["plan=smoke", *arguments], **how)


def done(cell: Cell, rate: float, *, spent_share: float = 1.0) -> Findings:
    """As of a run that solved this share of 8 problems and spent this share of its full cost."""
    right = round(8 * rate)
    solved = "1" * right + "0" * (8 - right)
    total = spent_share * cell.iterations * planned_cost(cell.run)
    results = {
        "iterations": cell.iterations,
        "spent": {"total": total, "an iteration": total / cell.iterations},
        "solved": {steps: {"base": "10000000", "trained": solved} for steps in ("8", "4", "2")},
        "curve": {
            "iteration": [0, cell.iterations],
            "forward_equivalents": [0.0, total],
            "solve_rate": {"8": [0.125, rate], "4": [0.1, 0.2], "2": [0.0, 0.1]},
        },
        "training_solve_rate": [rate] * cell.iterations,
        "grad_norm": {"mean": 0.5, "deviation": 0.1},
        "no_signal_share": 0.25,
        "machine": {"train_s": 20.0, "curve_s": [0.0, 20.0], "peak_rank_bytes": 1 << 29, "wall_s": 30.0},
    }
    return Findings(cell.key, None, results)


def all_done(config: ComparisonConfig, rates: dict[str, float]) -> dict[str, Findings]:
    found: dict[str, Findings] = {}
    for method in config.methods:
        found |= {cell.name: done(cell, rates[method]) for cell in tuning_cells(config, method)}
        found |= {cell.name: done(cell, rates[method]) for cell in reported_cells(config, method, found)}
    return found


def written(folder: Path, config: ComparisonConfig, found: dict[str, Findings]) -> dict[str, Any]:
    """The report, which is then in the folder's results.json."""
    report = comparison_report(config, found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report))
    return report
