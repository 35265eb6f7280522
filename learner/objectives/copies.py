"""Masked copies of a completion, whose scores are means over their masked positions.

A copy masks n of a completion's C positions and is scored on them. With n uniform on 1..C and a random set of that many
positions, the mean log-prob of a masked token is, on average over copies, the evidence lower bound divided by C (LLaDA,
arXiv 2502.09992, eq. 6), whatever the length. What follows the first EOS counts as any other token.

Shapes: G completions of a group, C completion positions, R copies of a completion.
"""

import numpy as np

from learner.likelihood.masks import random_subset
from learner.likelihood.views import Unit, View


def copies(index: int, row: int, mask_RC: np.ndarray, credit: float, weight: float) -> Unit:
    """The masked copies of a completion, each with ``weight`` over its number of masked positions; one that masks
    nothing scores nothing."""
    return tuple(
        View(index, row, mask_C, np.flatnonzero(mask_C), credit, weight / float(mask_C.sum()))
        for mask_C in mask_RC
        if mask_C.any()
    )


def independent_masks(stream: np.random.Generator, completions: int, copies: int, length: int) -> np.ndarray:
    """[G, R, C] bool: each masks n positions with n uniform on 1..C. That is the law of masking each position with a
    probability that is uniform on [0, 1], drawn again where nothing is masked."""
    counts_GR = stream.integers(1, length + 1, size=(completions, copies))
    return np.array([[random_subset(stream, length, int(n)) for n in counts_R] for counts_R in counts_GR])


def paired_masks(stream: np.random.Generator, completions: int, copies: int, length: int) -> np.ndarray:
    """[G, R, C] bool: R / 2 masks of n positions, n uniform on 1..C-1, then their complements, so that each pair masks
    each position once. The copy that masks everything is never among them."""
    counts_GR = stream.integers(1, length, size=(completions, copies // 2))
    mask_GRC = np.array([[random_subset(stream, length, int(n)) for n in counts_R] for counts_R in counts_GR])
    return np.concatenate([mask_GRC, ~mask_GRC], axis=1)
