"""LLaDA-8B's shape for the benchmarks of one GPU: an engine's and a learner's work, timed, beside the plan's peak."""

import dataclasses
import time
from typing import Any

import torch

from learner.bench.compare import our_update
from learner.bench.model_free import prebuilt_group
from learner.bench.planned import predicted
from learner.bench.planned_cases import ONE_STEP, Case
from learner.bench.policy import BenchEngine, Shape, generate
from learner.planning.flops import forward_flops, training_flops
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
