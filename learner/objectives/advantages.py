"""Group advantages: how much better a completion did than the others of its prompt; and what weights are made of.

Shapes: G completions of a group, R reward components, S steps of a completion.
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
    totals_G = total_rewards(rewards_GR)
    if (totals_G == totals_G[0]).all():
        return np.zeros(totals_G.size, dtype=np.float64)
    return totals_G - totals_G.mean()


def leave_one_out_advantages(rewards_GR: np.ndarray, *, scale: bool = False) -> np.ndarray:
    """Total reward minus the mean of the others' of the group, G/(G-1) times ``group_advantages``: [G] float64.

    Args:
        rewards_GR: [G, R] float, the reward components; G at least 2.
        scale: divide by the deviation of the group's rewards (of a sample, G-1) plus 1e-4, as TRL does.

    Raises:
        DataError: when a reward is not a finite number.
    """
    advantages_G = group_advantages(rewards_GR)
    G = advantages_G.size
    assert G > 1, "nothing is left when one is left out"
    advantages_G = advantages_G * (G / (G - 1))
    return advantages_G / (total_rewards(rewards_GR).std(ddof=1) + 1e-4) if scale else advantages_G


def fill_rewards(branch_rewards_GSR: np.ndarray) -> np.ndarray:
    """[G, S] float64, the total reward of one fill of each branched state, from its components, [G, S, R] float. Raises
    DataError when one isn't a finite number."""
    G, S, R = branch_rewards_GSR.shape
    return total_rewards(branch_rewards_GSR.reshape(G * S, R)).reshape(G, S)


def z_scores(values_G: np.ndarray) -> np.ndarray:
    """Values minus their mean, over their deviation (of a sample, G-1) plus 1e-4, as TRL does: [G] float64, exactly 0
    everywhere when all are equal."""
    values_G = values_G.astype(np.float64)
    if (values_G == values_G[0]).all():
        return np.zeros(values_G.size, dtype=np.float64)
    return (values_G - values_G.mean()) / (values_G.std(ddof=1) + 1e-4)


def backed_up(reward: float, values_S: np.ndarray, *, discount: float, lam: float) -> np.ndarray:
    """Generalised advantage estimates (arXiv 1506.02438, eq. 16) before the step's own value is taken off them: with V
    the values and r_s the reward, which is at the last step alone,

        B_s = r_s + discount V_(s+1) + discount lam (B_(s+1) - V_(s+1))

    [S] float64; the advantage is B - V. With ``lam`` 1 the values drop out of B, which is the discounted reward.
    """
    backed_S = np.zeros(values_S.size)
    for step in reversed(range(values_S.size)):
        if step == values_S.size - 1:
            backed_S[step] = reward
        else:
            ahead = values_S[step + 1]
            backed_S[step] = discount * (ahead + lam * (backed_S[step + 1] - ahead))
    return backed_S


def total_rewards(rewards_GR: np.ndarray) -> np.ndarray:
    """[G] float64, the sum of each completion's reward components. Raises DataError when one isn't a finite number."""
    G, R = rewards_GR.shape
    if not np.isfinite(rewards_GR).all():
        row, part = np.argwhere(~np.isfinite(rewards_GR))[0]
        value = rewards_GR[row, part]
        raise DataError(f"reward component {part} of completion {row} is {value}; graders must return finite numbers")
    totals_G = np.zeros(G, dtype=np.float64)
    # Component by component, so that rows with the same rewards have the same total whatever the memory layout.
    for component in range(R):
        totals_G += rewards_GR[:, component].astype(np.float64)
    return totals_G


def softmax(values_G: np.ndarray) -> np.ndarray:
    """[G] float64; the largest value never overflows."""
    powers_G = np.exp(values_G - values_G.max())
    return powers_G / powers_G.sum()
