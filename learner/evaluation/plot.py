"""results.png: solve rate against forward passes, and pass@k."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.reporting.figures import BLUE, ORANGE, STYLE, new_figure, save_figure
from learner.runs.atomic import disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"base": ORANGE, "adapter": BLUE}
_LINES = ("-", "--", ":", "-.", (0, (1, 3)))
_MARKERS = ("o", "s", "^", "v", "P")


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw what results.json holds. Raises ``UnmaskError`` when the disk refuses."""
    from matplotlib import rc_context

    by_forwards = [cell for cell in report["cells"] if cell["decoding"] != "sampled"]
    sampled = [cell for cell in report["cells"] if cell["decoding"] == "sampled"]
    panels = [_draw_rates] * bool(by_forwards) + [_draw_pass] * bool(sampled)
    if not panels:
        return
    with disk_errors(path), rc_context(STYLE):
        figure = new_figure(figsize=(7.4 * len(panels), 5.0), layout="constrained")
        for axis, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axis, by_forwards if draw is _draw_rates else sampled)
            axis.set_ylim(-0.03, 1.03)
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        save_figure(figure, path)


def _draw_rates(axis: "Axes", cells: Sequence[Mapping[str, Any]]) -> None:
    """A line per policy and order over the step counts; stars for the thresholds."""
    orders = list(dict.fromkeys(cell["position_rule"] for cell in cells if cell["decoding"] == "greedy"))
    for policy in _policies(cells):
        for i, order in enumerate(orders):
            points = [cell[policy] for cell in cells if cell["position_rule"] == order and policy in cell]
            label = f"{policy}, {order}"
            x = [point["mean_nfe"] * 1.02**i for point in points]  # beside each other, to see all intervals
            _points(axis, policy, x, [point["solve_rate"] for point in points], label=label, **_style(i))
        stars = [cell for cell in cells if cell["decoding"] == "threshold" and policy in cell]
        if stars:
            x, rates = ([cell[policy][name] for cell in stars] for name in ("mean_nfe", "solve_rate"))
            star: dict[str, Any] = {"linestyle": "none", "marker": "*", "markersize": 12}
            _points(axis, policy, x, rates, label=f"{policy}, threshold", **star)
            for cell, at, rate in zip(stars, x, rates, strict=True):
                where: dict[str, Any] = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 8.5}
                axis.annotate(f"{cell['threshold']:g}", (at, rate["value"]), color=_COLOURS[policy], **where)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_title("Greedy: solve rate by cost")
    axis.set_xlabel("forward passes per completion")
    axis.set_ylabel("solve rate")


def _draw_pass(axis: "Axes", cells: Sequence[Mapping[str, Any]]) -> None:
    """A line per policy and order over k, at the largest step count."""
    steps = max(cell["steps"] for cell in cells)
    shown = [cell for cell in cells if cell["steps"] == steps]
    ks = [int(name.removeprefix("pass@")) for name in shown[0][_policies(shown)[0]] if name.startswith("pass@")]
    for policy in _policies(shown):
        for i, cell in enumerate(cell for cell in shown if policy in cell):
            label, x = f"{policy}, {cell['position_rule']}", [k * 1.02**i for k in ks]
            _points(axis, policy, x, [cell[policy][f"pass@{k}"] for k in ks], label=label, **_style(i))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xticks(ks)
    axis.set_title(f"Sampled, {steps} steps: pass@k of {shown[0]['samples']} completions")
    axis.set_xlabel("k, completions drawn")
    axis.set_ylabel("pass@k")


def _points(
    axis: "Axes", policy: str, x: Sequence[float], estimates: Sequence[Mapping[str, Any]], **style: Any
) -> None:
    y = [estimate["value"] for estimate in estimates]
    below = [max(0.0, e["value"] - e["interval"][0]) for e in estimates]
    above = [max(0.0, e["interval"][1] - e["value"]) for e in estimates]
    defaults: dict[str, Any] = {"color": _COLOURS[policy], "capsize": 3, "elinewidth": 1.0, "markersize": 5.5}
    axis.errorbar(x, y, yerr=[below, above], **defaults | style)


def _style(order: int) -> dict[str, Any]:
    return {"linestyle": _LINES[order % len(_LINES)], "marker": _MARKERS[order % len(_MARKERS)]}


def _policies(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    return [policy for policy in _COLOURS if any(policy in cell for cell in cells)]
