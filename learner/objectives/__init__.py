"""Objectives: one file per method, each a pure function of scores, weights and advantages. No Ray, DeepSpeed or I/O.

To add one: a config variant in ``learner.settings.sections``, a class with the methods of ``Objective`` in a file of
its own, and a line in ``make_objective``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from learner.likelihood.views import View, ViewBatch
from rollout.trajectory import TrajectoryGroup

if TYPE_CHECKING:
    import torch

    from learner.settings.sections import ObjectiveConfig


@dataclass(frozen=True)
class Statistics:
    """Named figures that add up over micro-batches and ranks, whatever the order."""

    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum, count)"""
    rms: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum of squares, count)"""
    maxima: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def merged(parts: Iterable["Statistics"]) -> "Statistics":
        """All parts taken together."""
        whole = Statistics()
        for part in parts:
            for ours, theirs in ((whole.means, part.means), (whole.rms, part.rms)):
                for name, (total, count) in theirs.items():
                    before = ours.get(name, (0.0, 0.0))
                    ours[name] = (before[0] + total, before[1] + count)
            for name, value in part.maxima.items():
                whole.maxima[name] = max(whole.maxima.get(name, value), value)
            for name, value in part.totals.items():
                whole.totals[name] = whole.totals.get(name, 0.0) + value
        return whole

    def values(self) -> dict[str, float]:
        """name -> figure; an average over nothing is left out."""
        averages = {name: total / count for name, (total, count) in self.means.items() if count}
        roots = {name: (squares / count) ** 0.5 for name, (squares, count) in self.rms.items() if count}
        return {**averages, **roots, **self.maxima, **self.totals}


class Objective(Protocol):
    """A method: which views it wants of a group, and the loss of their scores."""

    @property
    def needs_reference(self) -> bool:
        """Whether ``loss`` wants the log-probs of the policy without adapter."""

    @property
    def draws_per_completion(self) -> int:
        """What the loss is divided by, besides the completions of the iteration."""

    def views(
        self,
        index: int,
        group: TrajectoryGroup,
        advantages_G: np.ndarray,
        *,
        run_seed: int,
        update_index: int,
        eos_ids: tuple[int, ...],
    ) -> tuple[list[View], Statistics]:
        """The views of the group at ``index`` of the update, in row order; a function of its arguments alone."""

    def loss(
        self,
        logp_N: "torch.Tensor",
        ref_logp_N: "torch.Tensor | None",
        batch: ViewBatch,
        *,
        position_logp_Z: "torch.Tensor | None" = None,
        ref_position_logp_Z: "torch.Tensor | None" = None,
    ) -> tuple["torch.Tensor", Statistics]:
        """Loss summed over the batch's scores, not yet divided by the update's normaliser, and its figures.

        The log-probs of tokens, and of the choices of positions where ``batch.positions`` has them.
        """


def make_objective(config: "ObjectiveConfig") -> Objective:
    """The objective that a config variant names."""
    from learner.objectives.agrpo import Agrpo  # it imports this module's Statistics

    return {"agrpo": Agrpo}[config.type](config)
