"""What would better proposals of timesteps gain, and what do a step's neighbours know of its gradient?

    python -m learner.bench.proposals RUN_OR_CHECKPOINT --out DIR [--groups 128] [--k 1,2,4] [--seed 0] ...

AGRPO draws steps by the entropy that the rollout recorded. A better law would follow the norm of each step's gradient,
which nobody knows before it is computed. Two laws are learned here from norms: of a step alone, and of a step and its
entropy. Each is fitted to one half of the groups and judged on the other, and the other way round. Both halves are of
one policy; a learner would know the norms of an older one, so what is found here is what learning could gain at best.
Beside them stand the laws that the product has, and the norm itself, which no proposal can know: of independent draws
nothing is better. Where steps are taken once, a learned law counts over the whole group, not in a completion alone.

A gradient computed at one step could stand in for its neighbours' as far as it points where theirs do. The cosine is
that of two steps' gradients of one completion, so many steps apart, of all pairs together, each per unit of advantage;
its square is the share of a step's gradient that its neighbour's explains, by one factor for all pairs, the best.

Figures and intervals are those of ``learner.bench.variance``; the bootstrap doesn't fit the laws again. Writes
proposals.json and proposals.md into DIR. Shapes: H groups of G completions, m steps, N views of a group, V views of all
groups, E estimators, R bootstrap resamples, F features.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from learner.bench.estimators import DESIGNS, Design, Estimator
from learner.bench.snapshot import GroupGradients, add_arguments, group_gradients, snapshot_of
from learner.bench.variance import Measured, figures_of, interval, measure, resamples, rollout_variance, told
from learner.likelihood.timesteps import TimestepSampling
from learner.runs.atomic import atomic_write_text, disk_errors
from learner.runs.stopping import exit_status
from learner.settings.methods.states import AgrpoConfig
from rewards.command import Parser
from rewards.errors import ConfigError, DataError

UNIFORM, ENTROPY, STEP, BOTH, ITSELF = (
    "uniform",
    "entropy",
    "norms of the step",
    "norms of step and entropy",
    "the norm itself",
)
LAWS: dict[str, tuple[TimestepSampling, float]] = {
    UNIFORM: ("uniform", 0.0),
    ENTROPY: ("entropy", 0.1),
    STEP: ("entropy", 0.1),
    BOTH: ("entropy", 0.1),
    ITSELF: ("entropy", 0.0),
}
"""Law and floor that an estimator takes; all but the first are in proportion to what the table calls entropy."""
COMPARED: tuple[Design, ...] = ("group", "once")
"""How the draws hang together."""
LAGS = (1, 2, 3)
"""Steps between two gradients that are compared."""
ENTROPY_OFFSET = 1e-3
"""Nats, added to a step's entropy before its logarithm is taken."""
LEAST_NORM = 1e-3
"""Of the mean norm; what is below counts as much in a fit of logarithms."""


def unit_norms(group: GroupGradients) -> np.ndarray:
    """[N] norm of each view's gradient, per unit of advantage. Without a KL term, whose gradient has no advantage."""
    return np.sqrt(np.diag(group.gram_NN)) / np.abs(group.credit_Gm[group.rows_N, group.steps_N])


def learned_norms(groups: Sequence[GroupGradients], *, by_entropy: bool) -> list[np.ndarray]:
    """[G, m] of each group: the norms that the other half of the groups predicts, the even ones or the odd ones.

    Of a step alone it is the root of its mean squared norm. With entropy, the least squares of the norm's logarithm on
    the step and on the entropy's logarithm, times the root of the mean square of what is left.

    Raises:
        DataError: a half has no gradients.
    """
    m = groups[0].table.eligible_Gm.shape[1]
    found = []
    halves = [_fitted([*groups[start::2]], m, by_entropy) for start in (0, 1)]
    for place, group in enumerate(groups):
        weights_F = halves[1 - place % 2]
        logarithm_Gm = np.broadcast_to(weights_F[:m], group.table.eligible_Gm.shape).copy()
        if by_entropy:
            logarithm_Gm += weights_F[m] * np.log(group.table.entropy_Gm + ENTROPY_OFFSET)
        found.append(np.exp(logarithm_Gm))
    return found


