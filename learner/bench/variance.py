"""How noisy is the gradient estimate of a training run, and which timestep sampling makes it least noisy for its cost?

    python -m learner.bench.variance RUN_OR_CHECKPOINT --out DIR [--groups 128] [--k 1,2,4,8] [--seed 0] ...

Draws fresh groups from a checkpoint and splits the variance of AGRPO's gradient (trace of its covariance, over the
adapter's parameters) in two:

- rollout variance: over prompts and completions, with every step scored. No timestep sampling can lower it.
- timestep variance: over the draws of timesteps, given the completions. Exact (``learner.bench.estimators``).

Both are of one group's mean gradient; an update over n groups has 1/n of each, since groups are independent. Costs are
per completion: ``views``, the distinct (completion, step) states that the learner scores, forward and backward; and
``work``, in forward passes, drawing the completion included. Variance times cost does not depend on n, and is what an
estimator is to be chosen by: half of it means the same noise for half the cost. Intervals: 95 %, Bayesian bootstrap
over groups.

Writes variance.json, variance.md and variance.png into DIR. Shapes: N groups, E estimators, R bootstrap resamples.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from learner.bench.estimators import ALL_STEPS, DESIGNS, Estimator, draw_weights, expected_views, weight_covariance
from learner.bench.snapshot import GroupGradients, Snapshot, add_arguments, group_gradients, snapshot_of
from learner.bench.variance_plot import plot_variance
from learner.evaluation.intervals import percentile_interval
from learner.runs.atomic import atomic_write_text, disk_errors
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rewards.errors import DataError
from rollout.seeds import numpy_generator

FLOORS = (0.0, 0.1, 0.2, 0.3)
RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """What one figure needs of every group, by estimator."""

    estimators: tuple[Estimator, ...]
    timestep_EN: np.ndarray
    """[E, N] variance over the draws, given the group."""
    views_EN: np.ndarray
    """[E, N] expected views per completion."""
    weight_E: np.ndarray
    """[E] largest importance weight that a draw could have had."""
    bound_N: np.ndarray
    """[N] variance of one draw per completion from the best law there is, p proportional to the gradient's norm."""
    gram_NN: np.ndarray
    """[N, N] inner products of the groups' whole gradients (every step scored)."""
    forwards_N: np.ndarray
    """[N] forward passes that drew a completion."""
    correct_N: np.ndarray
    """[N] share of right completions."""


def grid(ks: Sequence[int], own: Estimator) -> tuple[Estimator, ...]:
    """All combinations, the run's own estimator among them, and every step scored."""
    laws = [("uniform", 0.0), *(("entropy", floor) for floor in FLOORS)]
    designs = [design for design in DESIGNS if design != "once apart"]
    found = [Estimator(law, floor, design, k) for law, floor in laws for design in designs for k in ks]  # type: ignore[arg-type]
    return (*found, *([] if own in found else [own]), ALL_STEPS)


def measure(groups: Iterable[GroupGradients], estimators: Sequence[Estimator]) -> Measured:
    """Every estimator's moments on every group."""
    timestep, views, weights, bounds, means, forwards, correct = [], [], [], [], [], [], []
    for group in groups:
        moments = [_moments(estimator, group) for estimator in estimators]
        timestep.append([variance for variance, _, _ in moments])
        views.append([count for _, count, _ in moments])
        weights.append([weight for _, _, weight in moments])
        bounds.append(least_variance(group))
        means.append(group.mean_P)
        forwards.append(group.forwards)
        correct.append(group.correct)
    mean_NP = np.stack(means).astype(np.float64)
    return Measured(
        estimators=tuple(estimators),
        timestep_EN=np.array(timestep).T,
        views_EN=np.array(views).T,
        weight_E=np.max(weights, axis=0),
        bound_N=np.array(bounds),
        gram_NN=mean_NP @ mean_NP.T,
        forwards_N=np.array(forwards),
        correct_N=np.array(correct),
    )


def least_variance(group: GroupGradients) -> float:
    """Least timestep variance of one independent draw per completion, over all laws: p proportional to the norm."""
    G = len(group.table.eligible_Gm)
    scaled_N = 1.0 / (G * group.table.denominator_G[group.rows_N])
    same_NN = group.rows_N[:, None] == group.rows_N
    norms_N = np.sqrt(np.diag(group.gram_NN)) * scaled_N
    gram_NN = group.gram_NN * np.outer(scaled_N, scaled_N)
    return float((np.outer(norms_N, norms_N) - gram_NN)[same_NN].sum())


