"""Which rewards a method sees: as they were given, or with each part as a z-score of its own.

LightningRL (arXiv 2603.13319) rewards right answers and tokens per forward, and normalises each over the group before
the two are added: a part with a larger spread would drown the other otherwise. Its deviations are those of the group
itself (over G), and a part that is the same for all counts 0.

Shapes: G completions of a group, R reward components.
"""

import dataclasses

import numpy as np

from learner.settings.sections import RewardSection
from rollout.trajectory import DIVERSITY, SPEED, TrajectoryGroup


def seen_rewards(group: TrajectoryGroup, reward: RewardSection) -> TrajectoryGroup:
    """The group with the rewards that a method turns into credit; the group itself where they are as given."""
    if reward.normalise == "total":
        return group
    weights = {SPEED: reward.speed_weight, DIVERSITY: reward.diversity_weight}
    weight_R = [weights.get(name, 1.0) for name in group.reward_names]
    parts = [weight * _normalised(value_G) for weight, value_G in zip(weight_R, group.rewards.T, strict=True)]
    return dataclasses.replace(group, rewards=np.stack(parts, axis=1).astype(np.float32))


def _normalised(value_G: np.ndarray) -> np.ndarray:
    value_G = value_G.astype(np.float64)
    if (value_G == value_G[0]).all():
        return np.zeros_like(value_G)
    return (value_G - value_G.mean()) / value_G.std()