def _fitted(groups: Sequence[GroupGradients], m: int, by_entropy: bool) -> np.ndarray:
    """[m] logarithms of a step's norm, and the factor of the entropy's logarithm behind them where it is asked for."""
    live = [group for group in groups if len(group.rows_N)]
    if not live:
        raise DataError("half of the groups have no signal (no gradient): take another snapshot, or more --groups")
    steps_V = np.concatenate([group.steps_N for group in live])
    norms_V = np.concatenate([unit_norms(group) for group in live])
    norms_V = np.maximum(norms_V, LEAST_NORM * norms_V.mean())
    shown_Vm = steps_V[:, None] == np.arange(m)
    if not by_entropy:
        return np.log(_mean_squares(norms_V, shown_Vm)) / 2
    entropy_V = np.log(
        np.concatenate([group.table.entropy_Gm[group.rows_N, group.steps_N] for group in live]) + ENTROPY_OFFSET
    )
    features_VF = np.concatenate([shown_Vm, entropy_V[:, None]], axis=1).astype(np.float64)
    logarithm_V = np.log(norms_V)
    centre = logarithm_V.mean()  # what a step that was never seen gets
    ridge_FF = 1e-3 * np.eye(m + 1)
    weights_F = np.linalg.solve(features_VF.T @ features_VF + ridge_FF, features_VF.T @ (logarithm_V - centre))
    left_V = np.exp(logarithm_V - centre - features_VF @ weights_F)
    weights_F[:m] += centre + np.log(_mean_squares(left_V, shown_Vm)) / 2
    return weights_F


def _mean_squares(values_V: np.ndarray, shown_Vm: np.ndarray) -> np.ndarray:
    """[m] mean square of each step's values, that of all for a step without any."""
    seen_m = shown_Vm.sum(axis=0)
    squares_m = np.full(len(seen_m), np.mean(values_V**2))
    squares_m[seen_m > 0] = (values_V**2 @ shown_Vm)[seen_m > 0] / seen_m[seen_m > 0]
    return squares_m


def laws_of(groups: Sequence[GroupGradients]) -> dict[str, list[GroupGradients]]:
    """The groups under each law of ``LAWS``: what a law is in proportion to takes the place of the entropy, and its sum
    over a completion, which a law loses, is put into the size of the advantage, which steps taken once go by.

    Raises:
        DataError: a half of the groups has no gradients.
    """
    norms = []
    for group in groups:
        norms_Gm = np.zeros(group.table.eligible_Gm.shape)
        norms_Gm[group.rows_N, group.steps_N] = unit_norms(group)
        norms.append(norms_Gm)
    sizes = {
        STEP: learned_norms(groups, by_entropy=False),
        BOTH: learned_norms(groups, by_entropy=True),
        ITSELF: norms,
    }
    return {law: _under(groups, sizes[law]) if law in sizes else [*groups] for law in LAWS}


def _under(groups: Sequence[GroupGradients], sizes: Sequence[np.ndarray]) -> list[GroupGradients]:
    found = []
    for group, size_Gm in zip(groups, sizes, strict=True):
        sum_G1 = np.where(group.table.eligible_Gm, size_Gm, 0.0).sum(axis=1, keepdims=True)
        table = replace(group.table, entropy_Gm=size_Gm)
        found.append(replace(group, table=table, credit_Gm=group.credit_Gm * sum_G1))
    return found


def cosine_sums(groups: Sequence[GroupGradients], lag: int) -> np.ndarray:
    """[H, 3] of each group: the summed inner products of gradients ``lag`` steps apart of one completion, and the
    summed squares of the earlier and of the later ones, each per unit of advantage."""
    sums = []
    for group in groups:
        credit_N = group.credit_Gm[group.rows_N, group.steps_N]
        unit_NN = group.gram_NN / np.outer(credit_N, credit_N)
        pairs_NN = (group.rows_N[:, None] == group.rows_N) & (group.steps_N[:, None] + lag == group.steps_N)
        square_N = np.diag(unit_NN)
        sums.append((unit_NN[pairs_NN].sum(), pairs_NN.sum(axis=1) @ square_N, pairs_NN.sum(axis=0) @ square_N))
    return np.array(sums, dtype=np.float64)


