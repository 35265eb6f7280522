"""Arrays on their way to the device that computes with them.

A copy from ordinary memory makes the host wait for a GPU, which then has nothing queued: several arrays go in one.
"""

import numpy as np
import torch


def in_one_copy(
    device: torch.device, *arrays: np.ndarray, dtype: torch.dtype = torch.int64
) -> tuple[torch.Tensor, ...]:
    """The arrays on the device, each in its shape, rounded to ``dtype`` before they are sent."""
    sent = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(dtype).to(device)
    parts = sent.split([array.size for array in arrays])
    return tuple(part.view(array.shape) for part, array in zip(parts, arrays, strict=True))
