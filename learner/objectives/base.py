"""What a method is, for the ranks, the plan and playback: ``Objective``.

Shapes: G completions of a group, N scored tokens and Z views of a batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from learner.likelihood.views import View, ViewBatch
from learner.objectives.statistics import Statistics
from rollout.trajectory import TrajectoryGroup

if TYPE_CHECKING:
    import torch

    from learner.settings.objectives import ObjectiveSection


@dataclass(frozen=True)
class Wanted:
    """What one update scores of a group."""

    views: list[View]
    """In row order."""
    divisor: float
    """The group's part of what the update's loss is divided by: the loss is the sum of all losses over the sum of all
    divisors, however the views are dealt out."""
    statistics: Statistics


class Objective(Protocol):
    """A method: which views it wants of a group, what they are credited with, and the loss of their scores."""

    @property
    def config(self) -> "ObjectiveSection":
        """The variant of the settings; it says which samplers the method refuses, and what an update costs."""

    @property
    def needs_reference(self) -> bool:
        """Whether ``loss`` wants the log-probs of the policy without adapter."""

    def credit(self, group: TrajectoryGroup) -> np.ndarray:
        """[G] float64, what each completion is credited with. The only place where a method turns rewards into that:
        the plan keeps it, and playback shows what was kept.

        Raises:
            DataError: when a reward isn't finite.
        """

    def wanted(
        self,
        index: int,
        group: TrajectoryGroup,
        credit_G: np.ndarray,
        *,
        run_seed: int,
        update_index: int,
        eos_ids: tuple[int, ...],
    ) -> Wanted:
        """The views of the group at ``index`` of the update; a function of its arguments alone."""

    def loss(
        self,
        logp_N: "torch.Tensor",
        ref_logp_N: "torch.Tensor | None",
        batch: ViewBatch,
        *,
        position_logp_Z: "torch.Tensor | None" = None,
        ref_position_logp_Z: "torch.Tensor | None" = None,
    ) -> tuple["torch.Tensor", Statistics]:
        """Loss summed over the batch's scores, not yet divided by the update's divisor, and its figures.

        The log-probs of tokens, and of the choices of positions where ``batch.positions`` has them.
        """
