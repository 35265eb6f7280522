"""From the completions of all chunks to rates with intervals: results.json.

Shapes: N problems, R resamples of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from learner.evaluation.cells import Cell
from learner.evaluation.intervals import best_of_k, bootstrap_means, pass_at_k, percentile_interval, wilson
from learner.evaluation.results import POLICIES, Chunk, rewards_of
from rewards.diversity import distances_to_others, distinct_share
from rollout.seeds import numpy_generator

_COMPARED = 32
"""Texts that are compared with each other: their pairs take time."""

Evaluated = Mapping[tuple[Cell, str], Sequence[Chunk]]
"""All chunks, in order, of the (cell, policy) pairs that are complete."""


def cell_reports(
    evaluated: Evaluated,
    *,
    pass_at: Sequence[int],
    confidence: float,
    resamples: int,
    seed: int,
    naturalness: Mapping[tuple[Cell, str], np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """A JSON-able report per cell: its description, a mapping per policy, and the paired difference of the two.

    Equal completions give equal reports, bit for bit: the bootstrap's draws are a function of ``seed``.

    Args:
        naturalness: [N] of each pair, where it was asked for.
    """
    values = {
        (cell, policy, metric): _values(cell, chunks, metric)
        for (cell, policy), chunks in evaluated.items()
        for metric in _metrics(cell, pass_at)
    }
    values |= {(*pair, "naturalness"): value_N for pair, value_N in (naturalness or {}).items()}
    if not values:
        return []
    rng = numpy_generator(seed, "evaluation bootstrap")
    means_RS = bootstrap_means(np.stack(list(values.values()), axis=1), resamples, rng)
    resampled = dict(zip(values, means_RS.T, strict=True))

    def estimate(value: float, resampled_R: np.ndarray) -> dict[str, Any]:
        interval = percentile_interval(resampled_R, confidence)
        return {"value": value, "interval": list(interval), "method": "bootstrap"}

    reports = []
    for cell in dict.fromkeys(cell for cell, _ in evaluated):
        report = cell.describe()
        for policy in POLICIES:
            if (cell, policy) not in evaluated:
                continue
            rates = {
                metric: estimate(float(value_N.mean()), resampled[cell, policy, metric])
                for (of_cell, of_policy, metric), value_N in values.items()
                if (of_cell, of_policy) == (cell, policy)
            }
            if cell.samples == 1:
                N, right = len(values[cell, policy, "solve_rate"]), int(values[cell, policy, "solve_rate"].sum())
                rates["solve_rate"] |= {"interval": list(wilson(right, N, confidence)), "method": "wilson"}
            report[policy] = rates | _figures(evaluated[cell, policy])
        if all(policy in report for policy in POLICIES):
            report["difference"] = {
                metric: estimate(
                    report["adapter"][metric]["value"] - report["base"][metric]["value"],
                    resampled[cell, "adapter", metric] - resampled[cell, "base", metric],
                )
                for (of_cell, of_policy, metric) in values
                if (of_cell, of_policy) == (cell, "adapter")
            }
        reports.append(report)
    return reports


def machine_reports(evaluated: Evaluated) -> list[dict[str, Any]]:
    """Speed per cell and policy: completion tokens per second of one actor's engine, over the seconds it worked."""
    reports = []
    for (cell, policy), chunks in evaluated.items():
        seconds = sum(chunk.generate_s for chunk in chunks)
        speed = sum(_each(chunks, "tokens")) / max(seconds, 1e-9)
        reports.append({"cell": cell.label, "policy": policy, "engine_s": seconds, "tokens_per_s": speed})
    return reports


def _metrics(cell: Cell, pass_at: Sequence[int]) -> list[str]:
    ks = pass_at if cell.decoding == "sampled" else ()
    return ["solve_rate", *(f"pass@{k}" for k in ks), *(f"best@{k}" for k in ks)]


def _values(cell: Cell, chunks: Sequence[Chunk], metric: str) -> np.ndarray:
    """The metric of each problem, [N] float64."""
    problems = [problem for chunk in chunks for problem in chunk.problems]
    name, _, k = metric.partition("@")
    if name == "best":
        return np.array([best_of_k(rewards_of(problem), int(k)) for problem in problems])
    right_N = np.array([sum(problem["correct"]) for problem in problems])
    if name == "solve_rate":
        return right_N / cell.samples
    return np.array([pass_at_k(cell.samples, right, int(k)) for right in range(cell.samples + 1)])[right_N]


def _figures(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Means over all completions. A component is None where the grader gave no number for one of them."""
    right, nfe, tokens = (_each(chunks, what) for what in ("correct", "nfe", "tokens"))
    components: dict[str, list[float | None]] = {}
    for chunk in chunks:
        for problem in chunk.problems:
            for name, given in problem["components"].items():
                components.setdefault(name, []).extend(given)
    return {
        "solved": sum(right),
        "completions": len(right),
        "mean_nfe": sum(nfe) / len(nfe),
        "mean_tokens": sum(tokens) / len(tokens),
        "components": {name: _mean(given) for name, given in components.items()},
        **_diversity([problem["completions"] for chunk in chunks for problem in chunk.problems]),
        "grader_failures": sum(chunk.grader_failures for chunk in chunks),
    }


def _diversity(texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of the completions of each problem, by ``rewards.diversity``: how many are different and how far apart they are,
    problem by problem; and how far apart the first ones of different problems are."""
    apart = [float(np.mean(distances_to_others(of_problem[:_COMPARED]))) for of_problem in texts]
    return {
        "distinct_share": float(np.mean([distinct_share(of_problem) for of_problem in texts])),
        "distance": float(np.mean(apart)),
        "distance_between_problems": float(
            np.mean(distances_to_others([of_problem[0] for of_problem in texts[:_COMPARED]]))
        ),
    }


def _each(chunks: Sequence[Chunk], what: str) -> list[int]:
    """One figure of every completion."""
    return [value for chunk in chunks for problem in chunk.problems for value in problem[what]]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
