"""What random masks are drawn from: lengths of texts, subsets of positions.

Shapes: G completions of a group, C completion positions.
"""

import numpy as np

from rollout.trajectory import TrajectoryGroup


def text_lengths(group: TrajectoryGroup, eos_ids: tuple[int, ...]) -> np.ndarray:
    """[G] int64, tokens up to and including the first EOS; C where there is none, and where gaps are filled, whose
    texts don't end."""
    if group.places is not None:
        return np.full(group.size, group.completion_ids.shape[1], np.int64)
    is_eos_GC = np.isin(group.completion_ids, eos_ids)
    C = is_eos_GC.shape[1]
    return np.where(is_eos_GC.any(axis=1), is_eos_GC.argmax(axis=1) + 1, C).astype(np.int64)


def random_subset(stream: np.random.Generator, size: int, count: int) -> np.ndarray:
    """[size] bool, ``count`` of them set, every such set equally likely."""
    chosen = np.zeros(size, dtype=bool)
    chosen[stream.permutation(size)[:count]] = True
    return chosen
