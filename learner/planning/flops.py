"""Floating-point operations of the policy's matrix products, counted from the shapes (a multiply-add is two).

Left out: norms, rotary embedding, activations, softmax, routing and sampling, whose operations are few and whose time
is memory traffic. Checked against ``torch.utils.flop_counter`` in tests/whole/test_bench.py.

With LoRA only the adapter is trained, so a frozen map's backward is its input's gradient alone (as much as its
forward), an adapter's backward is both (twice its forward), and the first block's q, k and v maps pass none on: no
parameter lies below them (with checkpointed activations they do, for peft then asks for the embeddings' gradient).
The last block's keys and values are of all tokens, all else of the positions that the head runs at, but for a masked
LM's, whose blocks are transformers' own. The queries that attention computes there for nothing (``attention`` of
``rollout.models.layers``) aren't counted.
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
    asked = _asked(model, rows * length, head_rows)
    return Flops(_trunk_forward(model, lora_r, rows, length, asked) + _head(model, head_rows))


def training_flops(
    model: ModelShape, *, lora_r: int, rows: int, length: int, head_rows: float, checkpointing: bool = False
) -> Flops:
    """Forward and backward of ``rows`` sequences with a trained LoRA adapter on the blocks' maps."""
    tokens, asked = rows * length, _asked(model, rows * length, head_rows)
    forward, attention = _trunk_forward(model, lora_r, rows, length, asked), _attention(model, tokens, length, asked)
    # An adapter y = B A x has four backward products: both factors', A x's and x's.
    maps = _frozen(model, tokens, asked) + 2.0 * _adapter(model, tokens, asked, lora_r)
    recompute = 0.5 * attention
    if checkpointing:
        recompute += forward  # peft then asks for the embeddings' gradient
    else:
        maps -= 2.0 * sum(
            one.inputs * (one.outputs + lora_r) * (tokens if model.layers > 1 else _in_last(model, one, tokens, asked))
            for one in _reading_the_input(model)
        )
    return Flops(
        forward=forward + _head(model, head_rows),
        backward=maps + 2.0 * attention + _head(model, head_rows),
        recompute=recompute,
    )


def _reading_the_input(model: ModelShape) -> tuple[LinearMap, ...]:
    return model.maps[:1] if model.fused_qkv else model.maps[:3]


def _asked(model: ModelShape, tokens: float, head_rows: float) -> float:
    """Positions that the last block's outputs are wanted at."""
    return tokens if model.kind == "encoder" else min(head_rows, tokens)


def _in_last(model: ModelShape, one: LinearMap, tokens: float, asked: float) -> float:
    """Tokens that pass this map of the last block; the second and third make keys and values."""
    return tokens if one in model.maps[1:3] else asked


def _in_all(model: ModelShape, one: LinearMap, tokens: float, asked: float) -> float:
    """The same of all blocks."""
    return tokens * (model.layers - 1) + _in_last(model, one, tokens, asked)


def _trunk_forward(model: ModelShape, r: int, rows: int, length: int, asked: float) -> float:
    tokens = rows * length
    products = _frozen(model, tokens, asked) + _adapter(model, tokens, asked, r)
    return products + _attention(model, tokens, length, asked)


def _frozen(model: ModelShape, tokens: int, asked: float) -> float:
    return 2.0 * sum(one.used * one.inputs * one.outputs * _in_all(model, one, tokens, asked) for one in model.maps)


def _adapter(model: ModelShape, tokens: int, asked: float, r: int) -> float:
    adapted = (one for one in model.maps if one.adapted)
    return 2.0 * r * sum(one.used * (one.inputs + one.outputs) * _in_all(model, one, tokens, asked) for one in adapted)


def _attention(model: ModelShape, tokens: int, length: int, asked: float) -> float:
    return 4.0 * (tokens * (model.layers - 1) + asked) * length * model.heads * model.head_width


def _head(model: ModelShape, head_rows: float) -> float:
    return 2.0 * head_rows * model.width * model.vocabulary
