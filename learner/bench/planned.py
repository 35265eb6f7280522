"""The plan's memory model against measured peaks: engine and learner steps of small models, each in a fresh process.

    python -m learner.bench.planned [--small] [--out FOLDER]
    python -m learner.bench.planned --write docs/planning.md

Measured is the peak of resident memory above what the process holds once the model is there and has done a tiny step
(``measure.peak_above``); predicted is what ``learner.plan`` says of the same settings, but for the weights. Nothing is
fitted to the cases: the formulas are those of docs/planning.md. The bar is an error of 15 % in every case.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from typing import Any

import torch

from learner.bench import report
from learner.bench.measure import machine
from learner.bench.planned_cases import CASES, SMALL, Case
from learner.bench.policy import Shape
from learner.bench.real_steps import rollout_peak, save_model, update_peak
from learner.planning.memory import Device, actor_memory, rank_memory
from learner.planning.scored import largest_forward
from rollout.malloc import FIXED_THRESHOLD

BAR = 0.15
LIMIT_S = 600.0
MB = 1e6

TABLES = {
    "Predicted and measured peaks": [
        "case", "step", "method", "dtype", "checkpointing", "V", "width", "MLP", "layers", "rows", "L", "largest part",
        "predicted MB", "measured MB", "error %",
    ],
}  # fmt: skip


def run(*, small: bool = False) -> dict[str, Any]:
    """All cases, as ``report`` stores them."""
    rows = []
    for name, case in (SMALL if small else CASES).items():
        row = {"case": name, **measured_row(case)}
        rows.append(row)
        print(f"planned: {name}: {row['measured MB']:.0f} MB, {row['error %']:+.1f} %", file=sys.stderr, flush=True)
    worst = max(abs(row["error %"]) for row in rows)
    return {
        "benchmark": "planned",
        "small": small,
        "machine": machine(threads=1),
        "rows": rows,
        "tables": TABLES,
        "bars": [] if small else [report.bar("largest error, %", worst, BAR * 100, at_least=False)],
    }


def measured_row(case: Case) -> dict[str, Any]:
    """One case's row of the table."""
    shape = case.shape
    measured = measure_in_fresh_process(case)
    parts = predicted(case)
    total = sum(parts.values())
    return {
        "step": case.step,
        "method": case.method,
        "dtype": case.dtype,
        "checkpointing": "yes" if case.checkpointing else "no",
        "V": shape.vocabulary,
        "width": shape.d_model,
        "MLP": shape.mlp,
        "layers": shape.layers,
        "rows": shape.rows if case.step == "engine" else largest_forward(case.config()).views,
        "L": shape.length,
        "largest part": max(parts, key=lambda name: parts[name]),
        "predicted MB": total / MB,
        "measured MB": measured / MB,
        "error %": 100.0 * (total - measured) / measured,
    }


def predicted(
    case: Case,
    device: Device = "cpu",
    grown: Collection[str] = ("gradients", "AdamW's moments"),
) -> dict[str, int]:
    """Bytes by part above the weights, as ``learner.plan`` counts them; what doesn't meet in time isn't added up.

    Args:
        grown: what is there all the time in a run, but only from the first update on.
    """
    config, shape = case.config(), case.shape
    count = actor_memory if case.step == "engine" else rank_memory
    memory = count(config, shape.model, device=device, prompt=shape.prompt)
    resident = [item for item in memory.resident if item.name in grown]
    during = [*memory.kept, memory.largest_moment]
    moving = max((during, memory.after), key=lambda items: sum(item.bytes for item in items))
    return {item.name: item.bytes for item in (*resident, *moving)}


def measure_in_fresh_process(case: Case) -> int:
    """Bytes above the model's own."""
    environment = os.environ | FIXED_THRESHOLD | {"OMP_NUM_THREADS": "1"}
    request = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-m", "learner.bench.planned", "--one", request]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"measuring memory failed: {done.stderr[-2000:]}"
    return int(done.stdout.split()[-1])


def measure(case: Case) -> int:
    """Measure in this process, which must be fresh."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(case, folder)
        return rollout_peak(case, folder) if case.step == "engine" else update_peak(case, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        raw = json.loads(sys.argv[2])
        print(measure(Case(**{**raw, "shape": Shape(**raw["shape"]), "settings": tuple(raw["settings"])})))
    else:
        sys.exit(report.main("planned", run))
