"""Attention of variable lengths as torch documents it, for where its kernel isn't: it has one for CUDA alone.

Shapes: T queries, U keys, H heads, E head width.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

SIGNATURE = inspect.signature(varlen.varlen_attn)


def varlen_loop(
    q_THE: Tensor, k_UHE: Tensor, v_UHE: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """[T, H, E], one sequence after the other, of which some may be empty; arguments as the kernel's."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and starts_q[0] == starts_k[0] == 0
    assert starts_q[-1] == len(q_THE) and starts_k[-1] == len(k_UHE), "what is in no sequence is never written"
    lengths_q, lengths_k = starts_q.diff().tolist(), starts_k.diff().tolist()
    assert max(lengths_q) <= longest_q and max(lengths_k) <= longest_k, "what is further out is left out"
    groups = q_THE.shape[1] // k_UHE.shape[1]
    k_UHE, v_UHE = (x.repeat_interleave(groups, dim=1) for x in (k_UHE, v_UHE))
    of_each = zip(q_THE.split(lengths_q), k_UHE.split(lengths_k), v_UHE.split(lengths_k), strict=True)
    return torch.cat([_attend(*(x.transpose(0, 1) for x in one)).transpose(0, 1) for one in of_each])


def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
    """What torch's function of this name gives, by its signature; asked for what its kernel takes, else it raises."""
    asked = SIGNATURE.bind(*args, **kwargs)
    asked.apply_defaults()
    q_THE, k_UHE, v_UHE, *lengths = asked.args
    width = q_THE.shape[-1]
    assert width == k_UHE.shape[-1] == v_UHE.shape[-1] and width % 8 == 0
    assert asked.kwargs["enable_gqa"] and asked.kwargs["window_size"] == (-1, -1)
    assert lengths[2] > 1, "of 1 the kernel makes that each sequence has one query"
    return varlen_loop(q_THE * (asked.kwargs["scale"] * width**0.5), k_UHE, v_UHE, *lengths)


def _attend(q_HTE: Tensor, k_HUE: Tensor, v_HUE: Tensor) -> Tensor:
    return (q_HTE @ k_HUE.transpose(1, 2) / q_HTE.shape[-1] ** 0.5).softmax(-1) @ v_HUE
