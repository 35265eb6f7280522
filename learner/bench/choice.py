"""What scoring the choice of positions costs: decoupled confidence against random order, ours both.

    python -m learner.bench.choice [--small] [--out FOLDER]

No extra forward of the trunk is needed, but the head at every masked position of the block, in the engine and in the
learner. Time and memory as in ``learner.bench.steps``; the two rules take turns.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

from learner.bench import report
from learner.bench.compare import our_update
from learner.bench.measure import interleaved, machine
from learner.bench.policy import BenchEngine, Shape, build_policy, generate, warm_up
from learner.bench.step_memory import memory_in_fresh_process
from learner.bench.steps import FULL, SMALL, Size
from rollout.malloc import keep_freed_memory

COLUMNS = [
    "V", "step", "head rows", "random s", "decoupled s", "time ratio", "random MB", "decoupled MB", "memory ratio",
]  # fmt: skip


def run(*, small: bool = False) -> dict[str, Any]:
    """Everything, as ``report`` stores it."""
    torch.set_num_threads(1)
    keep_freed_memory()
    about = machine(threads=1)
    rows: list[dict[str, Any]] = []
    sizes = SMALL if small else FULL
    for size in sizes:
        print(f"choice: V {size.shape.vocabulary}", file=sys.stderr, flush=True)
        # Memory only where the vocabulary is large enough to matter.
        rows += measure(dataclasses.replace(size, memory=size.memory and size is sizes[-1]))
    tables = {"Decoupled confidence against random order (CPU seconds; peak above the model's own)": COLUMNS}
    return {"benchmark": "choice", "small": small, "machine": about, "rows": rows, "tables": tables, "bars": []}


def measure(size: Size) -> list[dict[str, Any]]:
    """Rows of one vocabulary: the engine, then the learner at the smallest k."""
    shapes = [dataclasses.replace(size.shape, position_rule=rule) for rule in ("random", "decoupled_confidence")]
    model, family = build_policy(size.shape)
    warm_up(model, train=True)
    engine = BenchEngine(model, family, max_rows=size.shape.rows)
    groups = [generate(engine, shape) for shape in shapes]
    k = size.ks[0]

    def update(index: int) -> Callable[[], Any]:
        def work() -> None:
            model.zero_grad(set_to_none=True)
            our_update(model, family, groups[index], shapes[index], k)

        return work

    head_rows = sum(_candidates(step, shapes[0]) for step in range(size.shape.steps)) * size.shape.rows
    revealed = size.shape.completion * size.shape.rows
    engines = interleaved(lambda: generate(engine, shapes[0]), lambda: generate(engine, shapes[1]), 1)
    learners = interleaved(update(0), update(1), 1)
    found = []
    for step, at, seconds in (("engine", 0, engines), (f"learner k={k}", k, learners)):
        nbytes = [memory_in_fresh_process(shape, "ours", at) for shape in shapes] if size.memory else None
        found.append(
            {
                "V": size.shape.vocabulary,
                "step": step,
                "head rows": f"{head_rows / revealed:.3g} x",
                "random s": seconds[0].cpu,
                "decoupled s": seconds[1].cpu,
                "time ratio": seconds[1].cpu / seconds[0].cpu,
                "random MB": nbytes[0] / 1e6 if nbytes else None,
                "decoupled MB": nbytes[1] / 1e6 if nbytes else None,
                "memory ratio": nbytes[1] / nbytes[0] if nbytes else None,
            }
        )
    return found


def _candidates(step: int, shape: Shape) -> int:
    """Masked positions of the block before this step."""
    per_block = shape.steps // (shape.completion // shape.block)
    return shape.block - step % per_block * (shape.block // per_block)


if __name__ == "__main__":
    sys.exit(report.main("choice", run))
