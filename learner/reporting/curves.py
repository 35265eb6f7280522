"""Metrics of several runs on shared axes, as one PNG.

python -m learner.reporting.curves --out curves.png --metric eval/m/solve_rate --metric entropy runs/A="lr 0.001" runs/B
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from learner.reporting.figures import BLUE, GREEN, INK, ORANGE, PURPLE, RED, SKY, STYLE, new_figure, save_figure
from learner.reporting.metrics_file import read_rows
from learner.reporting.plots import Series, read_series
from learner.runs.atomic import disk_errors
from learner.runs.directory import RunDirectory
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rewards.errors import UnmaskError
from rollout.process import prepare_process

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_METRICS = ("eval/m/solve_rate", "solve_rate", "entropy")
_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, INK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_curves(runs: Mapping[str, Path], metrics: Sequence[str], out: Path) -> Path:
    """Draw one panel a metric and one line a run (label -> folder) into ``out``.

    Returns ``out``. Raises ``UnmaskError`` for a folder without metrics, a metric that no run has, or a disk that
    refuses.
    """
    from matplotlib import rc_context

    read = {label: _read(folder) for label, folder in runs.items()}
    absent = [metric for metric in metrics if not any(metric in series for series in read.values())]
    if absent:
        there = sorted({name for series in read.values() for name in series})
        raise UnmaskError(f"no run has the metric {absent[0]}; there are {', '.join(there)}")
    with disk_errors(out), rc_context(STYLE):
        figure = new_figure(figsize=(4.6 * len(metrics), 4.0), layout="constrained")
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            _draw(axis, read, metric)
        handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[0]))
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
        return save_figure(figure, out)


def _read(folder: Path) -> Series:
    path = RunDirectory(folder).metrics_path
    if not path.is_file():
        raise UnmaskError(f"no metrics at {path}: give the folder of a run")
    return read_series(read_rows(path))


def _draw(axis: "Axes", read: Mapping[str, Series], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (label, series) in enumerate(read.items()):
        if metric not in series:
            continue
        x, y = series[metric]
        marker = _MARKERS[index % len(_MARKERS)] if metric.startswith("eval/") else ""
        colour = _COLOURS[index % len(_COLOURS)]
        axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=2, label=label, clip_on=False)
    axis.set_title(metric)
    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.margins(x=0.02, y=0.08)
    if metric.endswith("solve_rate"):
        axis.set_ylim(0.0, 1.0)
    elif axis.get_ylim()[0] >= 0:
        axis.set_ylim(bottom=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when there is nothing to draw or no room, 2 for wrong arguments."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m learner.reporting.curves", description="Draw metrics of several runs on shared axes.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR[=LABEL]", help="folders of runs (label: the folder's name)")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the PNG (default: curves.png)")
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help=f"repeat it; default: {' '.join(DEFAULT_METRICS)}"
    )
    arguments = parser.parse_args(argv)
    runs = {}
    for text in arguments.runs:
        folder, _, label = text.partition("=")
        runs[label or Path(folder).name] = Path(folder)
    print(plot_curves(runs, arguments.metric or DEFAULT_METRICS, arguments.out))
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
