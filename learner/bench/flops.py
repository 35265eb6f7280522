"""Floating-point operations of the policy's matrix products, counted from the shapes (a multiply-add is two).

Left out: norms, rotary embedding, activations, softmax and sampling, whose operations are few and whose time is memory
traffic. Checked against ``torch.utils.flop_counter`` in tests/test_bench.py.

With LoRA only the adapter is trained, so a frozen map's backward is its input's gradient alone (as much as its
forward), an adapter's backward is both (twice its forward), and the first block's q, k and v maps pass none on: no
parameter lies below them (with checkpointed activations they do, for peft then asks for the embeddings' gradient).
Attention's backward is four products, twice its forward; fused kernels compute the scores once more, which counts as
recomputation, as does activation checkpointing's second forward.
"""

from dataclasses import dataclass

from learner.bench.policy import Shape


@dataclass(frozen=True)
class Flops:
    """Operations by their purpose."""

    forward: float
    backward: float = 0.0
    recompute: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.forward * times, self.backward * times, self.recompute * times)


def forward_flops(shape: Shape, *, rows: int, head_rows: int) -> Flops:
    """One forward of ``rows`` sequences, with the head at ``head_rows`` positions in all."""
    return Flops(_trunk_forward(shape, rows) + _head(shape, head_rows))


def training_flops(shape: Shape, *, rows: int, head_rows: int, checkpointing: bool = False) -> Flops:
    """Forward and backward of ``rows`` sequences with a trained LoRA adapter on the seven maps of every block."""
    d, r, tokens = shape.d_model, shape.lora_r, rows * shape.length
    attention = _attention(shape, rows)
    # An adapter y = B A x has four backward products: both factors', A x's and x's.
    maps = _frozen(shape, tokens) + 2.0 * _adapter(shape, tokens)
    recompute = 0.5 * attention
    if checkpointing:
        # peft then asks for the embeddings' gradient; a block's second forward ends before its last product, B (A x).
        recompute += _trunk_forward(shape, rows) - 2.0 * tokens * shape.layers * d * r
    else:
        maps -= 2.0 * tokens * 3 * (d * d + d * r)
    return Flops(
        forward=_trunk_forward(shape, rows) + _head(shape, head_rows),
        backward=maps + 2.0 * attention + _head(shape, head_rows),
        recompute=recompute,
    )


def _trunk_forward(shape: Shape, rows: int) -> float:
    tokens = rows * shape.length
    return _frozen(shape, tokens) + _adapter(shape, tokens) + _attention(shape, rows)


def _frozen(shape: Shape, tokens: int) -> float:
    d, hidden = shape.d_model, shape.mlp
    return 2.0 * tokens * shape.layers * (4 * d * d + 3 * d * hidden)


def _adapter(shape: Shape, tokens: int) -> float:
    d, hidden = shape.d_model, shape.mlp
    return 2.0 * tokens * shape.layers * shape.lora_r * (4 * 2 * d + 3 * (d + hidden))


def _attention(shape: Shape, rows: int) -> float:
    return 4.0 * rows * shape.length**2 * shape.d_model * shape.layers


def _head(shape: Shape, head_rows: int) -> float:
    return 2.0 * head_rows * shape.d_model * shape.vocabulary
