"""What a GPU should take for LLaDA-8B's forward and backward, from its data sheet: operations at a share of its peak,
and what the trunk's elementwise kernels read and write at a share of its memory's speed. Nothing was measured yet.

docs/benchmarks.md has these figures for some GPUs.
"""

from learner.bench.policy import Shape
from learner.planning.flops import Flops, forward_flops, training_flops
from learner.planning.hardware import GPUS

MEMORY_TB_S = {
    "H200": 4.8,
    "H100": 3.35,
    "A100": 2.04,
    "A100-40G": 1.56,
    "L40S": 0.864,
    "A6000": 0.768,
    "A10": 0.6,
    "L4": 0.3,
    "4090": 1.01,
    "3090": 0.936,
}
"""Data sheets' values."""
OF_PEAK, OF_PEAK_TRAINING, OF_MEMORY = 0.66, 0.56, 0.78
"""Shares that large products and elementwise kernels reach: assumed."""
PASSES, PASSES_BACK = 138, 217
"""How many times a block's elementwise kernels and the adapters' narrow products read or write a hidden state [rows,
length, width] in bfloat16, counted at torch's dispatcher: norms 36, rotary 52, LoRA 28, the MLP's product 15, residuals
6; backward."""
PASSES_LAST, PASSES_LAST_BACK = 53, 91
"""Of the last block, whose keys and values alone are of all positions."""
OUTSIDE_S = 0.010
"""A denoising step's time outside the forward: sampling and its records."""


def product_rate(gpu: str) -> float:
    """TF/s of a large product in bfloat16."""
    return OF_PEAK * GPUS[gpu].bf16_tflops


def forward_s(gpu: str, shape: Shape) -> float:
    """A forward of the shape's rows."""
    head_rows = shape.rows * shape.completion // shape.steps
    flops = forward_flops(shape.model, **shape.sizes, rows=shape.rows, head_rows=head_rows)
    return flops.forward / (OF_PEAK * _peak(gpu)) + _elementwise_s(gpu, shape, shape.rows, times=1)


def learner_s(gpu: str, shape: Shape, *, recomputed: bool) -> float:
    """A forward and backward of the shape's views; ``recomputed``: activations are, in the backward."""
    views = shape.views_per_forward
    flops = learner_flops(shape, views, recomputed=recomputed)
    elementwise_s = _elementwise_s(gpu, shape, views, times=2 if recomputed else 1, back=True)
    return flops.total / (OF_PEAK_TRAINING * _peak(gpu)) + elementwise_s


def learner_flops(shape: Shape, views: int, *, recomputed: bool) -> Flops:
    head_rows = views * shape.completion // shape.steps
    return training_flops(shape.model, **shape.sizes, rows=views, head_rows=head_rows, checkpointing=recomputed)


def _elementwise_s(gpu: str, shape: Shape, rows: int, *, times: int, back: bool = False) -> float:
    """Of so many forwards through the blocks, and a backward."""
    passes = (shape.layers - 1) * (times * PASSES + back * PASSES_BACK) + times * PASSES_LAST + back * PASSES_LAST_BACK
    hidden_bytes = 2 * rows * shape.length * shape.d_model
    return passes * hidden_bytes / (OF_MEMORY * MEMORY_TB_S[gpu] * 1e12)


def _peak(gpu: str) -> float:
    return GPUS[gpu].bf16_tflops * 1e12
