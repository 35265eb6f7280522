"""What a comparison will run and about how long it takes."""

from collections.abc import Iterable

from learner.comparison.budget import planned_cost
from learner.comparison.cells import Cell, Found, reported_cells, tuning_cells
from learner.comparison.settings import ComparisonConfig, grid_points


def outline_text(config: ComparisonConfig, found: Found, *, parallel: int) -> str:
    """A line for each kind of runs of each method, and the sums.

    Seconds are those of the runs that are done, or else ``pace``'s; a method's reported runs are taken to be as its
    tuning runs until those are done.
    """
    lines = [f"{'method':<24}{'runs':<10}{'number':>7}{'done':>6}{'iterations':>12}{'FE a run':>12}{'s a run':>9}"]
    runs, work_s, left_s, forwards = 0, 0.0, 0.0, 0.0
    for method in config.methods:
        tuning, known = tuning_cells(config, method), reported_cells(config, method, found)
        for role, cells, count in (
            ("tuning", tuning, len(tuning)),
            ("reported", known or tuning[:1], len(config.seeds)),
        ):
            each_fe = sum(_cost(cell) for cell in cells) / len(cells)
            each_s = _seconds(config, found, each_fe)
            done = sum(cell.name in found for cell in cells) if role == "tuning" or known else 0
            shown = sorted({cell.iterations for cell in cells})
            iterations = "-".join(str(count) for count in {shown[0]: 0, shown[-1]: 0})
            lines.append(f"{method:<24}{role:<10}{count:>7}{done:>6}{iterations:>12}{each_fe:>12,.0f}{each_s:>9,.0f}")
            runs, forwards = runs + count, forwards + count * each_fe
            work_s, left_s = work_s + count * each_s, left_s + (count - done) * each_s
    points = len(grid_points(config, next(iter(config.methods))))
    lines += [
        "",
        f"{len(config.methods)} methods, {points} points each on seeds {_listed(config.tuning_seeds)}; reported on "
        f"seeds {_listed(config.seeds)}, {config.problems} held-out problems a run",
        f"{runs} runs, {forwards:,.0f} forward-equivalents (FE) at most; about {_hours(work_s / parallel)} in all "
        f"with {parallel} side by side, {_hours(left_s / parallel)} of them to go, and a few minutes for each seed's "
        "base",
    ]
    return "\n".join(lines)


def _cost(cell: Cell) -> float:
    """Forward-equivalents of a cell's training, at most."""
    return cell.iterations * planned_cost(cell.run)


def _seconds(config: ComparisonConfig, found: Found, forwards: float) -> float:
    """Of one run with so many forward-equivalents."""
    done = [findings.results for findings in found.values() if findings.results]
    if not done:
        return config.pace.start_s + forwards / config.pace.forwards_per_s
    spent = sum(results["spent"]["total"] for results in done)
    trained = sum(results["machine"]["train_s"] for results in done)
    wall = sum(results["machine"]["wall_s"] for results in done)
    return max(0.0, wall - trained) / len(done) + forwards * trained / spent


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))
