"""Engine and learner at LLaDA-8B's shape, beside the estimates and the plan's peaks.

Where the GPU can't hold all 32 layers, as many as it can are there, and times are multiplied up by the operations.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from learner.bench import llada_8b as bench
from learner.bench.first_minutes import estimates
from learner.bench.first_minutes.figures import Figure
from learner.bench.measure import matmul_rate
from learner.bench.planned_cases import Case
from learner.bench.policy import Shape, build_policy, warm_up
from learner.planning.flops import forward_flops
from learner.planning.hardware import known_gpu
from rewards.errors import ConfigError
from rollout.models.family import PolicyAdapter

ENGINE = dataclasses.replace(bench.FULL, prompt=616, completion=24, steps=8)
"""The last two blocks of 384 tokens after a prompt of 256: a step costs the same in all of them."""
LEARNER = dataclasses.replace(bench.FULL, rows=8, views_per_forward=4)
K = 4
FORWARDS_OF_AN_UPDATE = 96
"""Of each of 8 ranks in the recipe llada_gsm8k: 16 prompts, 8 completions, k 24, 4 views."""
OF_FREE = 0.9
"""Share of the free memory that the plan's peak may take."""


def engine(*, small: bool) -> list[Figure]:
    """Denoising steps of 16 rows."""
    whole = bench.SMALL if small else ENGINE
    shape, scale, note = fitting(whole, bench.engine_case, small=small)
    model, family, ceiling = _prepared(shape, small=small)
    row = bench.engine_row(model, family, shape, ceiling)
    forward_s, step_s = (scale * row[name] / shape.steps for name in ("forward s", "generate s"))
    gpu, tokens = _model_of_gpu(small=small), shape.rows * shape.completion / shape.steps
    expected = None if gpu is None else estimates.forward_s(gpu, whole)
    expected_step = None if expected is None else expected + estimates.OUTSIDE_S
    return [
        Figure("TF/s of a large product", row["ceiling TF/s"], None if gpu is None else estimates.product_rate(gpu)),
        Figure(f"s a forward of {shape.rows} x {shape.length} tokens", forward_s, expected, note),
        Figure("s a denoising step", step_s, expected_step, note),
        Figure("tokens/s", tokens / step_s, None if expected_step is None else tokens / expected_step, note),
        Figure("share of that product's rate, forward", row["forward share"], f">= {bench.ENGINE_BAR:g}"),
        *_peaks(row["peak GB"], row["predicted GB"], shape),
    ]


def learner(*, small: bool) -> list[Figure]:
    """Forwards and backwards of 4 views."""
    return _learner(small=small, recomputed=False)


def learner_recomputed(*, small: bool) -> list[Figure]:
    """The same with activations computed twice."""
    return _learner(small=small, recomputed=True)


def fitting(whole: Shape, case: Callable[[Shape], Case], *, small: bool) -> tuple[Shape, float, str]:
    """As many layers of the shape as the GPU holds, by what its operations are to be multiplied to be all layers', and
    a note that says so.

    Raises:
        ConfigError: it doesn't hold one.
    """
    if small:
        return whole, 1.0, ""
    free, device = OF_FREE * torch.cuda.mem_get_info()[0] / 1e9, torch.device("cuda")
    for layers in range(whole.layers, 0, -1):
        shape = dataclasses.replace(whole, layers=layers)
        if bench.predicted_gb(case(shape), device) <= free:
            scale = _operations(whole) / _operations(shape)
            note = "" if layers == whole.layers else f"of {layers} layers, times {scale:.3g}"
            return shape, scale, note
    raise ConfigError(
        f"{free:.1f} GB are free on this GPU, and LLaDA-8B with one layer needs more; end what else uses it"
    )


def _learner(*, small: bool, recomputed: bool) -> list[Figure]:
    whole = bench.SMALL if small else LEARNER
    shape, scale, note = fitting(whole, lambda each: bench.learner_case(each, checkpointing=recomputed), small=small)
    model, family, ceiling = _prepared(shape, small=small)
    row = bench.learner_row(model, family, shape, ceiling, k=K, checkpointing=recomputed)
    views = shape.views_per_forward
    forward_s = scale * row["update s"] / math.ceil(row["views"] / views)
    gpu = _model_of_gpu(small=small)
    expected = None if gpu is None else estimates.learner_s(gpu, whole, recomputed=recomputed)
    update = None if expected is None else expected * FORWARDS_OF_AN_UPDATE
    return [
        Figure(f"s a forward and backward of {views} x {shape.length} tokens", forward_s, expected, note),
        Figure(
            "s an update of llada_gsm8k",
            forward_s * FORWARDS_OF_AN_UPDATE,
            update,
            f"{FORWARDS_OF_AN_UPDATE} times that",
        ),
        Figure("share of a large product's rate", row["share"], f">= {bench.LEARNER_BAR:g}"),
        Figure("the same without what is computed twice", row["useful share"]),
        *_peaks(row["peak GB"], row["predicted GB"], shape),
    ]


def _prepared(shape: Shape, *, small: bool) -> tuple[torch.nn.Module, PolicyAdapter, float]:
    """The policy, and the operations of a large product in a second."""
    where = "cpu" if small else "cuda"
    model, family = build_policy(shape, device=where, dtype=torch.bfloat16)
    warm_up(model, train=False)
    return model, family, matmul_rate(device=where, dtype=torch.bfloat16, size=256 if small else 8192)


def _peaks(peak_gb: float | None, predicted_gb: float, shape: Shape) -> list[Figure]:
    reserved = torch.cuda.max_memory_reserved() / 1e9 if peak_gb is not None else None
    note = f"the plan's, {shape.layers} layers, without CUDA's own"
    return [
        Figure("peak GB allocated", peak_gb, predicted_gb, note),
        Figure("peak GB reserved", reserved, None, "what torch's allocator took of the GPU"),
    ]


def _operations(shape: Shape) -> float:
    return forward_flops(shape.model, **shape.sizes, rows=1, head_rows=1).forward


def _model_of_gpu(*, small: bool) -> str | None:
    return None if small else known_gpu(torch.cuda.get_device_name())
