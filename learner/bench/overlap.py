"""Asynchronous against synchronous: time per consumed completion, and how much of it each side is idle.

    python -m learner.bench.overlap [--small] [--out FOLDER]

Three short real runs of one recipe on one cached base: synchronous, and with rollouts one and two versions ahead, no
evaluation in between. From their metrics rows: seconds per consumed completion, the learner's wait for rollouts, the
update. From the kernel's accounts of the processes: CPU time of the rollout actors and of the ranks between the first
and the last row; *idle* is the share of that time times the processes (one thread each) in which they used no CPU,
waiting for a core included. So it means what it says only on a machine with a free core for each process.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.bench import report
from learner.bench.measure import machine
from learner.reporting.metrics_file import read_rows
from rewards.errors import UnmaskError, WaitTimeout

LIMIT_S = 600.0
COMMON = ("evaluation.every=0", "evaluation.problems=1", "evaluation.step_divisors=[1]", "checkpoint.every=1000")
MODES = {"synchronous": 0, "one version ahead": 1, "two versions ahead": 2}
"""``rollout.max_staleness`` of each."""
COLUMNS = [
    "mode", "completions", "ms per completion", "iteration s", "rollout wait s", "update s",
    "actors idle", "ranks idle",
]  # fmt: skip


@dataclass(frozen=True)
class Size:
    settings: tuple[str, ...]
    iterations: int
    completions: int
    """Of one iteration."""


FULL = Size(("recipe=sudoku", "rollout.actors=1", "rollout.prompts_per_iteration=8"), iterations=13, completions=64)
SMALL = Size(("recipe=smoke",), iterations=3, completions=16)


def run(*, small: bool = False) -> dict[str, Any]:
    """All runs, as ``report`` stores them."""
    size, about = SMALL if small else FULL, machine(threads=1)
    with tempfile.TemporaryDirectory(prefix="unmask-bench-") as folder:
        rows = [_measure(mode, size, Path(folder)) for mode in MODES]
    ratio = rows[0]["ms per completion"] / rows[1]["ms per completion"]
    bars = [] if small else [report.bar("synchronous / one version ahead, time per completion", ratio, 1.0)]
    tables = {"Asynchronous against synchronous": COLUMNS}
    return {"benchmark": "overlap", "small": small, "machine": about, "rows": rows, "tables": tables, "bars": bars}


def summarise(
    rows: list[dict[str, Any]], busy_s: dict[str, float], processes: dict[str, int], *, completions: int, wall_s: float
) -> dict[str, Any]:
    """Figures of the iterations after the first, which still warms up.

    Args:
        rows: of finished iterations.
        busy_s: CPU seconds of ``actors`` and ``ranks`` over ``wall_s``.
        completions: of one iteration.
    """
    settled = rows[1:]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in settled)

    return {
        "completions": completions * len(settled),
        "ms per completion": 1000.0 * sum(row["time/iteration_s"] for row in settled) / (completions * len(settled)),
        "iteration s": median("time/iteration_s"),
        "rollout wait s": median("time/rollout_wait_s"),
        "update s": median("time/update_s"),
        "actors idle": 1.0 - busy_s["actors"] / (wall_s * processes["actors"]),
        "ranks idle": 1.0 - busy_s["ranks"] / (wall_s * processes["ranks"]),
    }


def _measure(mode: str, size: Size, folder: Path) -> dict[str, Any]:
    name = f"staleness-{MODES[mode]}"
    settings = (
        *size.settings,
        *COMMON,
        f"rollout.max_staleness={MODES[mode]}",
        f"run.dir={folder}",
        f"run.name={name}",
    )
    command = [sys.executable, "-m", "learner.main", *settings, f"run.iterations={size.iterations}"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (folder / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            command, env=kept, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    readings: dict[int, tuple[float, dict[str, list[float]]]] = {}
    try:
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"the run {mode} did not end within {LIMIT_S:g} s")
            finished = len(_rows(folder / name))
            if finished and finished not in readings:
                readings[finished] = (time.monotonic(), _cpu_seconds(process.pid))
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    rows = _rows(folder / name)
    if process.returncode or len(rows) < size.iterations:
        printed = (folder / f"{name}.out").read_text(errors="replace")
        raise UnmaskError(f"the run {mode} ended with status {process.returncode}: {printed[-2000:]}")
    (start, before), (end, after) = readings[min(readings)], readings[max(readings)]
    busy = {side: sum(after[side]) - sum(before[side]) for side in after}
    processes = {side: len(found) for side, found in after.items()}
    found = summarise(rows, busy, processes, completions=size.completions, wall_s=end - start)
    return {"mode": mode, **found}


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


def _cpu_seconds(session: int) -> dict[str, list[float]]:
    """CPU seconds so far of each rollout actor and each rank of the run that leads this session."""
    seconds: dict[str, list[float]] = {"actors": [], "ranks": []}
    titles = {"ray::RolloutActor": "actors", "ray::LearnerRank": "ranks"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            side = next((side for prefix, side in titles.items() if title.startswith(prefix)), None)
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            if side is not None and int(after_name[3]) == session:
                seconds[side].append((int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK"))
    return seconds


if __name__ == "__main__":
    sys.exit(report.main("overlap", run))
