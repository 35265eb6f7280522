"""Linear maps with LoRA, several of one input at a time.

y = x W^T + b + scale (x A^T) B^T. The low-rank part is added up inside the product with B, so it costs no pass of its
own over y; a scale of 1 costs nothing; the A's of maps that read the same input are one product; and the backward adds
up the input's gradient inside its products too. The frozen weights stay a product for each map: on a CPU they lie in
the checkpoint's file, mapped once for all processes of a node, and end to end they would be a copy in each; quantized
ones are stored map by map; and the last block asks for its queries at fewer rows. Actor and learner both compute by
this, so they round alike; but for weights that ZeRO-3 cuts up and gathers in the forward of the module that owns them
alone: those are computed by PEFT.

Shapes: T tokens, I inputs, O outputs of a map, R ranks of all maps together.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rollout.adapters import ADAPTER_NAME


class _LowRank(NamedTuple):
    down_RI: Tensor
    """A"""
    up_OR: Tensor
    """B"""
    scale: float


def products(x: Tensor, *maps: nn.Module) -> list[Tensor]:
    """What each of these linear maps, with its adapter if it has an active one, makes of x [..., I]: [..., O] each."""
    bases = [one.get_base_layer() if isinstance(one, LoraLayer) else one for one in maps]
    adapters = [_adapter(one) for one in maps]
    if any(adapter is not None and hasattr(adapter.down_RI, "ds_id") for adapter in adapters):
        return [one(x) for one in maps]
    if not any(adapters):
        return [base(x) for base in bases]
    x_TI = x.flatten(0, -2)
    if all(type(base) is nn.Linear and not base.weight.requires_grad for base in bases):
        scales = [adapter.scale if adapter else 0.0 for adapter in adapters]
        low_rank = [tensor for adapter in adapters for tensor in (adapter[:2] if adapter else (None, None))]
        found = _Products.apply(x_TI, bases, scales, *low_rank)
    else:
        found = _by_the_maps_themselves(x_TI, bases, adapters)
    return [y_TO.unflatten(0, x.shape[:-1]) for y_TO in found]


def with_adapter_added_up(model: nn.Module) -> nn.Module:
    """Have the adapted maps of a model that PEFT wrapped compute by ``products``."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__class__ = _adapted(type(module))
    return model


class _Adapted:
    """Mixed in before PEFT's class of an adapted map."""

    def forward(self, x: Tensor) -> Tensor:
        adapter = _adapter(self)  # type: ignore[arg-type]
        if adapter is not None and hasattr(adapter.down_RI, "ds_id"):
            y: Tensor = super().forward(x)  # type: ignore[misc]
        else:
            (y,) = products(x, self)  # type: ignore[arg-type]
        return y


@functools.cache
def _adapted(kind: type) -> type:
    return type(kind.__name__, (_Adapted, kind), {})


def _adapter(one: nn.Module) -> _LowRank | None:
    if not isinstance(one, LoraLayer) or one.disable_adapters or one.merged:
        return None
    down: Any = one.lora_A[ADAPTER_NAME]
    up: Any = one.lora_B[ADAPTER_NAME]
    return _LowRank(down.weight, up.weight, one.scaling[ADAPTER_NAME])


def _by_the_maps_themselves(
    x_TI: Tensor, bases: Sequence[nn.Module], adapters: Sequence[_LowRank | None]
) -> Iterator[Tensor]:
    """Of bases that compute otherwise than by one product, or that are trained."""
    downs = [adapter.down_RI for adapter in adapters if adapter]
    lows = iter((x_TI @ _stacked(downs).T).split([len(down) for down in downs], dim=1))
    for base, adapter in zip(bases, adapters, strict=True):
        y_TO = base(x_TI)
        if adapter:
            low_TR, up_RO = next(lows).to(y_TO.dtype), adapter.up_OR.T.to(y_TO.dtype)  # the head's logits are fp32
            y_TO = torch.addmm(y_TO, low_TR, up_RO, alpha=adapter.scale)
        yield y_TO


class _Products(torch.autograd.Function):
    """Of frozen bases. After the scales come A and B of each map; None for those without."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, bases: Sequence[nn.Linear], scales: Sequence[float], *low_rank: Tensor | None
    ) -> tuple[Tensor, ...]:
        downs = [down for down in low_rank[::2] if down is not None]
        low_TR = x_TI @ _stacked(downs).T
        found, lows = [], iter(low_TR.split([len(down) for down in downs], dim=1))
        for base, up_OR, scale in zip(bases, low_rank[1::2], scales, strict=True):
            y_TO = F.linear(x_TI, base.weight, base.bias)
            if up_OR is not None:
                torch.addmm(y_TO, next(lows), up_OR.T, alpha=scale, out=y_TO)
            found.append(y_TO)
        ctx.save_for_backward(x_TI, low_TR, *low_rank)
        ctx.bases, ctx.scales = bases, scales
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        x_TI, low_TR, *low_rank = ctx.saved_tensors
        downs = [down for down in low_rank[::2] if down is not None]
        sizes = [len(down) for down in downs]
        slope_TR = torch.empty_like(low_TR)
        lows, slopes_of_lows = iter(low_TR.split(sizes, dim=1)), iter(slope_TR.split(sizes, dim=1))
        of_x: Tensor | None = None
        of_ups: list[Tensor | None] = []
        for base, up_OR, scale, slope_TO in zip(ctx.bases, low_rank[1::2], ctx.scales, slopes, strict=True):
            if ctx.needs_input_grad[0]:
                of_x = slope_TO @ base.weight if of_x is None else torch.addmm(of_x, slope_TO, base.weight, out=of_x)
            if up_OR is None:
                of_ups.append(None)
                continue
            both = torch.mm(slope_TO, up_OR, out=next(slopes_of_lows)), slope_TO.T @ next(lows)
            if scale != 1:
                both = both[0].mul_(scale), both[1].mul_(scale)
            of_ups.append(both[1])
        of_downs = iter((slope_TR.T @ x_TI).split(sizes))
        if of_x is not None:
            of_x = torch.addmm(of_x, slope_TR, _stacked(downs), out=of_x)
        pairs = ((None if up is None else next(of_downs), up) for up in of_ups)
        return of_x, None, None, *(slope for pair in pairs for slope in pair)


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))
