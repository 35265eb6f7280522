"""Objectives: one file per method, each a pure function of scores, weights and credit. No Ray, DeepSpeed or I/O.

To add one: a config variant in ``learner.settings.methods``, which names the class, and the class, with the members
of ``base.Objective``, in a file of its own.
"""

import importlib

from learner.objectives.base import Objective
from learner.settings.objective import ObjectiveSection


def make_objective(config: ObjectiveSection) -> Objective:
    """The objective that a config variant names."""
    module, _, name = config.method.partition(":")
    objective: Objective = getattr(importlib.import_module(module), name)(config)
    return objective