def analyse(measured: Measured, own: Estimator, *, view_cost: float, seed: int) -> dict[str, Any]:
    """All figures with intervals, as plain data. Ratios are to the run's ``own`` estimator, on the same resamples.

    Args:
        view_cost: forward passes that a view costs the learner.

    Raises:
        DataError: when all gradients are 0.
    """
    N = len(measured.gram_NN)
    if not measured.gram_NN.any():
        raise DataError(f"none of the {N} groups has a signal (a gradient): take another snapshot, or more --groups")
    counts_RN = resamples(N, seed)
    rollout_R = rollout_variance(measured.gram_NN, counts_RN)
    figures = figures_of(measured, rollout_R, counts_RN, view_cost)
    timestep_RE = figures["timestep_variance"]
    index = measured.estimators.index(own)
    for name in ("timestep_x_views", "total_x_views", "total_x_work"):
        figures[f"{name}_ratio"] = figures[name] / figures[name][:, [index]]
    pairs = {
        e: measured.estimators.index(replace(estimator, design="none"))
        for e, estimator in enumerate(measured.estimators)
        if estimator.design in ("group", "row") and replace(estimator, design="none") in measured.estimators
    }
    rows = [
        {
            "law": estimator.law if estimator.k is not None else "all steps",
            "design": estimator.design,
            "k": estimator.k,
            "own": estimator == own,
            "largest_weight": float(measured.weight_E[e]),
            **{name: interval(values_RE[:, e]) for name, values_RE in figures.items()},
            "timestep_on_over_off": interval(timestep_RE[:, e] / timestep_RE[:, pairs[e]]) if e in pairs else None,
        }
        for e, estimator in enumerate(measured.estimators)
    ]
    gram_NN = measured.gram_NN
    signal = (gram_NN.sum() - np.trace(gram_NN)) / (N * (N - 1))
    return {
        "groups": N,
        "groups_with_signal": int((np.diag(gram_NN) > 0).sum()),
        "solve_rate": float(measured.correct_N.mean()),
        "rollout_variance": interval(rollout_R),
        "squared_mean_gradient": float(signal),
        "least_timestep_over_rollout": interval(counts_RN @ measured.bound_N / N / rollout_R),
        "forwards_per_completion": float(measured.forwards_N.mean()),
        "view_cost": view_cost,
        "estimators": rows,
    }


def figures_of(
    measured: Measured, rollout_R: np.ndarray, counts_RN: np.ndarray, view_cost: float
) -> dict[str, np.ndarray]:
    """[R, E] each, by name; ``rollout_R`` as ``rollout_variance`` gives it for these resamples."""
    N = len(measured.gram_NN)
    timestep_RE = counts_RN @ measured.timestep_EN.T / N
    views_RE = counts_RN @ measured.views_EN.T / N
    forwards_R1 = counts_RN @ measured.forwards_N[:, None] / N
    total_RE = rollout_R[:, None] + timestep_RE
    return {
        "views": views_RE,
        "timestep_variance": timestep_RE,
        "timestep_over_rollout": timestep_RE / rollout_R[:, None],
        "timestep_x_views": timestep_RE * views_RE,
        "total_x_views": total_RE * views_RE,
        "total_x_work": total_RE * (forwards_R1 + view_cost * views_RE),
    }


def resamples(groups: int, seed: int) -> np.ndarray:
    """[R, N] how often each resample takes each group; the sample itself comes first. The Bayesian bootstrap (Rubin
    1981): no resample leaves a group out altogether, so no ratio divides by 0."""
    weights_RN = groups * numpy_generator(seed, "variance bootstrap").dirichlet(np.ones(groups), size=RESAMPLES)
    return np.concatenate([np.ones((1, groups)), weights_RN])


