"""What the trunks share: norm, rotary positions, and attention that sees neither pads nor another sequence's tokens.

An attention mask numbers the sequences of a row: 0 is a pad; tokens with the same positive number see each other and
nobody else. So 1 for a token and 0 for a pad means one sequence a row, and None means that nothing is padded or packed.

Shapes: B rows, L positions, H query heads, E head width, T tokens in all (pads left out), S sequences in all.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rollout.models.adapted import products

# (q [T, H, E], k, v, starts of q [S + 1], starts of k, longest q, longest k) -> [T, H, E]
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, the quotient in fp32 whatever the model's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        x_fp32 = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x_fp32.to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = products(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


def rotary_tables(
    length: int, head_width: int, theta: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/E), each [L, E], the frequencies written out twice (half, half).

    The frequencies are rounded as by the modelling code that the published weights were trained with: a reciprocal of
    a power. A negative power differs in the last bit, which position 60 makes an error of 1e-5 in a gradient. Angles
    are fp32; ``dtype`` is what the published code rounds the tables to (LLaDA: fp32; the Qwen-like: the model's own).
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle_LE = torch.cat([angle, angle], dim=-1)
    return angle_LE.cos().to(dtype), angle_LE.sin().to(dtype)


def rotate(x_BHLE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) by its position's angle, in the tables' dtype; returns x's dtype."""
    x = x_BHLE.to(cos_LE.dtype)
    first, second = x.chunk(2, dim=-1)
    return (x * cos_LE + torch.cat([-second, first], dim=-1) * sin_LE).to(x_BHLE.dtype)


@dataclass(frozen=True)
class Sequences:
    """The tokens of a batch without its pads, one sequence after the other."""

    order_T: Tensor
    """[T] int64, flat index ``b * L + l`` of each token."""
    starts: Tensor
    """[S + 1] int32, where in ``order_T`` each sequence starts, and T."""
    longest: int


# Who sees whom, as the attention kernel wants it: nothing to hide; SDPA's mask, bool, true where a key may be seen,
# [B, 1, 1, L] or [B, 1, L, L]; or the sequences for a kernel of variable lengths.
Visibility = None | Tensor | Sequences


def visibility(attention_mask: Tensor | None, dtype: torch.dtype) -> Visibility:
    """What ``attend`` needs of an attention mask [B, L]; computed once per forward.

    dtype: of the queries; FlashAttention, where it is installed, takes 16-bit CUDA tensors only.
    """
    if attention_mask is None:
        return None
    fits_kernel = attention_mask.is_cuda and dtype in (torch.float16, torch.bfloat16)
    # The kernel's backward adds up in no fixed order.
    if fits_kernel and not torch.are_deterministic_algorithms_enabled() and flash_kernel() is not None:
        return sequences(attention_mask)
    if attention_mask.dtype == torch.bool or int(attention_mask.max()) <= 1:
        # A row of nothing but pads sees itself: softmax over no key at all would be NaN, and a NaN row poisons the
        # gradient of the whole batch.
        real_BL = attention_mask.bool()
        real_BL = real_BL | ~real_BL.any(dim=-1, keepdim=True)
        return real_BL[:, None, None, :]
    return (attention_mask[:, :, None] == attention_mask[:, None, :])[:, None]  # pads see pads


def attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, seen: Visibility) -> Tensor:
    """Softmax attention without order, [B, L, H * E]. Keys and values may have fewer heads than queries. What comes out
    at pads is finite and means nothing."""
    if isinstance(seen, Sequences):
        kernel = flash_kernel()
        assert kernel is not None
        return attend_varlen(q_BHLE, k_BHLE, v_BHLE, seen, kernel)
    groups = q_BHLE.shape[1] // k_BHLE.shape[1]
    if groups > 1:
        # Repeating keys and values works with every attention kernel; the kernels' own GQA switch does not.
        k_BHLE = k_BHLE.repeat_interleave(groups, dim=1)
        v_BHLE = v_BHLE.repeat_interleave(groups, dim=1)
    out_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=seen)
    return out_BHLE.transpose(1, 2).flatten(2)


def attend_varlen(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, seen: Sequences, kernel: VarlenKernel) -> Tensor:
    """The same by a kernel that takes sequences laid end to end, and repeats keys and values itself; 0 at pads."""
    rows, heads, length, width = q_BHLE.shape
    q_THE, k_THE, v_THE = (
        x.transpose(1, 2).flatten(0, 1).index_select(0, seen.order_T) for x in (q_BHLE, k_BHLE, v_BHLE)
    )
    out_THE = kernel(q_THE, k_THE, v_THE, seen.starts, seen.starts, seen.longest, seen.longest)
    out = out_THE.new_zeros(rows * length, heads * width).index_copy(0, seen.order_T, out_THE.flatten(1))
    return out.view(rows, length, heads * width)


def sequences(attention_mask: Tensor) -> Sequences:
    """The sequences of an attention mask [B, L], which need not be contiguous, by row and then by number."""
    mask_BL = attention_mask.long()
    first_number_B = torch.arange(len(mask_BL), device=mask_BL.device) * (mask_BL.max() + 1)
    real_T = mask_BL.flatten().nonzero().squeeze(1)
    number_T, order_T = (mask_BL + first_number_B[:, None]).flatten()[real_T].sort(stable=True)
    _, length_S = number_T.unique_consecutive(return_counts=True)
    return Sequences(real_T[order_T], F.pad(length_S.cumsum(0), (1, 0)).int(), int(length_S.max()))


@functools.cache
def flash_kernel() -> VarlenKernel | None:
    """FlashAttention's kernel for variable lengths, or None when the package ``flash-attn`` is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func
