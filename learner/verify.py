"""Checks this installation on this hardware: replay parity, exactness by enumeration, recorded cases of the reference.

    python -m learner.verify [--golden DIR] [--json] [--device auto|cpu|cuda] [--dtype float32|bfloat16]

1. Replay parity: a small random model writes completions through the rollout engine; the learner's batches and scorer
   must find every log-prob again.
2. Exactness: on samplers small enough to enumerate, the expected AGRPO gradient must be (G-1)/(G m) times the gradient
   of expected reward; and estimators that are known to be biased must be found so (the negative controls).
3. With --golden DIR (a checkout has tests/golden), every recorded case NN_*.npz/.json in DIR: log-probs, step
   probabilities, importance weights, losses, gradients, tokens; the reader takes the reference's conventions upon
   itself.

--json prints one document:

    schema       1
    status       0, 1 or 2, the exit status
    device, dtype, hardware, torch, seconds
    sections     [{name: "replay" | "enumeration" | "controls" | "golden",
                   checks: [{name, error: str | null, seconds, measurements: [measurement]}]}]
    measurement  {quantity, where, absolute, relative, metric: "absolute" | "relative", bound, control, passed,
                  parts?: [measurement]}

``absolute`` is the largest |ours - recorded|; ``relative`` the L2 norm of the difference over that of the record for
gradients, and the largest |ours - recorded| / |recorded| of an element for the rest; null where it isn't finite.
``metric`` says which of the two the bound is for. A control passes when its error is above the bound. ``parts`` holds
the gradient of each tensor.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from learner.planning.hardware import processor_name
from learner.runs.stopping import exit_status
from learner.verification.cases import SamplerSettings, case_names, read_case
from learner.verification.exactness import check_controls, check_enumeration
from learner.verification.measurement import Measurement, Meter
from learner.verification.policy import check_probe
from learner.verification.replay import check_replay
from learner.verification.sampler import check_sampler
from learner.verification.training import check_training
from rewards.command import Parser
from rewards.errors import ConfigError, UnmaskError

TITLES = {
    "replay": "Replay parity: the learner's log-probs of a fresh rollout",
    "enumeration": "Exactness: expected AGRPO gradient against the gradient of expected reward",
    "controls": "Negative controls: biased estimators, which must fail the same test",
    "golden": "Recorded cases of the reference",
}
EXIT_STATUS = """exit status:
  0  every error is within its bound, and every negative control fails as it must
  1  an error is above its bound, or a control passes (also when a case can't be read)
  2  a recorded case can't be read (the others are checked all the same), or the command can't run"""


@dataclass(frozen=True)
class Check:
    """What one check found; ``error`` says why a case can't be read."""

    name: str
    measurements: list[Measurement] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print them; returns the exit status."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, quiet=options.json)
    sections: dict[str, list[Check]] = {}
    names = [] if options.golden is None else case_names(options.golden)
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the report
        meter = _meter(options.device, options.dtype)
        console.print(f"{hardware(meter.device)}, {meter.device} {meter.dtype}, torch {torch.__version__}")
        for name, checks in _sections(meter, options.golden, names):
            sections[name] = list(_timed(checks))
            console.print(_table(TITLES[name], sections[name]))
    seconds, status = time.perf_counter() - started, status_of(sections)
    if options.json:
        print(json.dumps(_document(meter, sections, seconds, status), allow_nan=False))
    else:
        console.print(_verdict(sections, status, seconds), soft_wrap=True)
    return status


def status_of(sections: dict[str, list[Check]]) -> int:
    """1 when a bound is passed, else 2 when a case couldn't be read, else 0."""
    checks = [check for section in sections.values() for check in section]
    if not all(measurement.passed for check in checks for measurement in check.measurements):
        return 1
    return 2 if any(check.error for check in checks) else 0


def golden_checks(folder: Path, names: Sequence[str], meter: Meter) -> Iterator[Check]:
    """A check of each named case, and of the probe where the folder has one."""
    if (folder / "probe_logits.npz").exists():
        names = ["probe_logits", *names]
    for name in names:
        try:
            found = check_probe(folder, meter) if name == "probe_logits" else check_case(folder, name, meter)
            yield Check(name, found)
        except UnmaskError as error:
            yield Check(name, error=f"case {name} can't be read: {error}")


def check_case(folder: Path, name: str, meter: Meter) -> list[Measurement]:
    """All measurements of one recorded case. After a broken schedule nothing else can be computed: it comes alone.

    Raises:
        UnmaskError: naming the array or setting that can't be read.
    """
    case = read_case(folder, name)
    broken = meter.schedule(case.rollout.schedule_breaks())
    if not broken.passed:
        return [broken]
    check = check_sampler if isinstance(case.settings, SamplerSettings) else check_training
    return [broken, *check(case, meter)]


def hardware(device: str) -> str:
    """The processor or GPU, in words."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} cores of {processor_name()}, {torch.get_num_threads()} threads"


def _parser() -> Parser:
    parser = Parser(
        "python -m learner.verify",
        description="Checks this installation on this hardware: replay parity, exactness by enumeration with negative "
        "controls, and recorded cases of the reference implementation.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="DIR",
        help="folder of recorded cases, NN_name.npz and .json; a checkout has tests/golden",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): cuda where there is one"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models; bounds depend on it"
    )
    return parser


def _meter(device: str, dtype: str) -> Meter:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")  # no TF32: it has 10 bits of mantissa
    return Meter(chosen, dtype)


def _sections(meter: Meter, golden: Path | None, names: Sequence[str]) -> Iterator[tuple[str, Iterable[Check]]]:
    yield "replay", (Check(name, found) for name, found in check_replay(meter))
    yield "enumeration", (Check(name, found) for name, found in check_enumeration(meter))
    yield "controls", (Check(name, found) for name, found in check_controls(meter))
    if golden is not None:
        yield "golden", golden_checks(golden, names, meter)


def _timed(checks: Iterable[Check]) -> Iterator[Check]:
    last = time.perf_counter()
    for check in checks:
        now = time.perf_counter()
        yield Check(check.name, check.measurements, check.error, now - last)
        last = now


def _table(title: str, checks: Sequence[Check]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("quantity", no_wrap=True)
    table.add_column("absolute", justify="right")
    table.add_column("relative", justify="right")
    table.add_column("bound", no_wrap=True)
    table.add_column("")
    table.add_column("where, or what", overflow="fold")
    for check in checks:
        rows = [_row(found) for found in check.measurements]
        if check.error:
            rows.append(("", "", "", "", "[bold red]UNREADABLE[/]", escape(check.error)))
        for i, row in enumerate(rows):
            head = (check.name, f"{check.seconds:.1f}") if i == 0 else ("", "")
            table.add_row(*head, *row, end_section=i == len(rows) - 1 and len(rows) > 2)
    return table


def _row(found: Measurement) -> tuple[str, ...]:
    bound = f"{found.metric[:3]} {'>' if found.control else '<='} {found.bound:g}"
    return found.quantity, f"{found.absolute:.1e}", f"{found.relative:.1e}", bound, _word(found), escape(found.where)


def _word(found: Measurement) -> str:
    if found.control:
        return "fails as it must" if found.passed else "[bold red]PASSES, WHICH IT MUST NOT[/]"
    return "[green]ok[/]" if found.passed else "[bold red]ABOVE BOUND[/]"


def _verdict(sections: dict[str, list[Check]], status: int, seconds: float) -> str:
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


def _document(meter: Meter, sections: dict[str, list[Check]], seconds: float, status: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "status": status,
        "device": meter.device,
        "dtype": meter.dtype,
        "hardware": hardware(meter.device),
        "torch": torch.__version__,
        "seconds": round(seconds, 2),
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


if __name__ == "__main__":
    sys.exit(main())
