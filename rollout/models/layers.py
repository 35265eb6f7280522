"""What the trunks share: norm, rotary positions, and attention that sees neither pads nor another sequence's tokens.

An attention mask numbers the sequences of a row: 0 is a pad; tokens with the same positive number see each other and
nobody else. So 1 for a token and 0 for a pad means one sequence a row, and None means that nothing is padded or packed.

A forward that is asked for logits of a few rows needs, of its last block, every position's key and value, and all else
at these rows alone (``through``).

Shapes: B rows, L positions, D model width, H query heads, E head width, T = B * L tokens in all, pads too, S sequences
in all, N asked rows.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rollout.models.adapted import products

# (q [T or N, H, E], k [T, H, E], v, starts of q [S + 1], starts of k, longest q, longest k) -> as q
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
    """The tokens of a batch, one sequence after the other; the pads of a row are one as well, which nobody reads."""

    order_T: Tensor
    """[T] int64, flat index ``b * L + l`` of each token."""
    starts: Tensor
    """[S + 1] int32, where in ``order_T`` each sequence starts, and T. One may be empty."""
    longest: int
    """none is longer"""


# Who sees whom, as the attention kernel wants it: nothing to hide; SDPA's mask, bool, true where a key may be seen,
# [B, 1, 1, L] or [B, 1, L, L]; or the sequences for a kernel of variable lengths.
Visibility = None | Tensor | Sequences


def visibility(attention_mask: Tensor | None, dtype: torch.dtype) -> Visibility:
    """What ``attend`` needs of an attention mask [B, L]; computed once per forward.

    dtype: of the queries; FlashAttention takes 16-bit CUDA tensors only.
    """
    if attention_mask is None:
        return None
    fits_kernel = dtype in (torch.float16, torch.bfloat16) and has_varlen_flash(attention_mask.device)
    # The kernel's backward adds up in no fixed order.
    if fits_kernel and not torch.are_deterministic_algorithms_enabled():
        return sequences(attention_mask)
    if attention_mask.dtype == torch.bool or int(attention_mask.max()) <= 1:
        # A row of nothing but pads sees itself: softmax over no key at all would be NaN, and a NaN row poisons the
        # gradient of the whole batch.
        real_BL = attention_mask.bool()
        real_BL = real_BL | ~real_BL.any(dim=-1, keepdim=True)
        return real_BL[:, None, None, :]
    return (attention_mask[:, :, None] == attention_mask[:, None, :])[:, None]  # pads see pads


def through(
    blocks: Iterable[nn.Module],
    x_BLD: Tensor,
    tables: tuple[Tensor, Tensor],
    seen: Visibility,
    logit_rows: Tensor | None,
) -> Tensor:
    """What the blocks make of the embeddings: [B, L, D], or [N, D] at the flat indices ``b * L + l`` that logits are
    wanted at, where the last block runs on these alone.

    It runs everywhere when no row is named: then its outputs themselves are read (``prompt_head.outputs_of``). Rows may
    repeat, and where they are as many as the positions nothing would be spared.
    """
    *earlier, last = blocks
    for block in earlier:
        x_BLD = block(x_BLD, *tables, seen)
    if logit_rows is None or 0 < len(logit_rows) < x_BLD.shape[:2].numel():
        x: Tensor = last(x_BLD, *tables, seen, logit_rows, last=True)
        return x
    return at_rows(last(x_BLD, *tables, seen, last=True), logit_rows)


def at_rows(x_BLD: Tensor, rows_N: Tensor | None) -> Tensor:
    """[N, D], of the flat indices ``b * L + l``; x itself for None."""
    return x_BLD if rows_N is None else x_BLD.flatten(0, 1).index_select(0, rows_N)


def attention(
    h_BLD: Tensor,
    maps: Sequence[nn.Module],
    cos_LE: Tensor,
    sin_LE: Tensor,
    seen: Visibility,
    asked_N: Tensor | None = None,
    *,
    apart: bool = False,
    norms: Sequence[nn.Module] = (),
) -> Tensor:
    """What heads make of their block's input, [B, L, H * E], or of all of it for the asked rows, [N, H * E].

    Args:
        maps: to queries, keys and values.
        asked_N: flat indices ``b * L + l``.
        apart: make queries by a product of their own, as in the last block whatever is asked of it: gradients then
            come in the same order on all ranks, by which ZeRO 2 adds them up.
        norms: of each head's query and key before they are turned; none of either without.
    """
    length, head_width = cos_LE.shape
    # Queries of the asked rows alone, where a row of the batch has a place for each. The kernel of variable lengths
    # needs none.
    fit = asked_N is not None and (isinstance(seen, Sequences) or len(asked_N) <= length)
    few_N = asked_N if fit else None
    if apart:
        made = [*products(at_rows(h_BLD, few_N), maps[0]), *products(h_BLD, *maps[1:])]
    else:
        assert few_N is None
        made = products(h_BLD, *maps)
    q, k_BLHE, v_BLHE = (y.unflatten(-1, (-1, head_width)) for y in made)
    if norms:
        q, k_BLHE = norms[0](q), norms[1](k_BLHE)
    del made, h_BLD  # nothing holds the block's input while keys are turned, nor these while queries are
    k_BHLE, v_BHLE = rotate(k_BLHE.transpose(1, 2), cos_LE, sin_LE), v_BLHE.transpose(1, 2)
    del k_BLHE
    if few_N is None:
        return at_rows(attend(rotate(q.transpose(1, 2), cos_LE, sin_LE), k_BHLE, v_BHLE, seen), asked_N)
    at_N = few_N % length
    q_NHE = rotate(q, cos_LE[at_N].unsqueeze(1), sin_LE[at_N].unsqueeze(1))
    return attend_few(q_NHE, k_BHLE, v_BHLE, seen, few_N)


def attend_few(q_NHE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, seen: Visibility, rows_N: Tensor) -> Tensor:
    """``attend`` for the queries at these flat indices ``b * L + l`` alone, [N, H * E]."""
    if isinstance(seen, Sequences):
        return attend_few_varlen(q_NHE, k_BHLE, v_BHLE, seen, rows_N, varlen_flash)
    rows, _, length, _ = k_BHLE.shape
    queries = len(rows_N)
    # How many of them a row has isn't known without waiting for a GPU. So each has a place of its own in every row.
    place_N = rows_N // length * queries + torch.arange(queries, device=rows_N.device)
    q_BNHE = q_NHE.new_zeros(rows * queries, *q_NHE.shape[1:]).index_copy(0, place_N, q_NHE).unflatten(0, (rows, -1))
    if seen is not None and seen.shape[2] > 1:
        seen = seen.index_select(2, rows_N % length)
    return at_rows(attend(q_BNHE.transpose(1, 2), k_BHLE, v_BHLE, seen), place_N)


def attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, seen: Visibility) -> Tensor:
    """Softmax attention without order, [B, L, H * E], L being the queries'. Keys and values may have fewer heads than
    queries. What comes out at pads is finite and means nothing."""
    if isinstance(seen, Sequences):
        return attend_varlen(q_BHLE, k_BHLE, v_BHLE, seen, varlen_flash)
    groups = q_BHLE.shape[1] // k_BHLE.shape[1]
    if groups > 1:
        # Repeating keys and values works with every attention kernel; the kernels' own GQA switch does not.
        k_BHLE = k_BHLE.repeat_interleave(groups, dim=1)
        v_BHLE = v_BHLE.repeat_interleave(groups, dim=1)
    out_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=seen)
    return out_BHLE.transpose(1, 2).flatten(2)


def attend_varlen(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, seen: Sequences, kernel: VarlenKernel) -> Tensor:
    """The same by a kernel that takes sequences laid end to end, and repeats keys and values itself."""
    rows, _, length, _ = q_BHLE.shape
    q_THE, k_THE, v_THE = (_end_to_end(x, seen) for x in (q_BHLE, k_BHLE, v_BHLE))
    out_THE = kernel(q_THE, k_THE, v_THE, seen.starts, seen.starts, seen.longest, seen.longest)
    return torch.empty_like(out_THE).index_copy_(0, seen.order_T, out_THE).view(rows, length, -1)


def attend_few_varlen(
    q_NHE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, seen: Sequences, rows_N: Tensor, kernel: VarlenKernel
) -> Tensor:
    """``attend_few`` by such a kernel, which gets the queries sorted by sequence."""
    place_N, order_N = seen.order_T.argsort().index_select(0, rows_N).sort()
    starts = torch.searchsorted(place_N, seen.starts.long(), out_int32=True)
    k_THE, v_THE = _end_to_end(k_BHLE, seen), _end_to_end(v_BHLE, seen)
    # Rows may repeat, so one sequence may have all queries: how many isn't known without waiting for a GPU.
    out_NHE = kernel(q_NHE.index_select(0, order_N), k_THE, v_THE, starts, seen.starts, len(rows_N), seen.longest)
    return torch.empty_like(out_NHE).index_copy_(0, order_N, out_NHE).flatten(1)


def _end_to_end(x_BHLE: Tensor, seen: Sequences) -> Tensor:
    return x_BHLE.transpose(1, 2).flatten(0, 1).index_select(0, seen.order_T)


def sequences(attention_mask: Tensor) -> Sequences:
    """The sequences of an attention mask [B, L], which need not be contiguous, by row and then by number; a row's pads
    come first.

    Nobody waits for a GPU where the mask is bool, 2 sequences a row; where it has numbers, once, for how many there
    are.
    """
    rows, length = attention_mask.shape
    number_BL, order_BL = attention_mask.long().sort(dim=1, stable=True)
    first_B = torch.arange(0, rows * length, length, device=order_BL.device)
    if attention_mask.dtype == torch.bool:
        pads_B = length - number_BL.sum(1)
        starts = torch.stack([first_B, first_B + pads_B], dim=1).flatten()
    else:
        begins_BL = F.pad(number_BL.diff(dim=1) > 0, (1, 0), value=True)
        starts = begins_BL.flatten().nonzero().squeeze(1)
    order_T = (order_BL + first_B.unsqueeze(1)).flatten()
    return Sequences(order_T, F.pad(starts, (0, 1), value=rows * length).int(), length)


@functools.cache
def has_varlen_flash(device: torch.device) -> bool:
    """Whether this torch has FlashAttention for variable lengths on this device."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_flash(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """FlashAttention of sequences laid end to end, 16-bit CUDA tensors; fewer heads of keys and values are repeated."""
    from torch.nn.attention.varlen import varlen_attn  # late: on a CPU nobody wants it

    width = q_THE.shape[-1]
    if width % 8:  # the kernel takes widths that 8 divides; what is added is 0, in keys, values and what comes out
        q_THE, k_THE, v_THE = (F.pad(x, (0, -width % 8)) for x in (q_THE, k_THE, v_THE))
    # Told that no sequence has more than one query, it takes it that each has one.
    lengths = (starts_q, starts_k, max(longest_q, 2), longest_k)
    out = varlen_attn(q_THE, k_THE, v_THE, *lengths, scale=width**-0.5, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out[..., :width]
