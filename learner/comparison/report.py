"""results.json: what a comparison found, with intervals. Only what is under ``machine`` may differ between two equal
comparisons.

Shapes: N problems of a seed.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from learner.comparison.cells import Cell, Found, chosen_point, full_rate, known_cells, reported_cells, tuning_cells
from learner.comparison.findings import outcomes
from learner.comparison.intervals import seed_spread, seeds_and_problems
from learner.comparison.settings import ComparisonConfig
from rollout.seeds import numpy_generator

FORMAT = 1


def comparison_report(config: ComparisonConfig, found: Found, noise: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON-able; of the cells that are done. ``noise``: of the methods' gradients, as far as it was measured."""
    cells = [*known_cells(config, found, "tuning"), *known_cells(config, found, "reported")]
    waiting = [cell.name for cell in cells if cell.name not in found]
    untuned = [
        method for method in config.methods if any(cell.name not in found for cell in tuning_cells(config, method))
    ]
    done = {method: _done(reported_cells(config, method, found), found) for method in config.methods}
    rates, differences = _estimates(config, done, found)
    return {
        "format": FORMAT,
        "settings": config.model_dump(mode="json", exclude={"out", "known", "pace", "run_limit_s"}),
        "reference": next(iter(config.methods)),
        "complete": not waiting,
        "unfinished": waiting + [f"{method}'s reported runs" for method in untuned],
        "methods": {
            method: {
                **_method_report(config, method, done[method], found),
                "solve_rate": rates[method],
                "difference": differences[method],
                "gradient_noise": (noise or {}).get(method),
            }
            for method in config.methods
        },
        "cells": {cell.name: _cell_report(cell, found) for cell in cells if cell.name in found},
        "machine": {
            "methods": _machine_reports(done, found),
            "cells": {name: findings.results["machine"] for name, findings in found.items() if findings.results},
        },
    }


def _method_report(config: ComparisonConfig, method: str, cells: Sequence[Cell], found: Found) -> dict[str, Any]:
    tuning = tuning_cells(config, method)
    results = [found[cell.name].results for cell in cells]
    tried = [cell for cell in tuning if cell.name in found]
    return {
        "point": chosen_point(config, method, found),
        "tuning": {
            "cells": [
                {"name": cell.name, "point": dict(cell.point), "seed": cell.seed, "solve_rate": _full_rate(cell, found)}
                for cell in tried
            ],
            "spent": sum(found[cell.name].results["spent"]["total"] for cell in tried if found[cell.name].results),
        },
        "seeds": [cell.seed for cell in cells],
        "runs": [cell.name for cell in cells],
        "iterations": sorted({each["iterations"] for each in results}),
        "spent": _mean([each["spent"]["total"] for each in results]),
        "base": {
            steps: fmean(outcomes(each["solved"][steps]["base"]).mean() for each in results)
            for steps in _step_counts(results)
        },
        "grad_norm": {name: _mean([each["grad_norm"][name] for each in results]) for name in ("mean", "deviation")},
        "no_signal_share": _mean([each["no_signal_share"] for each in results]),
        "curve": _mean_curve(results),
        "failed": {
            cell.name: findings.failed
            for cell in [*tuning, *reported_cells(config, method, found)]
            if (findings := found.get(cell.name)) and findings.failed
        },
    }


Estimates = dict[str, dict[str, dict[str, Any]]]
"""By method and number of steps."""


