"""Floating-point operations of the policy's matrix products, counted from the shapes (a multiply-add is two).

Left out: norms, rotary embedding, activations, softmax, routing and sampling, whose operations are few and whose time
is memory traffic. Checked against ``torch.utils.flop_counter`` in tests/whole/test_bench.py.

With LoRA only the adapter is trained, so a frozen map's backward is its input's gradient alone (as much as its
forward), an adapter's backward is both (twice its forward), and the first block's q, k and v maps pass none on: no
parameter lies below them (with checkpointed activations they do, for peft then asks for the embeddings' gradient).
Attention's backward is four products, twice its forward; fused kernels compute the scores once more, which counts as
recomputation, as does activation checkpointing's second forward.
"""

from dataclasses import dataclass

from learner.planning.shapes import LinearMap, ModelShape


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


def forward_flops(model: ModelShape, *, lora_r: int, rows: int, length: int, head_rows: float) -> Flops:
    """One forward of ``rows`` sequences of ``length`` tokens, with the head at ``head_rows`` positions in all."""
    return Flops(_trunk_forward(model, lora_r, rows, length) + _head(model, head_rows))


def training_flops(
    model: ModelShape, *, lora_r: int, rows: int, length: int, head_rows: float, checkpointing: bool = False
) -> Flops:
    """Forward and backward of ``rows`` sequences with a trained LoRA adapter on the blocks' maps."""
    tokens = rows * length
    attention = _attention(model, rows, length)
    # An adapter y = B A x has four backward products: both factors', A x's and x's.
    maps = _frozen(model, tokens) + 2.0 * _adapter(model, tokens, lora_r)
    recompute = 0.5 * attention
    if checkpointing:
        recompute += _trunk_forward(model, lora_r, rows, length)  # peft then asks for the embeddings' gradient
    else:
        maps -= 2.0 * tokens * sum(one.inputs * (one.outputs + lora_r) for one in _reading_the_input(model))
    return Flops(
        forward=_trunk_forward(model, lora_r, rows, length) + _head(model, head_rows),
        backward=maps + 2.0 * attention + _head(model, head_rows),
        recompute=recompute,
    )


def _reading_the_input(model: ModelShape) -> tuple[LinearMap, ...]:
    return model.maps[:1] if model.fused_qkv else model.maps[:3]


def _trunk_forward(model: ModelShape, r: int, rows: int, length: int) -> float:
    tokens = rows * length
    return _frozen(model, tokens) + _adapter(model, tokens, r) + _attention(model, rows, length)


def _frozen(model: ModelShape, tokens: int) -> float:
    return 2.0 * tokens * model.layers * sum(one.used * one.inputs * one.outputs for one in model.maps)


def _adapter(model: ModelShape, tokens: int, r: int) -> float:
    adapted = sum(one.used * (one.inputs + one.outputs) for one in model.maps if one.adapted)
    return 2.0 * tokens * model.layers * r * adapted


def _attention(model: ModelShape, rows: int, length: int) -> float:
    return 4.0 * rows * length**2 * model.heads * model.head_width * model.layers


def _head(model: ModelShape, head_rows: float) -> float:
    return 2.0 * head_rows * model.width * model.vocabulary
