"""A GPU that isn't there: a torch device whose tensors are computed on the CPU, where what a GPU refuses is refused and
what costs time there is counted.

- An operation that mixes devices raises ``MixedDevices``, as CUDA would. CUDA allows a few: a number in a CPU tensor of
  no dimension among operands, and indices on the CPU.
- **Kernels**: operations that would launch one. Views, fresh memory and what only reads a shape launch none. Attention
  is one, as a fused kernel is.
- **Syncs**: where the host waits for the GPU: a value that is read, a copy between the two, and operations whose
  result's shape depends on values. Each names the line of ours that asked for it.

``is_cuda`` is false of these tensors, and their device's type is not "cuda": code must ask for what it needs. What
16-bit models do on CUDA alone, FlashAttention of sequences, they do within ``flash_attention()``.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rollout.models import layers
from tests.support.varlen import varlen_attn

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / name) + "/" for name in ("learner", "rollout", "rewards", "services"))
NAME = "pretended"
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
NOTHING_TO_LAUNCH = {
    aten.detach.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.lift_fresh.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.set_.source_Tensor,
}


class MixedDevices(RuntimeError):
    """An operation had operands on the CPU and on the pretended GPU."""


@dataclass
class Counts:
    kernels: int = 0
    by_kernel: Counter[str] = field(default_factory=Counter)
    syncs: list[str] = field(default_factory=list)
    """"operation at file:line" of each"""
    masked_attention: int = 0
    """attention with a mask, which the fastest kernels don't take"""

    def told(self) -> str:
        """The syncs, the most frequent first."""
        return "\n".join(f"{n} x {sync}" for sync, n in Counter(self.syncs).most_common())


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        return None


class PretendedTensor(torch.Tensor):
    """Is on the pretended GPU; ``inner`` has its values, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PretendedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretended({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_counting: list[Counts] = []


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Within, ``torch.device`` of the pretended GPU can be computed on."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Backend())
    with _Whole(), _Factories():
        yield torch.device(f"{NAME}:0")


@contextmanager
def flash_attention() -> Iterator[None]:
    """Within, 16-bit models attend to sequences by FlashAttention, as on CUDA: one kernel. So they do on the CPU, for
    comparison. Without it neither has that kernel."""
    with (
        mock.patch.object(layers, "has_varlen_flash", lambda device: True),
        mock.patch.object(varlen, "varlen_attn", _varlen_attention),
    ):
        yield


@contextmanager
def counted() -> Iterator[Counts]:
    """What is launched and waited for within."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


class _Factories(TorchDispatchMode):
    """Operations without a pretended operand, which may make or move one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Whole(TorchFunctionMode):
    """What torch would take apart, or refuse, for a device that it doesn't know: attention, which is one kernel forward
    and one backward, and values that come from lists or go into them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and isinstance(args[0], PretendedTensor):
            return _attention(*args, **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], PretendedTensor):
            return args[0].cpu().tolist()
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1])]
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            target = kwargs.pop("device")
            return func(*args, **kwargs).to(target)
        if func is torch.Tensor.new_tensor and isinstance(args[0], PretendedTensor):
            return args[0].inner.new_tensor(*args[1:], **kwargs).to(args[0].device)
        return func(*args, **kwargs)


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
    _one_device(F.scaled_dot_product_attention, [q, k, v, *([] if attn_mask is None else [attn_mask])])
    for counts in _counting:
        counts.masked_attention += attn_mask is not None
    mask = None if attn_mask is None else attn_mask.inner
    return _fused("attention", lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask, **options), q, k, v)


def _varlen_attention(q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, *longest: int, **options: Any) -> Any:
    if not isinstance(q, PretendedTensor):
        return varlen_attn(q, k, v, starts_q, starts_k, *longest, **options)
    _one_device(varlen.varlen_attn, [q, k, v, starts_q, starts_k])
    assert q.dtype in (torch.float16, torch.bfloat16), f"FlashAttention of {q.dtype}"
    lengths = (starts_q.inner, starts_k.inner, *longest)
    return _fused("varlen attention", lambda *qkv: varlen_attn(*qkv, *lengths, **options), q, k, v)


def _fused(name: str, compute: Callable[..., torch.Tensor], q: Any, k: Any, v: Any) -> torch.Tensor:
    return _FusedAttention.apply(q, k, v, name, compute)  # type: ignore[no-any-return, no-untyped-call]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, name: str, compute: Any) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.name, ctx.compute = name, compute
        return _launched(name, compute(q.inner, k.inner, v.inner))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        inner = [x.inner.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.compute(*inner)
        found = torch.autograd.grad(out, inner, slopes[0].inner)
        return *(_launched(f"{ctx.name} backward", slope) for slope in found), None, None


def _launched(name: str, inner: torch.Tensor) -> PretendedTensor:
    for counts in _counting:
        counts.kernels += 1
        counts.by_kernel[name] += 1
    return PretendedTensor(inner)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
        with _Factories():  # in inference mode operations come whole that are taken apart elsewhere
            return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    target = kwargs.get("device")
    arrives = target is not None and torch.device(target).type == NAME
    if not here and not arrives:
        return func(*args, **kwargs)
    if func not in COPIES:
        _one_device(func, tensors)
    _count(func, args, here, arrives, target)
    if arrives:
        kwargs = {**kwargs, "device": "cpu"}
    inner_args, inner_kwargs = tree_map_only(PretendedTensor, lambda tensor: tensor.inner, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:
        written = [
            given
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [kwargs[a.name] for a in func._schema.arguments if a.name in kwargs and a.kwarg_only and a.is_out]
        return written[0] if len(written) == 1 else tuple(written)
    if target is not None and not arrives:
        return found
    # Torch wants a view of a tensor from outside inference mode to be one as well.
    outside = func.is_view and not here[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not outside):
        return tree_map_only(torch.Tensor, PretendedTensor, found)


def _one_device(func: Any, tensors: list[torch.Tensor]) -> None:
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    if len(on_cpu) == len(tensors) or not any(tensor.dim() > 0 for tensor in on_cpu):
        return
    if func in INDEXED and isinstance(tensors[0], PretendedTensor):
        return
    devices = ", ".join(str(tensor.device) for tensor in tensors)
    raise MixedDevices(f"{func} mixes devices: {devices}, at {_line()}")


def _count(func: Any, args: Any, here: list[PretendedTensor], arrives: bool, target: Any) -> None:
    if not _counting:
        return
    waits = func in READS or func in SHAPED_BY_VALUES
    if func is aten._to_copy.default:
        waits = (not here) or (target is not None and not arrives)
    elif func is aten.copy_.default:
        waits = isinstance(args[0], PretendedTensor) != isinstance(args[1], PretendedTensor)
    elif func in INDEXED:
        # A bool index is turned into positions, whose number is read; one on the CPU is copied.
        indices = [index for index in args[1] if index is not None]
        waits = any(i.dtype in (torch.bool, torch.uint8) or not isinstance(i, PretendedTensor) for i in indices)
    launches = not (func.is_view or func in NOTHING_TO_LAUNCH or func in READS or (func in COPIES and waits))
    for counts in _counting:
        if waits:
            counts.syncs.append(f"{func} at {_line()}")
        if launches:
            counts.kernels += 1
            counts.by_kernel[str(func)] += 1


def _line() -> str:
    """The innermost line of ours that is running."""
    frames = itertools.takewhile(lambda f: f is not None, _outwards(sys._getframe(1)))
    for frame in frames:
        if frame.f_code.co_filename.startswith(OURS):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
    return "no line of ours"


def _outwards(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back
