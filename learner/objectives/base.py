"""What a method is, for the ranks, the plan and playback: ``Objective``.

Shapes: G completions of a group, S steps of a completion that have a credit of their own, M views of a group whose
values are read, N scored tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from learner.likelihood.views import Law, Unit, View, ViewBatch
from learner.objectives.statistics import Statistics
from rollout.seeds import numpy_generator
from rollout.trajectory import TrajectoryGroup

if TYPE_CHECKING:
    import torch

    from learner.likelihood.scorer import PolicyScores
    from learner.settings.objective import ObjectiveSection


@dataclass(frozen=True)
class Needs:
    """What ``loss`` wants to be scored, beside the current policy."""

    law: Law = Law.DRAWN
    old: bool = False
    """The same views under the weights that the batch's first update began with. (A stale rollout's own weights are
    gone; its log-probs are recorded at its own states only.)"""
    reference: bool = False
    """The same views without adapter."""
    teacher: bool = False
    """The same views under the weights that the phase began with (``ObjectiveSection.phases``)."""
    vocabulary: bool = False
    """Of all these weights not only the tokens' log-probs, but those of the whole vocabulary, at every scored position.
    For units of one view."""
    head: "HeadSpec | None" = None
    """A learned value of each prompt, or log-prob of each completion's threshold, in ``Scores.value_Z`` of the current
    policy; or a value of each scored token, in ``Scores.value_N`` of the current policy and the old one."""


@dataclass(frozen=True)
class HeadSpec:
    """A small network beside the policy, learned from the method's loss alone."""

    width: int
    """Units of its hidden layer."""
    lr: float
    """Its peak learning rate, on the adapter's schedule."""
    of: Literal["prompts", "tokens", "thresholds"] = "prompts"
    """What it reads: the prompt of a masked completion, or the state of each scored position, for units of one view.
    thresholds: the prompt, of which it makes the law by which completions draw one of the sampler's; actors draw by
    it."""


@dataclass(frozen=True)
class UpdateContext:
    """Which update it is: what names its draws, and what is known of all its groups."""

    run_seed: int
    update_index: int
    """number among the updates on the same groups"""
    groups: int
    """of the update"""
    eos_ids: tuple[int, ...]
    phase: int = 0
    """of a method that learns in phases, whose updates are counted from the begin of each"""

    def shared(self, purpose: str) -> np.random.Generator:
        """The random numbers of this update for all its groups together, of a method that learns in phases."""
        return numpy_generator(self.run_seed, "phase", self.phase, self.update_index, purpose)

    def stream(self, group: TrajectoryGroup, purpose: str) -> np.random.Generator:
        """The random numbers of this update on this group for this purpose, the same whoever asks and whenever."""
        return numpy_generator(
            self.run_seed, int(group.group_id), int(group.policy_version), self.update_index, purpose
        )


@dataclass(frozen=True)
class Wanted:
    """What one update scores of a group."""

    units: Sequence[Unit]
    """In row order."""
    divisor: float
    """The group's part of what the update's loss is divided by: the loss is the sum of all losses over the sum of all
    divisors, however the units are dealt out."""
    statistics: Statistics
    added: "Wanted | None" = None
    """A further loss, of views whose ``part`` isn't 0, that is added to this one: it is divided by the sum of its own
    divisors. The plan brings its weights to that."""


class RowSums(NamedTuple):
    """What a measurement found: for each group [G] float64, each completion's sum of weight times log-prob over the
    measured views."""

    policy: tuple[np.ndarray, ...]
    reference: tuple[np.ndarray, ...]
    """Of the base without adapter."""
    present: tuple[np.ndarray, ...] = ()
    """Of the policy just before the update, over the ``remeasured`` views; () where there are none."""


class FinalCredit(NamedTuple):
    """What a measurement makes of the credit."""

    by_group: tuple[np.ndarray, ...]
    """as ``Objective.credit`` gives it"""
    statistics: Statistics
    """of the whole update"""


class Objective(Protocol):
    """A method: which views it wants of a group, what they are credited with, and the loss of their scores."""

    @property
    def config(self) -> "ObjectiveSection":
        """The variant of the settings; it says which samplers the method refuses, and what an update costs."""

    @property
    def needs(self) -> Needs:
        """What ``loss`` wants to be scored."""

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """For each of the update's groups [G] float64, what each completion is credited with; or [G, S], what each of S
        steps of it is, the first of which stands for the completion. The only place where a method turns rewards into
        that: the plan keeps it, and playback shows what was kept.

        Raises:
            DataError: when a reward isn't finite.
        """

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The units of the group at ``index`` of the update; a function of its arguments alone."""

    def loss(self, scores: "PolicyScores", batch: ViewBatch) -> tuple["torch.Tensor", Statistics]:
        """Loss summed over the batch's units, not yet divided by the update's divisor, and its figures.

        The batch holds whole units and no pads; ``scores`` has what ``needs`` names.
        """


@runtime_checkable
class Weighed(Objective, Protocol):
    """A method whose credit needs log-probs of whole groups, or of all groups: they are measured without gradient, on
    all ranks together, before the credit is final."""

    @property
    def measures_each_update(self) -> bool:
        """True when the current policy is measured before every update, false when once before a batch's first."""

    def measured(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> Sequence[Unit]:
        """The views that are measured of the group at ``index``, by the law of ``needs``."""

    def weigh(self, groups: Sequence[TrajectoryGroup], credit: Sequence[np.ndarray], sums: RowSums) -> FinalCredit:
        """The final credit; pure."""


@runtime_checkable
class Remeasured(Weighed, Protocol):
    """A method that measures once per batch, whose credit may also need what the policy has become since: it is
    measured before every update on views of that update, beside what the batch began with."""

    def remeasured(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> Sequence[Unit]:
        """The views of the coming update that the policy is measured on, of the group at ``index``; none at all where
        that isn't needed."""


@runtime_checkable
class Valued(Objective, Protocol):
    """A method whose credit may need its head's values of other states than the one that is credited: they are read
    without gradient, on all ranks together, before a batch's first update."""

    def valued(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> Sequence[View]:
        """The views whose values the credit needs of the group at ``index``; none at all where it needs none."""

    def credit_by_values(
        self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, values_M: np.ndarray, context: UpdateContext
    ) -> np.ndarray:
        """The group's final credit, [G, S]; pure.

        Args:
            values_M: [M] float64, the mean value over the scored positions of each of the ``valued`` views.
        """
