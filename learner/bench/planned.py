"""The plan's memory model against measured peaks: engine and learner steps of small models, each in a fresh process.

    python -m learner.bench.planned [--small] [--out FOLDER]
    python -m learner.bench.planned --write docs/planning.md

Measured is the peak of resident memory above what the process holds once the model is there and has done a tiny step
(``measure.peak_above``); predicted is what ``learner.planning`` says of activations, logits, working memory and, in the
learner, the adapter's gradients. Nothing is fitted to the cases: the formulas are those of docs/planning.md. The bar is
an error of 15 % in every case.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch

from learner.bench import report
from learner.bench.compare import our_update
from learner.bench.measure import machine, peak_above
from learner.bench.model_free import prebuilt_group
from learner.bench.policy import BenchEngine, Shape, build_policy, generate, warm_up
from learner.planning import activations
from learner.planning.activations import Trunk
from rollout.malloc import FIXED_THRESHOLD

BAR = 0.15
LIMIT_S = 600.0
MB = 1e6

TABLES = {
    "Predicted and measured peaks": [
        "step", "dtype", "checkpointing", "V", "width", "MLP", "layers", "rows", "L", "largest part", "predicted MB",
        "measured MB", "error %",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement. ``rows`` of the shape are an engine's, ``views_per_forward`` the learner's."""

    step: Literal["engine", "learner"]
    shape: Shape
    dtype: str = "float32"
    checkpointing: bool = False


def _wide(**changes: Any) -> Shape:
    """Where the trunk takes the memory."""
    base = Shape(
        500, d_model=512, layers=6, heads=8, mlp=1536, prompt=64, completion=192, block=48, steps=32, rows=16,
        views_per_forward=8, top_k=50, top_p=0.95,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def _wordy(**changes: Any) -> Shape:
    """Where the vocabulary does."""
    base = Shape(
        126_464, d_model=64, layers=2, heads=2, mlp=128, prompt=32, completion=96, block=32, steps=12, rows=32,
        views_per_forward=32, lora_r=4,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


_STEP = {"prompt": 232, "completion": 24, "block": 24, "steps": 2, "layers": 2}
"""Two steps of two layers: every step and every layer of the engine need the same."""
_DRAW = {"completion": 24, "block": 24, "steps": 2, "layers": 1}

CASES = (
    Case("engine", _wide(rows=32, **_STEP)),
    Case("engine", _wide(rows=48, **_STEP | {"d_model": 768, "mlp": 768})),
    Case("engine", _wide(rows=12, **_STEP | {"d_model": 256, "mlp": 1024, "prompt": 1000})),
    Case("engine", _wide(rows=64, **_STEP), "bfloat16"),
    Case("engine", _wordy(rows=10, **_DRAW)),
    Case("engine", _wordy(rows=10, **_DRAW), "bfloat16"),
    Case("engine", _wordy(rows=40, **_DRAW | {"vocabulary": 32_000, "top_k": None, "top_p": 0.95})),
    Case("engine", _wordy(rows=20, **_DRAW | {"vocabulary": 50_000, "top_k": None, "top_p": 1.0})),
    Case("learner", _wide(views_per_forward=4)),
    Case("learner", _wide(views_per_forward=4, layers=12, d_model=256, heads=4, mlp=1024)),
    Case("learner", _wide(views_per_forward=6, layers=4, d_model=768, mlp=768, lora_r=64)),
    Case("learner", _wide(views_per_forward=8), "bfloat16"),
    Case("learner", _wide(views_per_forward=14), checkpointing=True),
    Case("learner", _wide(views_per_forward=20, layers=16, d_model=256, heads=4, mlp=768), checkpointing=True),
    Case("learner", _wide(views_per_forward=20), "bfloat16", checkpointing=True),
    Case("learner", _wordy(views_per_forward=16, **_DRAW)),
    Case("learner", _wordy(views_per_forward=60, **_DRAW | {"vocabulary": 32_000}), "bfloat16"),
)
_TINY = {"prompt": 8, "completion": 24, "block": 24, "steps": 2, "rows": 4, "views_per_forward": 4, "lora_r": 4}
SMALL = (Case("engine", _wordy(**_TINY)), Case("learner", _wide(**_TINY | {"d_model": 64, "mlp": 128})))


def run(*, small: bool = False) -> dict[str, Any]:
    """All cases, as ``report`` stores them."""
    rows = []
    for case in SMALL if small else CASES:
        row = measured_row(case)
        rows.append(row)
        print(
            f"planned: {row['step']} {row['measured MB']:.0f} MB, {row['error %']:+.1f} %", file=sys.stderr, flush=True
        )
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
        "dtype": case.dtype,
        "checkpointing": "yes" if case.checkpointing else "no",
        "V": shape.vocabulary,
        "width": shape.d_model,
        "MLP": shape.mlp,
        "layers": shape.layers,
        "rows": shape.rows if case.step == "engine" else shape.views_per_forward,
        "L": shape.length,
        "largest part": max(parts, key=lambda name: parts[name]),
        "predicted MB": total / MB,
        "measured MB": measured / MB,
        "error %": 100.0 * (total - measured) / measured,
    }


def predicted(case: Case, *, cpu: bool = True) -> dict[str, int]:
    """Bytes by part; what doesn't meet in time isn't added up."""
    shape, e = case.shape, 2 if case.dtype == "bfloat16" else 4
    revealed = shape.completion // shape.steps
    if case.step == "engine":
        trunk = Trunk(shape.model, shape.rows, shape.length, shape.lora_r, e)
        kind = "top_k" if shape.top_k is not None else "top_p" if shape.top_p < 1 else "none"
        cells = shape.rows * revealed * shape.vocabulary
        moments = {
            "one block's forward": activations.working_forward(trunk),
            "drawing tokens": activations.sampling(cells=cells, itemsize=e, truncation=kind, cpu=cpu),
        }
        largest = max(moments, key=lambda name: moments[name])
        return {largest: moments[largest]}
    trunk = Trunk(shape.model, shape.views_per_forward, shape.length, shape.lora_r, e)
    scored = shape.views_per_forward * revealed
    moments = {
        "logits": activations.scoring(rows=scored, vocabulary=shape.vocabulary, itemsize=e),
        "one block's backward": activations.working_backward(trunk, checkpointing=case.checkpointing),
    }
    largest = max(moments, key=lambda name: moments[name])
    return {
        "activations": activations.kept(trunk, checkpointing=case.checkpointing),
        largest: moments[largest],
        "gradients": shape.model.adapter_parameters(shape.lora_r) * e,
    }


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
    shape = case.shape
    model, family = build_policy(shape, dtype=getattr(torch, case.dtype))
    if case.step == "engine":
        warm_up(model, train=False)
        engine = BenchEngine(model, family, max_rows=shape.rows)
        return peak_above(lambda: generate(engine, shape))
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()
    warm_up(model, train=True)
    # One forward, and its backward: every row at one step, so that views_per_forward rows make one batch.
    shape = dataclasses.replace(shape, rows=shape.views_per_forward)
    group = prebuilt_group(**shape.group)
    return peak_above(lambda: our_update(model, family, group, shape, 1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        raw = json.loads(sys.argv[2])
        print(measure(Case(**{**raw, "shape": Shape(**raw["shape"])})))
    else:
        sys.exit(report.main("planned", run))
