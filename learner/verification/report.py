"""What ``learner.verify`` prints of its checks: tables, a verdict, one JSON document, the exit status."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from learner.planning.hardware import processor_name
from learner.verification.checks import Check
from learner.verification.measurement import Measurement, Meter

TITLES = {
    "replay": "Replay parity: the learner's log-probs of a fresh rollout",
    "enumeration": "Exactness: expected AGRPO gradient against the gradient of expected reward",
    "controls": "Negative controls: biased estimators, which must fail the same test",
    "golden": "Recorded cases of official code",
}


def status_of(sections: dict[str, list[Check]]) -> int:
    """1 when a bound is passed, else 2 when a case couldn't be read, else 0."""
    checks = [check for section in sections.values() for check in section]
    if not all(measurement.passed for check in checks for measurement in check.measurements):
        return 1
    return 2 if any(check.error for check in checks) else 0


def hardware(device: str) -> str:
    """The processor or GPU, in words."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} cores of {processor_name()}, {torch.get_num_threads()} threads"


def table(section: str, checks: Sequence[Check]) -> Table:
    """A section's checks, a line per measurement."""
    shown = Table(title=TITLES[section], title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("check", no_wrap=True)
    shown.add_column("s", justify="right")
    shown.add_column("quantity", no_wrap=True)
    shown.add_column("absolute", justify="right")
    shown.add_column("relative", justify="right")
    shown.add_column("bound", no_wrap=True)
    shown.add_column("")
    shown.add_column("where, or what", overflow="fold")
    for check in checks:
        rows = [_row(found) for found in check.measurements]
        if check.error:
            rows.append(("", "", "", "", "[bold red]UNREADABLE[/]", escape(check.error)))
        for i, row in enumerate(rows):
            head = (check.name, f"{check.seconds:.1f}") if i == 0 else ("", "")
            shown.add_row(*head, *row, end_section=i == len(rows) - 1 and len(rows) > 2)
    return shown


def verdict(sections: dict[str, list[Check]], status: int, seconds: float) -> str:
    """What could not be read, what is out of bounds, and the last line."""
    checks = [check for section in sections.values() for check in section]
    lines = [f"[bold red]{escape(check.error)}[/]" for check in checks if check.error]
    for check in checks:
        lines += [
            f"[bold red]{check.name}: {found.quantity} has error {found.absolute:.1e} absolute, {found.relative:.1e} "
            f"relative; the {found.metric} bound is {found.bound:g} ({escape(found.where)})[/]"
            for found in check.measurements
            if not found.passed
        ]
    count = sum(len(check.measurements) for check in checks)
    told = {0: "all within bounds", 1: "a bound is passed", 2: "not everything could be read"}[status]
    return "\n".join([*lines, f"{count} measurements in {seconds:.0f} s: {told} (exit status {status})"])


def document(
    meter: Meter, sections: dict[str, list[Check]], unknown: Sequence[str], seconds: float, status: int
) -> dict[str, Any]:
    """What ``learner.verify --json`` prints; its form is in that module's docstring."""
    return {
        "schema": 1,
        "status": status,
        "device": meter.device,
        "dtype": meter.dtype,
        "hardware": hardware(meter.device),
        "torch": torch.__version__,
        "seconds": round(seconds, 2),
        "not_known": list(unknown),
        "sections": [
            {
                "name": name,
                "checks": [
                    {
                        "name": check.name,
                        "error": check.error,
                        "seconds": round(check.seconds, 3),
                        "measurements": [found.as_json() for found in check.measurements],
                    }
                    for check in checks
                ],
            }
            for name, checks in sections.items()
        ],
    }


def _row(found: Measurement) -> tuple[str, ...]:
    bound = f"{found.metric[:3]} {'>' if found.control else '<='} {found.bound:g}"
    return found.quantity, f"{found.absolute:.1e}", f"{found.relative:.1e}", bound, _word(found), escape(found.where)


def _word(found: Measurement) -> str:
    if found.control:
        return "fails as it must" if found.passed else "[bold red]PASSES, WHICH IT MUST NOT[/]"
    return "[green]ok[/]" if found.passed else "[bold red]ABOVE BOUND[/]"
