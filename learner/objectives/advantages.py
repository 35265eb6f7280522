"""Group advantages: how much better a completion did than the others of its prompt.

Shapes: G completions of a group, R reward components.
"""

import numpy as np

from rewards.errors import DataError


def group_advantages(rewards_GR: np.ndarray) -> np.ndarray:
    """Total reward minus the group's mean, which includes the completion itself; no division by a deviation.

    Source: AGRPO, arXiv 2510.04019. The self-inclusive mean scales the expected gradient by (G-1)/G and nothing else.

    Args:
        rewards_GR: [G, R] float, the reward components.

    Returns:
        [G] float64. Exactly 0 everywhere when all totals are equal: such a group carries no signal, and the rounding of
        its mean must not invent one.

    Raises:
        DataError: when a reward is not a finite number.
    """
    G, R = rewards_GR.shape
    if not np.isfinite(rewards_GR).all():
        row, part = np.argwhere(~np.isfinite(rewards_GR))[0]
        value = rewards_GR[row, part]
        raise DataError(f"reward component {part} of completion {row} is {value}; graders must return finite numbers")
    totals_G = np.zeros(G, dtype=np.float64)
    # Component by component, so that rows with the same rewards have the same total whatever the memory layout.
    for component in range(R):
        totals_G += rewards_GR[:, component].astype(np.float64)
    if (totals_G == totals_G[0]).all():
        return np.zeros(G, dtype=np.float64)
    return totals_G - totals_G.mean()
