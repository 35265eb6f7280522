"""A comparison's findings for people: Markdown."""

from collections.abc import Mapping
from typing import Any


def report_text(report: Mapping[str, Any]) -> str:
    """The tables of results.json, the best method first."""
    lines = [*_rates(report), "", *_costs(report)]
    failed = {name: why for method in report["methods"].values() for name, why in method["failed"].items()}
    if failed:
        lines += ["", "Failed:", "", *(f"- `{name}`: {why}" for name, why in failed.items())]
    if report["unfinished"]:
        lines += ["", f"Not done yet: {', '.join(report['unfinished'])}."]
    return "\n".join([*lines, ""])


def ranked(report: Mapping[str, Any]) -> list[str]:
    """The methods that have results, by their solve rate in all steps, the highest first."""
    rates = {name: method["solve_rate"] for name, method in report["methods"].items() if method["solve_rate"]}
    return sorted(rates, key=lambda name: -rates[name][step_counts(report)[0]]["value"])


def step_counts(report: Mapping[str, Any]) -> list[str]:
    """Of the evaluations, the largest first."""
    counts = {count for method in report["methods"].values() for count in method["solve_rate"]}
    return sorted(counts, key=int, reverse=True)


def _problems(report: Mapping[str, Any]) -> str:
    """How many a seed was evaluated on, which are fewer than asked for where the task has no more."""
    solved = [cell["solved"] for cell in report["cells"].values() if cell["failed"] is None]
    counts = sorted({len(of_steps["trained"]) for each in solved for of_steps in each.values()})
    return " to ".join(map(str, counts)) or str(report["settings"]["problems"])


def _rates(report: Mapping[str, Any]) -> list[str]:
    settings, reference, counts = report["settings"], report["reference"], step_counts(report)
    head = ["method", "chosen", *(f"solved in {count} steps" for count in counts), f"against {reference}"]
    lines = _head(head)
    for name in ranked(report):
        method = report["methods"][name]
        against = method["difference"].get(counts[0]) if name != reference else None
        cells = [
            f"`{name}`",
            chosen(method["point"]),
            *(_rate(method["solve_rate"][count], ".3f") for count in counts),
            _rate(against, "+.3f") if against else "",
        ]
        lines.append(_row(cells))
    bases = [method["base"] for method in report["methods"].values() if method["base"]]
    if bases:
        lines.append(_row(["the base", "", *(f"{bases[0][count]:.3f}" for count in counts), ""]))
    seeds = ", ".join(map(str, settings["seeds"]))
    tuning = ", ".join(map(str, settings["tuning_seeds"]))
    lines += [
        "",
        f"Greedy exact-solve rate on {_problems(report)} held-out problems a seed, seeds {seeds}, after "
        f"{settings['budget']:,} forward-equivalents of training; {100 * settings['statistics']['confidence']:g} % "
        f"intervals over seeds and problems. Each method's settings were chosen on seed {tuning}, which is not "
        "reported.",
    ]
    return lines


def _costs(report: Mapping[str, Any]) -> list[str]:
    """What each method cost, its tuning included."""
    machine = report["machine"]["methods"]
    equal = min((each["equal_seconds"] for each in machine.values()), default=0.0)
    head = ["method", "iterations", "FE spent a run", "FE of its tuning", "training"]
    noise = {name: method.get("gradient_noise") or {} for name, method in report["methods"].items()}
    measured = ["noise / signal", "times FE of an update"] if any(noise.values()) else []
    lines = _head([*head, f"solved after {equal:.0f} s", "learner's peak", "gradient norm", *measured])
    for name in ranked(report):
        method, its = report["methods"][name], machine[name]
        norm = method["grad_norm"]
        cells = [
            f"`{name}`",
            "-".join(map(str, method["iterations"])),
            f"{method['spent']:,.0f}",
            f"{method['tuning']['spent']:,.0f}",
            f"{its['train_s']:.0f} s",
            f"{its['solve_rate_at_equal_seconds']:.3f}",
            f"{its['peak_rank_bytes'] / 2**20:,.0f} MiB" if its["peak_rank_bytes"] else "",
            f"{norm['mean']:.3g} ± {norm['deviation']:.2g}" if norm["mean"] and norm["deviation"] else "",
            *([_noise(noise[name], "value", "interval"), _noise(noise[name], "signal_fe", "signal_fe_interval")])[
                : len(measured)
            ],
        ]
        lines.append(_row(cells))
    return lines


def chosen(point: Mapping[str, Any] | None) -> str:
    """A point of a grid in few words."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in (point or {}).items())


def _noise(found: Mapping[str, Any], value: str, interval: str) -> str:
    """Empty where it wasn't measured; without an end where too few batches were."""
    if interval not in found:
        return ""
    low, high = ("unbounded" if end is None else f"{end:,.3g}" for end in found[interval])
    return f"above {low}" if found.get(value) is None else f"{found[value]:,.3g} [{low}, {high}]"


def _rate(estimate: Mapping[str, Any], form: str) -> str:
    low, high = (format(end, form) for end in estimate["interval"])
    return f"{estimate['value']:{form}} [{low}, {high}]"


def _head(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
