"""Objectives: one file per method, each a pure function of scores, weights and credit. No Ray, DeepSpeed or I/O.

To add one: a config variant in ``learner.settings.objectives``, a class with the members of ``base.Objective`` in a
file of its own, and its line in ``OBJECTIVES``.
"""

from learner.objectives.agrpo import Agrpo
from learner.objectives.base import Objective
from learner.settings.objectives import ObjectiveConfig

OBJECTIVES = {"agrpo": Agrpo}


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config variant names."""
    return OBJECTIVES[config.type](config)
