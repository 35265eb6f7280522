"""The plot of ``learner.bench.variance``: three figures by draws per completion, with intervals."""

from pathlib import Path
from typing import Any

from learner.reporting.figures import BLUE, FAINT, GREEN, INK, ORANGE, RED, new_figure, save_figure

COLOURS = (INK, RED, ORANGE, GREEN, BLUE)
PANELS = (
    ("timestep_over_rollout", "Timestep variance", "share of the rollout variance"),
    ("timestep_x_views_ratio", "Timestep variance x views", "relative to this run's setting"),
    ("total_x_work_ratio", "Total variance x work", "relative to this run's setting"),
)


STYLES = {
    "none": (0, (4, 3)),
    "group": "-",
    "row": (0, (1, 1)),
    "once": (0, (6, 1, 1, 1)),
    "once apart": (0, (6, 2, 1, 2)),
}

LABELS = {
    "none": "",
    "group": ", low discrepancy",
    "row": ", within completions",
    "once": ", once",
    "once apart": ", once, one by one",
}


def plot_variance(found: dict[str, Any], path: Path) -> None:
    """Draw ``variance.json``'s content into a PNG."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rows = found["estimators"]
    (every,) = (row for row in rows if row["k"] is None)
    laws = list(dict.fromkeys(row["law"] for row in rows if row["k"] is not None))
    ks = sorted({row["k"] for row in rows if row["k"] is not None})
    there = {(row["law"], row["design"]) for row in rows}
    lines = [(law, design) for law in laws for design in STYLES if (law, design) in there]
    figure = new_figure(figsize=(15, 7), layout="constrained")
    for axis, (name, title, unit) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for i, (law, design) in enumerate(lines):
            mine = sorted((r for r in rows if (r["law"], r["design"]) == (law, design)), key=lambda r: r["k"])
            # Side by side, or the intervals would hide each other.
            x = [ks.index(row["k"]) + 0.9 / len(lines) * (i - (len(lines) - 1) / 2) for row in mine]
            value = [row[name]["value"] for row in mine]
            error = [
                [max(0.0, v - row[name]["low"]) for v, row in zip(value, mine, strict=True)],
                [max(0.0, row[name]["high"] - v) for v, row in zip(value, mine, strict=True)],
            ]
            axis.errorbar(
                x,
                value,
                yerr=error,
                color=COLOURS[laws.index(law) % len(COLOURS)],
                linestyle=STYLES[design],
                marker="o",
                markersize=5,
                markerfacecolor="white" if design == "none" else None,
                linewidth=1.2,
                elinewidth=0.9,
                capsize=2,
                label=law + LABELS[design],
            )
        ticks = [str(k) for k in ks]
        if not name.startswith("timestep"):
            figures = every[name]
            error = [[figures["value"] - figures["low"]], [figures["high"] - figures["value"]]]
            axis.errorbar(
                len(ks), figures["value"], yerr=error, fmt="D", color=FAINT, capsize=2, label="every step once"
            )
            ticks.append("all")
        axis.axhline(1.0, color="#9aa1ab", linewidth=1.0, zorder=0)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel("k, timesteps drawn per completion")
        axis.set_ylabel(f"{unit} (log scale)")
        axis.grid(axis="y", color="#e6e8eb", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(laws) + 1, frameon=False, fontsize=9, columnspacing=1.2
    )
    snapshot = found["snapshot"]
    figure.suptitle(
        f"{snapshot['task']}, iteration {snapshot['iteration']}: variance of the AGRPO gradient, {found['groups']} "
        "groups, 95 % intervals (bootstrap over groups)",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    save_figure(figure, path)
