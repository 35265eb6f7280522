"""LLaDA-8B's shape on one GPU, with random bf16 weights made there and no Ray: the engine, then the learner.

    python -m learner.bench.gpu [--small] [--out FOLDER]
    python -m learner.bench.gpu --all [STEP ...] [--small] [--out FOLDER]

Engine: 16 rows, prompt 256, completion 384, blocks of 12, 3 tokens a step, LoRA r 64. ``forward share`` is the
operations of its forwards over the time of these forwards, against the machine's bf16 rate for a large square product;
``whole share`` divides by the whole call, sampling included. Learner: 8 completions at k 24, activation checkpointing.
Its share counts all operations that run, the checkpointing's second forward included; ``useful share`` leaves that out.
``predicted GB`` is what the plan's memory model (docs/planning.md) says of the peak beside it: weights, adapter,
gradients, activations, logits; no DeepSpeed here, and nothing of CUDA's own, which torch doesn't count either.
Bars: 60 % of the ceiling in the engine's forward, 40 % in the learner. ``--small`` does the same on the CPU, tiny.
``--all`` does something else: what is worth knowing in the first ten minutes on a GPU (``bench.first_minutes``).
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from learner.bench import report
from learner.bench.compare import our_update
from learner.bench.first_minutes.drive import STEPS, failed, run_all
from learner.bench.measure import machine, matmul_rate
from learner.bench.model_free import prebuilt_group
from learner.bench.planned import predicted
from learner.bench.planned_cases import ONE_STEP, Case
from learner.bench.policy import BenchEngine, Shape, build_policy, generate, warm_up
from learner.planning.flops import forward_flops, training_flops
from learner.runs.stopping import exit_status
from rewards.errors import ConfigError
from rollout.models.family import PolicyAdapter
from rollout.models.loading import recompute_activations

FULL = Shape(
    126_464, d_model=4096, layers=32, heads=32, mlp=12_288, prompt=256, completion=384, block=12, steps=128, rows=16,
    lora_r=64, views_per_forward=8, top_k=150, top_p=0.99,
)  # fmt: skip
SMALL = Shape(
    64, d_model=32, layers=2, heads=2, mlp=64, prompt=8, completion=24, block=12, steps=8, rows=4, lora_r=4,
    views_per_forward=4, top_k=8,
)  # fmt: skip
LEARNER_ROWS, K = 8, 24
ENGINE_BAR, LEARNER_BAR = 0.6, 0.4

TABLES = {
    "Engine": [
        "rows", "forward s", "generate s", "tokens/s", "forward TF", "ceiling TF/s", "forward share", "whole share",
        "predicted GB", "peak GB",
    ],
    "Learner": [
        "completions", "k", "views", "update s", "predicted GB", "peak GB", "forward TF", "backward TF",
        "recompute TF", "ceiling TF/s",
        "share", "useful share",
    ],
}  # fmt: skip


def run(*, small: bool = False) -> dict[str, Any]:
    """Engine and learner, as ``report`` stores them.

    Raises:
        ConfigError: there is no GPU, and the small size wasn't asked for.
    """
    require_gpu(small=small)
    shape, device = (SMALL, "cpu") if small else (FULL, "cuda")
    about = machine(threads=torch.get_num_threads())
    model, family = build_policy(shape, device=device, dtype=torch.bfloat16)
    warm_up(model, train=False)
    ceiling = matmul_rate(device=device, dtype=torch.bfloat16, size=256 if small else 8192)
    engine = engine_row(model, family, shape, ceiling)
    learner = learner_row(model, family, dataclasses.replace(shape, rows=min(shape.rows, LEARNER_ROWS)), ceiling)
    bars = [
        report.bar("engine: forward's share of the matmul ceiling", engine["forward share"], ENGINE_BAR),
        report.bar("learner: share of the matmul ceiling", learner["share"], LEARNER_BAR),
    ]
    return {
        "benchmark": "gpu",
        "small": small,
        "machine": about,
        "rows": [engine, learner],
        "tables": TABLES,
        "bars": [] if small else bars,
    }


def require_gpu(*, small: bool) -> None:
    """Raises ConfigError: there is no GPU, and the small size wasn't asked for."""
    if not small and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; --small runs the same path on the CPU with a tiny model")


class _TimedEngine(BenchEngine):
    """Keeps account of its forwards."""

    forward_s = 0.0

    def _forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        begin = _now(self.device)
        logits = super()._forward(input_ids, attention_mask, logit_rows)
        self.forward_s += _now(self.device) - begin
        return logits


