"""Arrays that travel in one copy arrive as they were."""

import numpy as np
import torch

from rollout.copies import in_one_copy, indices_and_values

CPU = torch.device("cpu")


def test_indices_and_values_arrive_in_one_copy_as_they_would_alone():
    index, counts = np.array([[0, 2**24 + 1], [2**53 - 1, 7]]), np.array([3, 1])
    value = np.array([0.1, -np.inf, 1e-300])
    found, sizes, rounded = indices_and_values(CPU, [index], [counts, value], dtype=torch.float32)
    assert found.dtype == torch.int64 and found.tolist() == index.tolist()
    assert torch.equal(sizes, torch.tensor([3.0, 1.0]))
    assert torch.equal(rounded, torch.as_tensor(value, dtype=torch.float32))
    as_values, _ = in_one_copy(CPU, index, value, dtype=torch.float32)
    assert as_values.long().tolist() != index.tolist(), "control: float32 would lose indices"