def analyse(groups: Sequence[GroupGradients], ks: Sequence[int], *, view_cost: float, seed: int) -> dict[str, Any]:
    """All figures with intervals, as plain data. Ratios are to AGRPO's default draws, on the same resamples.

    Args:
        groups: of an objective without a KL term, in an order that says nothing of them.
        view_cost: forward passes that a view costs the learner.

    Raises:
        DataError: a half of the groups has no gradients.
    """
    counts_RH = resamples(len(groups), seed)
    default = _figures(measure(groups, [Estimator.of(AgrpoConfig())]), counts_RH, view_cost)["total_x_work"]
    rows: list[dict[str, Any]] = []
    for law, drawn in laws_of(groups).items():
        estimators = [Estimator(*LAWS[law], design, k) for design in COMPARED for k in ks]
        figures = _figures(measure(drawn, estimators), counts_RH, view_cost)
        figures["total_x_work_ratio"] = figures.pop("total_x_work") / default
        for e, estimator in enumerate(estimators):
            about = {"law": law, "design": estimator.design, "k": estimator.k}
            rows.append(about | {name: interval(values_RE[:, e]) for name, values_RE in figures.items()})
    cosines = {}
    for lag in LAGS:
        sums_R3 = counts_RH @ cosine_sums(groups, lag)
        if sums_R3[0, 1]:
            cosines[str(lag)] = interval(sums_R3[:, 0] / np.sqrt(sums_R3[:, 1] * sums_R3[:, 2]))
    return {"groups": len(groups), "view_cost": view_cost, "proposals": rows, "cosines": cosines}


def _figures(measured: Measured, counts_RH: np.ndarray, view_cost: float) -> dict[str, np.ndarray]:
    """[R, E] each: those that are told here."""
    found = figures_of(measured, rollout_variance(measured.gram_NN, counts_RH), counts_RH, view_cost)
    return {name: found[name] for name in ("views", "timestep_over_rollout", "total_x_work")}


def markdown(found: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        f"{found['groups']} groups, baseline {found['snapshot']['baseline']}. Total variance x work is relative to "
        "AGRPO's default draws (entropy, floor 0.1, k = 4) with the same baseline.",
        "",
        "| steps in proportion to | low disc. | k | views | timestep / rollout variance | total variance x work |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["proposals"]:
        told_figures = " | ".join(told(row[name]) for name in ("timestep_over_rollout", "total_x_work_ratio"))
        lines.append(
            f"| {row['law']} | {DESIGNS[row['design']]} | {row['k']} | {row['views']['value']:.2f} | {told_figures} |"
        )
    lines += ["", "| steps apart | cosine of their gradients |", "|---|---|"]
    lines += [f"| {lag} | {told(cosine)} |" for lag, cosine in found["cosines"].items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when the checkpoint can't be used, 2 for wrong settings."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m learner.bench.proposals", description=__doc__.partition("\n")[0])
    add_arguments(parser, out="folder for proposals.json and .md", ks="1,2,4")
    arguments = parser.parse_args(argv)
    snapshot, ks = snapshot_of(arguments)
    if snapshot.objective.beta > 0:
        raise ConfigError(
            f"{snapshot.path} was trained with objective.beta={snapshot.objective.beta:g}, and the gradient of a KL "
            "term has no advantage that norms could be taken per; give a run with objective.beta=0"
        )
    drawn = group_gradients(snapshot, arguments.groups, seed=arguments.seed, device=arguments.device)
    groups = [*track(drawn, "groups", total=arguments.groups, console=Console(stderr=True))]
    found = analyse(groups, ks, view_cost=arguments.view_cost, seed=arguments.seed)
    found["snapshot"] = {
        "path": str(snapshot.path),
        "iteration": snapshot.checkpoint.progress.iteration,
        "baseline": snapshot.objective.baseline,
    }
    with disk_errors(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(arguments.out / "proposals.json", json.dumps(found, indent=2) + "\n")
    atomic_write_text(arguments.out / "proposals.md", markdown(found))
    print(markdown(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
