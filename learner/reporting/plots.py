"""Plots of a run from its metrics.jsonl: one PNG a theme and an overview.

python -m learner.reporting.plots RUN_DIR
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from learner.reporting.figures import BLUE, FAINT, GREEN, ORANGE, PURPLE, RED, SKY, STYLE, new_figure, save_figure
from learner.reporting.metrics_file import read_rows
from learner.runs.atomic import disk_errors
from learner.runs.directory import RunDirectory
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rewards.errors import UnmaskError
from rollout.process import prepare_process

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (ORANGE, GREEN, PURPLE, SKY, RED)

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Metric name -> (iterations [n], values [n]), finite values only, rising iterations."""


def plot_run(run_dir: Path | str) -> list[Path]:
    """Draw what metrics.jsonl holds into ``plots/``; themes without data are left out.

    Returns the files written. Raises ``UnmaskError`` when there is no metrics.jsonl or the disk refuses.
    """
    from matplotlib import rc_context
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    run = RunDirectory(run_dir)
    if not run.metrics_path.is_file():
        raise UnmaskError(f"no metrics at {run.metrics_path}: give the folder of a run")
    series = read_series(read_rows(run.metrics_path))
    panels = {name: panel for name, panel in _PANELS.items() if any(panel.wants(metric) for metric in series)}
    written = []
    with disk_errors(run.plots_dir), rc_context(STYLE):
        run.plots_dir.mkdir(exist_ok=True)
        for name, panel in panels.items():
            figure = new_figure(figsize=(7.2, 4.2), layout="constrained")
            panel.draw(figure.subplots(), series)
            written.append(save_figure(figure, run.plots_dir / f"{name}.png"))
        if panels:
            rows = -(-len(panels) // 3)
            layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
            figure = new_figure(figsize=(15.5, 4.1 * rows + 0.5), layout=layout)
            figure.suptitle(run.id, x=0.008, ha="left", fontsize=11.5, color=FAINT)
            axes = figure.subplots(rows, min(3, len(panels)), squeeze=False).flatten()
            for axis, panel in zip(axes, panels.values(), strict=False):
                panel.draw(axis, series)
            for axis in axes[len(panels) :]:
                axis.set_axis_off()
            written.append(save_figure(figure, run.plots_dir / "overview.png"))
    return written


def read_series(rows: Sequence[Mapping[str, Any]]) -> Series:
    """Finite values by metric; of several reports of one metric and iteration the last counts."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "iteration" and isinstance(value, int | float) and np.isfinite(value):
                values.setdefault(name, {})[row["iteration"]] = float(value)
    ordered = {name: sorted(points.items()) for name, points in values.items()}
    return {name: (np.array([i for i, _ in p]), np.array([v for _, v in p])) for name, p in ordered.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when there is nothing to plot or no room, 2 for wrong arguments."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m learner.reporting.plots", description="Draw the plots of a run from its metrics.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    written = plot_run(parser.parse_args(argv).run)
    print("\n".join(map(str, written)) or "metrics.jsonl holds nothing to plot yet")
    return 0


class _Panel:
    """One theme: which metrics it needs, and how it is drawn."""

    def __init__(self, wants: Callable[[str], bool], draw: "Callable[[Axes, Series], None]"):
        self.wants = wants
        self.draw = draw


def _draw_reward(axis: "Axes", series: Series) -> None:
    components = sorted(name for name in series if name.startswith("reward/") and name != "reward/mean")
    _line(axis, series, "reward/mean", "total", BLUE)
    for index, name in enumerate(components):
        _line(axis, series, name, name.removeprefix("reward/"), _COLOURS[index % len(_COLOURS)], width=1.6)
    _finish(axis, series, "Reward", "mean per completion")


def _draw_solve_rate(axis: "Axes", series: Series) -> None:
    _line(axis, series, "solve_rate", "training, sampled", "#8a929d", width=1.6)
    evaluated = sorted((name for name in series if _is_evaluation(name)), key=_divisor)
    for index, name in enumerate(evaluated):
        x, y = series[name]
        colour, marker = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))[index % 3]
        label = f"held out, greedy, {name.removeprefix('eval/').removesuffix('/solve_rate')} steps"
        axis.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=2, label=label, clip_on=False, zorder=4)
    _finish(axis, series, "Exact-solve rate", "share of completions", bottom=0.0, top=1.0)


def _draw_entropy(axis: "Axes", series: Series) -> None:
    _line(axis, series, "entropy", "", BLUE)
    _finish(axis, series, "Entropy when sampling", "nats per drawn token", bottom=0.0)


def _draw_clip_fraction(axis: "Axes", series: Series) -> None:
    _line(axis, series, "clip_fraction/high", "ratio too high", BLUE, scale=100)
    _line(axis, series, "clip_fraction/low", "ratio too low", ORANGE, scale=100)
    _finish(axis, series, "Clipped terms", "% of scored tokens", bottom=0.0)


def _draw_staleness(axis: "Axes", series: Series) -> None:
    if "staleness/max" in series:
        x, y = series["staleness/max"]
        size = 6 if len(x) < 100 else 3
        axis.plot(
            x,
            y,
            linestyle="none",
            marker="o",
            markersize=size,
            color=ORANGE,
            alpha=0.7,
            label="stalest group",
            clip_on=False,
        )
    _line(axis, series, "staleness/mean", "mean of the groups", BLUE)
    highest = max(float(series[name][1].max()) for name in ("staleness/max", "staleness/mean") if name in series)
    _finish(axis, series, "Staleness", "versions behind the learner", bottom=-0.05, top=max(1.0, highest) * 1.3)


def _draw_speed(axis: "Axes", series: Series) -> None:
    _line(axis, series, "machine/tokens_per_s", "", GREEN)
    axis.yaxis.set_major_formatter("{x:,.6g}")
    _finish(axis, series, "Rollout speed", "completion tokens / s", bottom=0.0)


_PANELS = {
    "reward": _Panel(lambda name: name.startswith("reward/"), _draw_reward),
    "solve_rate": _Panel(lambda name: name == "solve_rate" or _is_evaluation(name), _draw_solve_rate),
    "entropy": _Panel(lambda name: name == "entropy", _draw_entropy),
    "clip_fraction": _Panel(lambda name: name in ("clip_fraction/low", "clip_fraction/high"), _draw_clip_fraction),
    "staleness": _Panel(lambda name: name in ("staleness/mean", "staleness/max"), _draw_staleness),
    "tokens_per_s": _Panel(lambda name: name == "machine/tokens_per_s", _draw_speed),
}


def _line(
    axis: "Axes", series: Series, name: str, label: str, colour: str, *, width: float = 2.2, scale: float = 1.0
) -> None:
    """The running mean in full colour over the values themselves in a faint one."""
    if name not in series:
        return
    x, y = series[name][0], series[name][1] * scale
    window = len(x) // 20 * 2 + 1  # odd; 1 (no smoothing) below 20 values
    if window > 1:
        axis.plot(x, y, color=colour, linewidth=0.9, alpha=0.3)
        axis.set_title(f"bold: mean of {window} iterations", loc="right", fontsize=9, weight="normal", color=FAINT)
    axis.plot(x, _running_mean(y, window), color=colour, linewidth=width, label=label, **_dots(x))


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` values, over fewer at the ends."""
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _dots(x: np.ndarray) -> dict[str, Any]:
    """Markers where a line alone would be hard to see."""
    return {"marker": "o", "markersize": 5} if len(x) < 3 else {}


def _finish(
    axis: "Axes", series: Series, title: str, unit: str, *, bottom: float | None = None, top: float | None = None
) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title)
    axis.set_xlabel("iteration")
    axis.set_ylabel(unit)
    last = max(float(x[-1]) for x, _ in series.values())
    axis.set_xlim(-0.02 * max(last, 1.0), 1.02 * max(last, 1.0))  # the same for every theme
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    axis.margins(y=0.08)
    if bottom is not None:
        top = axis.get_ylim()[1] if top is None else top
        axis.set_ylim(bottom, top if top > bottom else bottom + 1.0)
    names = axis.get_legend_handles_labels()[1]
    if names:  # below the axes, where it hides no line
        columns = 3 if max(map(len, names)) <= 12 else 2
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=min(len(names), columns), columnspacing=1.2)


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval/") and name.endswith("/solve_rate")


def _divisor(name: str) -> int:
    """Order of ``eval/m/solve_rate``, ``eval/m/2/solve_rate``, ...: by the step count's divisor."""
    digits = name.split("/")[-2]
    return int(digits) if digits.isdigit() else 1


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
