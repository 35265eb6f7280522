"""Steps one after the other, each in a process of its own with a time limit: one that fails, hangs or runs out of
memory is told in its row, and the others still run.

A step's process prints its figures as the last line of standard output, a JSON list of ``figures.Figure``.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from learner.bench.first_minutes.figures import Figure
from learner.bench.measure import machine


class Step(NamedTuple):
    limit_s: float
    """Much of it is for loading torch, the first time from a cold disk."""
    function: str
    """Of this package, MODULE.NAME; takes ``small`` and gives a list of ``figures.Figure``."""


STEPS = {
    "device": Step(120.0, "device.measure"),
    "verify": Step(120.0, "checked.in_float32"),
    "engine": Step(90.0, "speed.engine"),
    "learner": Step(90.0, "speed.learner"),
    "learner_recomputed": Step(90.0, "speed.learner_recomputed"),
    "rounding": Step(90.0, "rounding.measure"),
    "waits": Step(90.0, "waits.measure"),
    "ranks": Step(120.0, "ranks.measure"),
    "verify_bf16": Step(120.0, "checked.in_bfloat16"),
}
"""In the order of how much they are worth knowing."""
TOTAL_S = 580.0
"""For all of them; with the begin and the end of it ten minutes."""
WELL = "well"
_TOLD = 300
"""Characters of an error."""

TABLES = {
    "Figures": ["step", "figure", "measured", "expected", "note"],
    "Steps": ["step", "seconds", "limit s", "ended"],
}


class Work(NamedTuple):
    command: Sequence[str]
    limit_s: float


def figures_of(name: str, *, small: bool) -> list[Figure]:
    """Take the step in this process."""
    module, _, function = STEPS[name].function.partition(".")
    # A step loads what it needs itself, and not the others'.
    measure = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    figures: list[Figure] = measure(small=small)
    return figures


def run_all(names: Iterable[str], *, small: bool) -> dict[str, Any]:
    """The steps, as ``report`` stores them."""
    command = [sys.executable, "-m", "learner.bench.first_minutes"]
    more = ["--small"] if small else []
    works = {name: Work([*command, name, *more], STEPS[name].limit_s) for name in names}
    rows = run_each(works, total_s=TOTAL_S)
    return {
        "benchmark": "first_minutes",
        "small": small,
        "machine": machine(threads=1),  # only now: to ask for the GPU's name may take some of its memory
        "rows": rows,
        "tables": TABLES,
        "bars": [],
    }


def run_each(works: Mapping[str, Work], *, total_s: float, to_clean_up_s: float = 10.0) -> list[dict[str, Any]]:
    """A row for each figure, and one for how each step ended.

    Args:
        total_s: for all steps.
        to_clean_up_s: what a step has for its end once it was interrupted.
    """
    rows, ends, begin = [], [], time.monotonic()
    for name, work in works.items():
        left, started = total_s - (time.monotonic() - begin), time.monotonic()
        limit_s = min(work.limit_s, left)
        figures, ended = (
            _run(work.command, limit_s, to_clean_up_s) if left > 1 else ([], f"left out: {total_s:g} s were over")
        )
        seconds = time.monotonic() - started
        print(f"{name}: {ended}, {seconds:.0f} s", file=sys.stderr, flush=True)
        rows += [{"step": name, **figure} for figure in figures]
        ends.append({"step": name, "seconds": seconds, "limit s": max(limit_s, 0.0), "ended": ended})
    return [*rows, *ends]


def failed(result: Mapping[str, Any]) -> list[str]:
    """The steps that didn't end well."""
    return [row["step"] for row in result["rows"] if row.get("ended", WELL) != WELL]


def _run(command: Sequence[str], limit_s: float, to_clean_up_s: float) -> tuple[list[dict[str, Any]], str]:
    """A step's figures, and how it ended."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return [], f"past its limit of {limit_s:.3g} s"
    finally:
        _end(process, to_clean_up_s)
    if process.returncode:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no word")
        return [], f"failed, status {process.returncode}: {last.strip()[:_TOLD]}"
    return json.loads(out.splitlines()[-1]), WELL


def _end(process: subprocess.Popen[str], to_clean_up_s: float) -> None:
    """End what is left of it and of what it has started: as Ctrl-C would, then at once."""
    for signum in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(signum) if signum == signal.SIGINT else os.killpg(process.pid, signum)
        try:
            process.communicate(timeout=to_clean_up_s)
        except subprocess.TimeoutExpired:
            continue