def rollout_variance(gram_NN: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
    """[R] trace of the groups' sample covariance (divisor N-1), each group taken as often as ``counts_RN`` says."""
    N = len(gram_NN)
    squares_R = counts_RN @ np.diag(gram_NN)
    return (squares_R - np.einsum("rn,nk,rk->r", counts_RN, gram_NN, counts_RN, optimize=True) / N) / (N - 1)


def report(
    snapshot: Snapshot, groups: int, ks: Sequence[int], *, seed: int, device: str, view_cost: float
) -> dict[str, Any]:
    """Draw, measure and analyse; the content of variance.json."""
    started = time.perf_counter()
    own = Estimator.of(snapshot.objective)
    drawn = group_gradients(snapshot, groups, seed=seed, device=device)
    measured = measure(track(drawn, "groups", total=groups, console=Console(stderr=True)), grid(ks, own))
    progress = snapshot.checkpoint.progress
    return {
        "snapshot": {
            "path": str(snapshot.path),
            "base": snapshot.base,
            "task": snapshot.config.task.name,
            "iteration": progress.iteration,
            "adapter_digest": progress.adapter_digest,
        },
        "settings": {
            "objective": snapshot.objective.model_dump(mode="json"),
            "sampler": snapshot.config.rollout.sampler.model_dump(mode="json"),
            "group_size": snapshot.config.rollout.group_size,
            "groups_per_update": snapshot.config.rollout.prompts_per_iteration,
            "dtype": snapshot.config.learner.dtype,
            "device": device,
            "seed": seed,
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        **analyse(measured, own, view_cost=view_cost, seed=seed),
        "seconds": time.perf_counter() - started,
    }


IN_WORDS = {
    "none": "",
    "group": ", low discrepancy",
    "row": ", low discrepancy within each completion",
    "once": ", each step once",
    "once apart": ", each step once, low discrepancy off",
}
HEADINGS = (
    "law of a draw",
    "low disc.",
    "k",
    "views",
    "largest weight",
    "timestep / rollout variance",
    "timestep variance x views *",
    "total variance x views *",
    "total variance x work *",
)


def table_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells under ``HEADINGS``; the run's own setting is marked."""
    rows = []
    for row in found["estimators"]:
        every = row["k"] is None
        cells = [
            row["law"] + (" (this run)" if row["own"] else ""),
            "" if every else DESIGNS[row["design"]],
            "all" if every else str(row["k"]),
            f"{row['views']['value']:.2f}",
            f"{row['largest_weight']:.3g}",
            *(
                "0" if every and name.startswith("timestep") else told(row[name])
                for name in (
                    "timestep_over_rollout",
                    "timestep_x_views_ratio",
                    "total_x_views_ratio",
                    "total_x_work_ratio",
                )
            ),
        ]
        rows.append(tuple(cells))
    return rows


def summary_lines(found: dict[str, Any]) -> list[str]:
    """What the table is about, and what follows from it."""
    snapshot, rollout, n = found["snapshot"], found["rollout_variance"], found["settings"]["groups_per_update"]
    best = min(found["estimators"], key=lambda row: row["total_x_work_ratio"]["value"])
    name = "all steps" if best["k"] is None else f"{best['law']}, k={best['k']}"
    name += IN_WORDS[best["design"]]
    return [
        f"{snapshot['task']}, iteration {snapshot['iteration']}, sampled solve rate {found['solve_rate']:.3f}: "
        f"{found['groups']} groups, {found['groups_with_signal']} with a signal.",
        f"Rollout variance of a group's gradient {told(rollout)}, its squared mean "
        f"{found['squared_mean_gradient']:.3g}; an update has {n} groups and 1/{n} of the variance.",
        f"The best law of independent draws there is (p by the gradient's norm, which isn't known before) would have "
        f"{told(found['least_timestep_over_rollout'])} / k of the rollout variance as timestep variance.",
        f"* relative to this run's setting. Work of a completion: {found['forwards_per_completion']:g} forwards to "
        f"draw it and {found['view_cost']:g} for each view.",
        f"Least total variance x work: {name}, {told(best['total_x_work_ratio'])} of this run's.",
    ]


def markdown(found: dict[str, Any]) -> str:
    lines = [*summary_lines(found)[:1], "", f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(found)]
    return "\n".join([*lines, "", *summary_lines(found)[1:]]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when the checkpoint can't be used, 2 for wrong settings."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m learner.bench.variance", description=__doc__.partition("\n")[0])
    add_arguments(parser, out="folder for variance.json, .md and .png", ks="1,2,4,8")
    arguments = parser.parse_args(argv)
    snapshot, ks = snapshot_of(arguments)
    found = report(
        snapshot,
        arguments.groups,
        ks,
        seed=arguments.seed,
        device=arguments.device,
        view_cost=arguments.view_cost,
    )
    with disk_errors(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot_variance(found, arguments.out / "variance.png")
    atomic_write_text(arguments.out / "variance.json", json.dumps(found, indent=2) + "\n")
    atomic_write_text(arguments.out / "variance.md", markdown(found))
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(*HEADINGS)
    for row in table_rows(found):
        table.add_row(*row, style="bold" if row[0].endswith("(this run)") else None)
    console.print(table)
    console.print("\n".join(summary_lines(found)), markup=False, highlight=False, soft_wrap=True)
    return 0


def _moments(estimator: Estimator, group: GroupGradients) -> tuple[float, float, float]:
    """Timestep variance, views per completion, largest importance weight."""
    G, m = group.table.eligible_Gm.shape
    cells_N = group.rows_N * m + group.steps_N
    size_Gm = np.abs(group.credit_Gm)
    covariance_NN = weight_covariance(estimator, group.table, size_Gm)[np.ix_(cells_N, cells_N)]
    variance = max(0.0, float((covariance_NN * group.gram_NN).sum()))  # 0 may come out as -1e-20
    live_G = np.isin(np.arange(G), group.rows_N)
    views = float(expected_views(estimator, group.table, size_Gm)[live_G].sum()) / G
    return variance, views, float(draw_weights(estimator, group.table, size_Gm)[live_G].max(initial=0.0))


def interval(values_R: np.ndarray) -> dict[str, float]:
    """The sample's value, which comes first, and the interval of the resamples."""
    low, high = percentile_interval(values_R[1:])
    return {"value": float(values_R[0]), "low": low, "high": high}


def told(figure: dict[str, float]) -> str:
    """A figure and its interval, as tables have them."""
    value, low, high = (_rounded(figure[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _rounded(x: float) -> str:
    return f"{x:.2f}" if x >= 0.095 else f"{x:.2g}"


if __name__ == "__main__":
    sys.exit(main())
