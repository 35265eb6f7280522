"""Arrays on their way to the device that computes with them.

A copy from ordinary memory makes the host wait for a GPU, which then has nothing queued: several arrays go in one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def in_one_copy(device: torch.device, *arrays: np.ndarray | None, dtype: torch.dtype = torch.int64) -> tuple[Any, ...]:
    """The arrays on the device, each in its shape, rounded to ``dtype`` before they are sent; None for None."""
    given = [array for array in arrays if array is not None]
    sent = torch.from_numpy(np.concatenate([array.ravel() for array in given])).to(dtype).to(device)
    parts = iter(sent.split([array.size for array in given]))
    return tuple(None if array is None else next(parts).view(array.shape) for array in arrays)


def indices_and_values(
    device: torch.device, indices: Sequence[np.ndarray], values: Sequence[np.ndarray], *, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Integer arrays as int64, then the others as ``dtype``, all in one copy, which is of float64: integers below 2**53
    stay what they are."""
    sent = in_one_copy(device, *indices, *values, dtype=torch.float64)
    return *(index.long() for index in sent[: len(indices)]), *(value.to(dtype) for value in sent[len(indices) :])
