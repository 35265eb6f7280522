"""The cells of results.json at the terminal, base and adapter side by side, without cutting a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from learner.evaluation.results import POLICIES

_UNLIMITED = 10_000


def print_table(report: Mapping[str, Any], console: Console) -> None:
    """All columns where they fit. A narrower terminal gets none for speed, and then two lines for each rate, the
    interval below it: 80 columns will do. What is still too wide is left to the terminal to wrap."""
    cells = report["cells"]
    policies = [policy for policy in POLICIES if any(policy in cell for cell in cells)]
    speeds = {(row["cell"], row["policy"]): row["tokens_per_s"] for row in report["machine"]["cells"]}
    title = f"{report['problems']} problems, {100 * report['statistics']['confidence']:g} % intervals"
    for table in (_wide(cells, policies, speeds), _wide(cells, policies, None), _narrow(cells, policies)):
        width = console.measure(table, options=console.options.update(width=_UNLIMITED)).maximum
        if width <= console.width:
            break
    table.title, table.title_justify = title, "left"
    Console(width=max(width, console.width), highlight=False, file=console.file).print(table)


def _wide(
    cells: Sequence[Mapping[str, Any]], policies: Sequence[str], speeds: Mapping[tuple[str, str], float] | None
) -> Table:
    """A line for each rate; forwards and, where they are given, tokens/s at its end."""
    table = _table("decoding", "order", "steps", "rate")
    for name in [*_columns(policies), "forwards", *(["tokens/s"] if speeds else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        here = [policy for policy in policies if policy in cell]
        figures = [" / ".join(f"{cell[policy]['mean_nfe']:.2f}" for policy in here)]
        if speeds:
            figures.append(" / ".join(f"{speeds[cell['label'], policy]:,.0f}" for policy in here))
        about = [_decoding(cell), cell["position_rule"] or "", str(cell["steps"] or "")]
        for i, metric in enumerate(_metrics(cell, here)):
            rates = [" ".join(rate) for rate in _rates(cell, policies, metric)]
            table.add_row(*([""] * 3 if i else about), _name(metric), *rates, *([] if i else figures))
    return table


def _narrow(cells: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> Table:
    """Two lines for each rate."""
    table = _table("decoding, steps", "rate")
    for name in _columns(policies):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        steps = f", {cell['steps']}" if cell["steps"] else ""
        about = f"{_decoding(cell)}{steps}\n{cell['position_rule'] or ''}"
        for i, metric in enumerate(_metrics(cell, [policy for policy in policies if policy in cell])):
            rates = ["\n".join(rate) for rate in _rates(cell, policies, metric)]
            table.add_row("" if i else about, _name(metric), *rates)
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _columns(policies: Sequence[str]) -> list[str]:
    return [*policies, *(["adapter - base"] if len(policies) == 2 else [])]


def _decoding(cell: Mapping[str, Any]) -> str:
    how = {"threshold": f"threshold {cell['threshold']}", "sampled": f"sampled x{cell['samples']}"}
    return how.get(cell["decoding"], "greedy")


def _metrics(cell: Mapping[str, Any], policies: Sequence[str]) -> list[str]:
    known = ("solve_rate", "pass@", "best@", "naturalness")
    metrics = [name for name in cell[policies[0]] if name.startswith(known)]
    return [name for name in metrics if name != "solve_rate" or "pass@1" not in metrics]  # the same number


def _name(metric: str) -> str:
    return "solved" if metric == "solve_rate" else metric


def _rates(cell: Mapping[str, Any], policies: Sequence[str], metric: str) -> list[tuple[str, str]]:
    """(value, interval) of each column; empty texts where the cell has none."""
    rates = [_rate(cell[policy][metric], ".3f") if policy in cell else ("", "") for policy in policies]
    if len(policies) == 2:
        rates.append(_rate(cell["difference"][metric], "+.3f") if "difference" in cell else ("", ""))
    return rates


def _rate(estimate: Mapping[str, Any], form: str) -> tuple[str, str]:
    low, high = (format(end, form) for end in estimate["interval"])
    return format(estimate["value"], form), f"\\[{low}, {high}]"
