"""Engine and learner step against the plain way: time, memory, equality, and the floor.

    python -m learner.bench.steps [--small] [--out FOLDER]

Ours and plain take turns in one process with one thread; a ratio is the median plain time over our median time.
Where the vocabulary is large, the plain way is timed over the first part of its equal steps (or draws) and multiplied
up; the table says how many. Memory is measured in a fresh process for each (``measure.peak_above``). DeepSpeed's
wrapper and optimizer step are not in it: the plain way would need the same. The floor is the operations of our matrix
products over the machine's matmul rate, measured in the same run.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from learner.bench import report
from learner.bench.compare import (
    Update,
    as_plain,
    by_view,
    compare_engine,
    compare_updates,
    draws_of,
    gradient_of,
    off_policy,
    our_update,
)
from learner.bench.measure import Seconds, interleaved, machine, matmul_rate
from learner.bench.plain import PlainRollout, plain_generate, plain_update
from learner.bench.policy import BenchEngine, Shape, build_policy, generate, warm_up
from learner.bench.step_memory import memory_in_fresh_process
from learner.objectives.advantages import group_advantages
from learner.planning.flops import Flops, forward_flops, training_flops
from learner.settings.methods.states import AgrpoConfig
from rollout.malloc import keep_freed_memory
from rollout.models.family import PolicyAdapter
from rollout.trajectory import TrajectoryGroup

# CPU seconds of the reference implementation, on 2 cores of another machine of the same kind.
REFERENCE = {
    (200, 0): 4.5, (200, 4): 1.1, (200, 24): 7.0,
    (32000, 0): 36.6, (32000, 4): 6.1, (32000, 24): 36.8,
    (126464, 0): 163.0, (126464, 4): 20.4, (126464, 24): 121.0,
}  # fmt: skip


TABLES = {
    "Time (CPU seconds, one thread; ratio: plain / ours)": [
        "V", "step", "ours s", "plain s", "plain timed", "time ratio", "wall ratio", "reference s",
        "reference / ours",
    ],
    "Memory (peak above the model's own)": ["V", "step", "ours MB", "plain MB", "memory ratio"],
    "Work (operations of matrix products; floor: ours at the machine's rate)": [
        "V", "step", "forward GF", "backward GF", "recompute GF", "plain GF", "matmul GF/s", "floor s", "times floor",
    ],
    "Equality (largest error of ours against plain)": ["V", "step", "logp error", "loss error", "gradient error"],
}  # fmt: skip


NOISE = 0.03
"""Of a ratio of two equal times on a machine with nothing else to do."""


@dataclass(frozen=True)
class Size:
    """What is measured at one vocabulary. k 0 stands for the engine."""

    shape: Shape
    ks: tuple[int, ...]
    repeats: tuple[int, ...]
    """Of the engine, then of the learner at each k."""
    plain_steps: int
    """Denoising steps that the plain way is timed over."""
    plain_draws: int
    """Draws that the plain way is timed over, at most."""
    check_steps: int
    """Denoising steps drawn once more the plain way with our noise, to compare."""
    memory: bool = True
    """Measure memory too, each in a fresh process."""


FULL = (
    Size(Shape(200), (4, 24), repeats=(9, 9, 5), plain_steps=32, plain_draws=24, check_steps=32),
    Size(Shape(32_000), (4, 24), repeats=(2, 2, 2), plain_steps=8, plain_draws=6, check_steps=4),
    Size(Shape(126_464), (4, 24), repeats=(3, 3, 3), plain_steps=4, plain_draws=4, check_steps=2),
)
_TINY = Shape(64, d_model=32, layers=2, heads=2, mlp=64, prompt=8, completion=16, block=8, steps=8, rows=4, lora_r=4)
_TINY = dataclasses.replace(_TINY, top_k=8, views_per_forward=4)
SMALL = (Size(_TINY, (2, 6), repeats=(1, 1, 1), plain_steps=8, plain_draws=6, check_steps=8, memory=False),)


def run(*, small: bool = False) -> dict[str, Any]:
    """Everything, as ``report`` stores it."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the product's own processes do; both ways gain by it
    about = machine(threads=1)
    rows: list[dict[str, Any]] = []
    for size in SMALL if small else FULL:
        print(f"steps: V {size.shape.vocabulary}", file=sys.stderr, flush=True)
        rows += measure(size)
    return {
        "benchmark": "steps",
        "small": small,
        "machine": about,
        "rows": rows,
        "tables": TABLES,
        "bars": [] if small else bars(rows),
    }


