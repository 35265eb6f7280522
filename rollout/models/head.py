"""The map from hidden states to logits, in fp32 whatever the model's dtype.

Logits of 16 to 32 lie 0.125 apart in bfloat16. Two processes that compute the same row in batches of different shapes
round some of them to different neighbours, and at a temperature of 0.6 one step is 0.21 nats: more than log(1.2), so
that a ratio of policies which are the same would be clipped.

Shapes: N rows, D model width, V vocabulary, W words of a slice of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ELEMENTS_AT_ONCE = 1 << 25
"""Weights that are held in fp32 at a time, 128 MiB."""


class Head(nn.Linear):
    """Logits [..., V] float32 of hidden states [..., D] in the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return exact_logits(x, self.weight, self.bias)


def exact_logits(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Of hidden states [..., D], [..., V] float32: the values in their dtype, the products and sums in fp32."""
    if x.dtype == torch.float32:
        return F.linear(x, weight_VD, bias_V)
    logits: Tensor = _InSlices.apply(x, weight_VD, bias_V)
    return logits


class _InSlices(torch.autograd.Function):
    """Slices of the vocabulary one after the other, backward too: the whole map in fp32 would be twice the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        of_weights = ctx.needs_input_grad[1]  # of a head that is trained itself
        ctx.save_for_backward(weight_VD, x if of_weights else None)
        ctx.dtype = x.dtype
        parts = [F.linear(x.float(), weight_WD.float()) for weight_WD in _slices(weight_VD)]
        return torch.cat(parts, dim=-1) if bias_V is None else torch.cat(parts, dim=-1) + bias_V.float()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight_VD, x = ctx.saved_tensors
        weights = _slices(weight_VD)
        parts = slopes[0].split([len(weight_WD) for weight_WD in weights], dim=-1)
        slope = parts[0] @ weights[0].float()
        for part, weight_WD in zip(parts[1:], weights[1:], strict=True):
            slope += part @ weight_WD.float()
        flat_NV, of_weights = slopes[0].flatten(0, -2), None
        if x is not None:
            of_weights = (flat_NV.T @ x.float().flatten(0, -2)).to(weight_VD.dtype)
        of_bias = flat_NV.sum(0).to(weight_VD.dtype) if ctx.needs_input_grad[2] else None
        return slope.to(ctx.dtype), of_weights, of_bias


def _slices(weight_VD: Tensor) -> tuple[Tensor, ...]:
    return weight_VD.split(max(1, _ELEMENTS_AT_ONCE // weight_VD.shape[1]))