def engine_row(model: torch.nn.Module, family: PolicyAdapter, shape: Shape, ceiling: float) -> dict[str, Any]:
    """One group drawn. ``ceiling``: operations of a large product in a second."""
    engine = _TimedEngine(model, family, max_rows=shape.rows)
    # The first block alone, to warm up at the very shapes that are timed.
    blocks = shape.completion // shape.block
    first = dataclasses.replace(
        shape, prompt=shape.length - shape.block, completion=shape.block, steps=shape.steps // blocks
    )
    generate(engine, first)
    engine.forward_s = 0.0
    _forget_peak(engine.device)
    begin = _now(engine.device)
    group = generate(engine, shape)
    seconds = _now(engine.device) - begin
    assert int(group.nfe.max()) == shape.steps and bool(group.drawn.all()), "rows ended early: the operations are fewer"
    flops = (
        forward_flops(
            shape.model, **shape.sizes, rows=shape.rows, head_rows=shape.rows * shape.completion // shape.steps
        )
        * shape.steps
    )
    return {
        "rows": shape.rows,
        "forward s": engine.forward_s,
        "generate s": seconds,
        "tokens/s": float(group.drawn.sum()) / seconds,
        "forward TF": flops.forward / 1e12,
        "ceiling TF/s": ceiling / 1e12,
        "forward share": flops.forward / engine.forward_s / ceiling,
        "whole share": flops.forward / seconds / ceiling,
        "predicted GB": predicted_gb(engine_case(shape), engine.device),
        "peak GB": _peak(engine.device),
    }


def learner_row(
    model: torch.nn.Module,
    family: PolicyAdapter,
    shape: Shape,
    ceiling: float,
    *,
    k: int = K,
    checkpointing: bool = True,
) -> dict[str, Any]:
    """An update of one group, without the optimizer's step."""
    device = next(model.parameters()).device
    group = prebuilt_group(**shape.group)
    if checkpointing:
        recompute_activations(model)
    model.train()
    our_update(model, family, group, shape, 1)
    model.zero_grad(set_to_none=True)
    _forget_peak(device)
    begin = _now(device)
    plan, _, _ = our_update(model, family, group, shape, k)
    seconds = _now(device) - begin
    views = sum(len(forward.views) for forward in plan.forwards[0])
    head_rows = views * shape.completion // shape.steps
    flops = training_flops(shape.model, **shape.sizes, rows=views, head_rows=head_rows, checkpointing=checkpointing)
    return {
        "completions": shape.rows,
        "k": k,
        "views": views,
        "update s": seconds,
        "predicted GB": predicted_gb(learner_case(shape, checkpointing=checkpointing), device),
        "peak GB": _peak(device),
        "forward TF": flops.forward / 1e12,
        "backward TF": flops.backward / 1e12,
        "recompute TF": flops.recompute / 1e12,
        "ceiling TF/s": ceiling / 1e12,
        "share": flops.total / seconds / ceiling,
        "useful share": (flops.forward + flops.backward) / seconds / ceiling,
    }


def engine_case(shape: Shape) -> Case:
    return Case("engine", shape, "bfloat16")


def learner_case(shape: Shape, *, checkpointing: bool) -> Case:
    return Case("learner", shape, "bfloat16", checkpointing=checkpointing, settings=ONE_STEP)


def predicted_gb(case: Case, device: torch.device) -> float:
    """What the plan says that a process without CUDA's own holds on the device."""
    model = case.shape.model
    weights = 2 * (model.parameters + model.adapter_parameters(case.shape.lora_r))
    return (
        weights + sum(predicted(case, "cuda" if device.type == "cuda" else "cpu", grown=("gradients",)).values())
    ) / 1e9


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float | None:
    """GB allocated at most since ``_forget_peak``; None on a CPU, where ``learner.bench.planned`` measures."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def _now(device: torch.device) -> float:
    """Wall clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 when a step of ``--all`` failed; a bar that is missed is a result, not a failure."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = report.options("gpu")
    parser.add_argument(
        "--all",
        nargs="*",
        choices=STEPS,
        metavar="STEP",
        help=f"the first ten minutes on a GPU: all steps, or those named, of {', '.join(STEPS)}",
    )
    arguments = parser.parse_args(argv)
    if arguments.all is None:
        report.keep(run(small=arguments.small), arguments)
        return 0
    require_gpu(small=arguments.small)
    result = run_all(arguments.all or STEPS, small=arguments.small)
    report.keep(result, arguments)
    return 1 if failed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