def _estimates(
    config: ComparisonConfig, done: Mapping[str, Sequence[Cell]], found: Found
) -> tuple[Estimates, Estimates]:
    """Each method's solve rates, and their differences from the first method's on the same seeds and problems."""
    reference = next(iter(config.methods))
    rates: Estimates = {method: {} for method in done}
    differences: Estimates = {method: {} for method in done}
    for steps in _step_counts([found[cell.name].results for cells in done.values() for cell in cells]):
        trained = {method: _outcomes(cells, steps, found) for method, cells in done.items() if cells}
        theirs = trained.get(reference, {})
        against = {
            method: {seed: values_N - theirs[seed] for seed, values_N in ours.items() if seed in theirs}
            for method, ours in trained.items()
            if method != reference
        }
        for what, table, values in (("rate", rates, trained), ("difference", differences, against)):
            by_method = {method: list(by_seed.values()) for method, by_seed in values.items() if by_seed}
            spread = seed_spread(list(by_method.values()))
            for method, by_seed in by_method.items():
                rng = numpy_generator(0, "comparison bootstrap", what, method, steps)
                interval = seeds_and_problems(
                    by_seed,
                    spread,
                    confidence=config.statistics.confidence,
                    resamples=config.statistics.resamples,
                    rng=rng,
                )
                means = [float(values_N.mean()) for values_N in by_seed]
                table[method][steps] = {"value": fmean(means), "interval": list(interval), "by_seed": means}
    return rates, differences


def _outcomes(cells: Sequence[Cell], steps: str, found: Found) -> dict[int, np.ndarray]:
    """By seed, [N] float64: 1 where the trained policy solved the problem."""
    return {cell.seed: outcomes(found[cell.name].results["solved"][steps]["trained"]) for cell in cells}


def _step_counts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the evaluations, the largest first."""
    return sorted({steps for each in results for steps in each["solved"]}, key=int, reverse=True)


def _mean_curve(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds of the evaluations on the way, whose iterations are the same for all."""
    if not results:
        return {}
    curves = [each["curve"] for each in results]
    return {
        "forward_equivalents": [
            fmean(at) for at in zip(*(curve["forward_equivalents"] for curve in curves), strict=True)
        ],
        "solve_rate": {
            steps: [fmean(at) for at in zip(*(curve["solve_rate"][steps] for curve in curves), strict=True)]
            for steps in curves[0]["solve_rate"]
        },
    }


def _cell_report(cell: Cell, found: Found) -> dict[str, Any]:
    findings = found[cell.name]
    about = {"key": cell.key, "method": cell.method, "role": cell.role, "point": dict(cell.point), "seed": cell.seed}
    kept = {name: value for name, value in findings.results.items() if name != "machine"}
    return {**about, "arguments": cell.arguments, "failed": findings.failed, **kept}


def _machine_reports(done: Mapping[str, Sequence[Cell]], found: Found) -> dict[str, dict[str, Any]]:
    """Seconds, memory, and how far each method had come when the quickest one was done."""
    machines = {
        method: [found[cell.name].results["machine"] for cell in cells] for method, cells in done.items() if cells
    }
    train_s = {method: fmean(each["train_s"] for each in machine) for method, machine in machines.items()}
    reports = {}
    for method, machine in machines.items():
        curves = [_most_steps(found[cell.name].results["curve"]["solve_rate"]) for cell in done[method]]
        reports[method] = {
            "train_s": train_s[method],
            "curve_s": [fmean(at) for at in zip(*(each["curve_s"] for each in machine), strict=True)],
            "peak_rank_bytes": max((each["peak_rank_bytes"] or 0 for each in machine), default=0) or None,
            "equal_seconds": min(train_s.values()),
            "solve_rate_at_equal_seconds": fmean(
                _rate_at(min(train_s.values()), each["curve_s"], curve)
                for each, curve in zip(machine, curves, strict=True)
            ),
        }
    return reports


def _most_steps(by_count: Mapping[str, Any]) -> Any:
    return by_count[max(by_count, key=int)]


def _rate_at(seconds: float, curve_s: Sequence[float], rates: Sequence[float]) -> float:
    """On the line between two evaluations."""
    return float(np.interp(seconds, curve_s, rates))


def _done(cells: Sequence[Cell], found: Found) -> list[Cell]:
    return [cell for cell in cells if cell.name in found and not found[cell.name].failed]


def _full_rate(cell: Cell, found: Found) -> float | None:
    return None if found[cell.name].failed else full_rate(found[cell.name])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