def measure(size: Size) -> list[dict[str, Any]]:
    """Rows of one vocabulary: the engine, then the learner at each k."""
    shape = size.shape
    model, family = build_policy(shape)
    warm_up(model, train=True)
    engine = BenchEngine(model, family, max_rows=shape.rows)
    group = generate(engine, shape)
    rate = matmul_rate()
    agreement = compare_engine(model, group, shape, family, steps=size.check_steps)

    def plain_engine() -> PlainRollout:
        return plain_generate(model, shape, group.unmask_step, mask_id=family.mask_token_id, steps=size.plain_steps)

    ours, plain = interleaved(lambda: generate(engine, shape), plain_engine, size.repeats[0])
    part = size.plain_steps / shape.steps
    revealed = shape.completion // shape.steps
    flops = forward_flops(shape.model, **shape.sizes, rows=shape.rows, head_rows=shape.rows * revealed) * shape.steps
    plain_flops = (
        forward_flops(shape.model, **shape.sizes, rows=shape.rows, head_rows=shape.rows * shape.length) * shape.steps
    )
    rows = [_row(size, 0, ours, plain, part, flops, plain_flops, rate, agreement, f"{size.plain_steps}/{shape.steps}")]
    group = off_policy(group)
    rollout = as_plain(group, shape)
    for k, repeats in zip(size.ks, size.repeats[1:], strict=True):
        rows.append(_learner_row(model, family, group, rollout, size, k, repeats))
    return rows


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the issue asks for, at the sizes it names."""
    found = []
    for row in rows:
        name = f"V {row['V']}, {row['step']}"
        if row["V"] == 126_464:
            found.append(report.bar(f"{name}: plain time / ours", row["time ratio"], 8.0))
            found.append(report.bar(f"{name}: plain memory / ours", row["memory ratio"], 8.0))
            found.append(report.bar(f"{name}: the reference's time / ours (the aim)", row["reference / ours"], 10.0))
        elif row["V"] == 200:
            # At k 4 no draw repeats and the trunk is all: equal work, so equal within the noise of the measurement.
            limit = 1.3 if row["step"] == "learner k=24" else 1.0 - NOISE
            found.append(report.bar(f"{name}: plain time / ours", row["time ratio"], limit))
    return found


def _learner_row(
    model: torch.nn.Module,
    family: PolicyAdapter,
    group: TrajectoryGroup,
    rollout: PlainRollout,
    size: Size,
    k: int,
    repeats: int,
) -> dict[str, Any]:
    shape = size.shape
    config, keep = AgrpoConfig(k=k, timestep_sampling="uniform"), min(k, size.plain_draws)
    advantages = group_advantages(group.rewards)
    plan, scored, loss = _fresh(model, lambda: our_update(model, family, group, shape, k))
    mine = Update(loss, gradient_of(model), by_view(scored))
    draws = draws_of(plan, shape.rows)
    plain: list[Update] = []

    def plain_step() -> None:
        mask = family.mask_token_id
        loss, scored = plain_update(model, shape, rollout, advantages, draws, mask_id=mask, config=config, keep=keep)
        plain[:] = [Update(loss, gradient_of(model), {(row, step): logp for row, step, logp in scored})]

    rate = matmul_rate()
    ours_s, plain_s = interleaved(
        lambda: _fresh(model, lambda: our_update(model, family, group, shape, k)),
        lambda: _fresh(model, plain_step),
        repeats,
    )
    errors = compare_updates(mine, plain[0], whole=keep == k)
    revealed = shape.completion // shape.steps
    views = sum(len(forward.views) for forward in plan.forwards[0])
    flops = training_flops(shape.model, **shape.sizes, rows=views, head_rows=views * revealed)
    plain_flops = training_flops(
        shape.model, **shape.sizes, rows=shape.rows * k, head_rows=shape.rows * k * shape.length
    )
    return _row(size, k, ours_s, plain_s, keep / k, flops, plain_flops, rate, errors, f"{keep}/{k}")


def _row(
    size: Size,
    k: int,
    ours: Seconds,
    plain: Seconds,
    part: float,
    flops: Flops,
    plain_flops: Flops,
    rate: float,
    errors: dict[str, float],
    timed_part: str,
) -> dict[str, Any]:
    ours_b, plain_b = (
        (memory_in_fresh_process(size.shape, way, k) if size.memory else None) for way in ("ours", "plain")
    )
    floor = flops.total / rate
    reference = REFERENCE.get((size.shape.vocabulary, k))
    return {
        "V": size.shape.vocabulary,
        "step": f"learner k={k}" if k else "engine",
        "ours s": ours.cpu,
        "plain s": plain.cpu / part,
        "plain timed": timed_part,
        "time ratio": plain.cpu / part / ours.cpu,
        "wall ratio": plain.wall / part / ours.wall,
        "ours MB": None if ours_b is None else ours_b / 1e6,
        "plain MB": None if plain_b is None else plain_b / 1e6,
        "memory ratio": plain_b / max(ours_b, 1) if ours_b is not None and plain_b is not None else None,
        "forward GF": flops.forward / 1e9,
        "backward GF": flops.backward / 1e9,
        "recompute GF": flops.recompute / 1e9,
        "plain GF": plain_flops.total / 1e9,
        "matmul GF/s": rate / 1e9,
        "floor s": floor,
        "times floor": ours.cpu / floor,
        "reference s": reference,
        "reference / ours": None if reference is None else reference / ours.cpu,
        "logp error": errors["logp_error"],
        "loss error": errors.get("loss_error"),
        "gradient error": errors.get("gradient_error"),
    }


def _fresh(model: torch.nn.Module, work: Callable[[], Any]) -> Any:
    model.zero_grad(set_to_none=True)
    return work()


if __name__ == "__main__":
    sys.exit(report.main("steps", run))
