"""curves.png: solve rate against forward-equivalents and against seconds, and the final rates with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.comparison.table import ranked, step_counts
from learner.reporting.figures import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, STYLE, new_figure, save_figure
from learner.runs.atomic import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "curves.png"
_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
_LINES = ("-", "--", ":")
_MARKERS = ("o", "s", "^")


def plot_comparison(report: Mapping[str, Any], out: Path) -> None:
    """Draw what results.json holds; nothing before there are results. Raises ``UnmaskError`` when the disk refuses."""
    from matplotlib import rc_context

    if not (methods := ranked(report)):
        return
    with disk_errors(out / PLOT), rc_context(STYLE):
        figure = new_figure(figsize=(18, 5.6), layout="constrained")
        by_cost, by_time, final = figure.subplots(1, 3)
        steps = step_counts(report)[0]
        for name in methods:
            curve, machine = report["methods"][name]["curve"], report["machine"]["methods"][name]
            style = _style(list(report["methods"]).index(name))
            by_cost.plot(curve["forward_equivalents"], curve["solve_rate"][steps], label=name, **style)
            by_time.plot(machine["curve_s"], curve["solve_rate"][steps], label=name, **style)
        for axis, title, unit in (
            (by_cost, "Solve rate by work", "forward-equivalents"),
            (by_time, "Solve rate by time", "seconds of training"),
        ):
            axis.set_title(title)
            axis.set_xlabel(unit)
            axis.set_ylabel(f"held out, greedy, {steps} steps")
            axis.xaxis.set_major_formatter("{x:,.6g}")
            axis.set_ylim(-0.02, 1.02)
        _draw_final(final, report, methods)
        handles, labels = by_cost.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7)
        save_figure(figure, out / PLOT)


def _draw_final(axis: "Axes", report: Mapping[str, Any], methods: Sequence[str]) -> None:
    """The best method on top, a point and an interval for each number of steps."""
    counts = step_counts(report)
    for i, count in enumerate(counts):
        estimates = [report["methods"][name]["solve_rate"][count] for name in methods]
        values = [estimate["value"] for estimate in estimates]
        below = [max(0.0, value - estimate["interval"][0]) for value, estimate in zip(values, estimates, strict=True)]
        above = [max(0.0, estimate["interval"][1] - value) for value, estimate in zip(values, estimates, strict=True)]
        y = [-row + 0.22 * (1 - i) for row in range(len(methods))]
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        how: dict[str, Any] = {"color": colour, "fmt": marker, "capsize": 2, "markersize": 5}
        axis.errorbar(values, y, xerr=[below, above], label=f"{count} steps", **how)
    axis.set_yticks([-row for row in range(len(methods))], list(methods))
    axis.set_xlabel("solve rate")
    axis.set_title("After training")
    axis.legend(loc="lower right")


def _style(number: int) -> dict[str, Any]:
    """Of a method: another colour for each, then another line."""
    round_ = number // len(_COLOURS)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[round_ % len(_LINES)],
        "marker": _MARKERS[round_ % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 2,
    }
