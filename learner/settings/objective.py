"""What the settings of all methods share, and what can be said of a method before anything is loaded: which samplers it
can't learn from, and what an update costs.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rewards.section import Section
from rollout.trajectory import BranchSpec, SamplerSpec

ClipLow = Annotated[float, Field(gt=0, le=1)]
Average = Literal["sequence", "token"]


@dataclass(frozen=True)
class Cost:
    """What one update costs for each completion that it learns from, at most."""

    views: int
    """Views scored, each one forward and backward of a row."""
    scored: float
    """Positions scored in each view; a mean where the views of a unit share a completion's positions out."""
    most: float | None = None
    """Positions scored in one view at most; None: as many in each."""
    deviation: float = 0.0
    """Standard deviation of a view's number of scored positions, where that is drawn."""
    balanced: Literal["completion", "group"] | None = None
    """Whose views together score as many positions as any other's; None: nobody's."""
    together: Literal["view", "completion", "group"] = "view"
    """Whose views one forward holds together where it has room for them: nobody else's, those of a completion, or of
    a group."""
    each: tuple[float, ...] = ()
    """Positions scored in each view of a completion, in their order, where they differ and aren't drawn."""
    recorded: bool = False
    """Whether tokens are scored by the law that drew them, on the support that the rollout recorded."""
    parts: tuple["Cost", ...] = ()
    """Where several losses are added up, what each costs; of a group, the views of the first come first."""
    old: bool = False
    """Whether later updates on a batch score each view once more, without gradient, when the batch begins."""
    reference: bool = False
    """Whether each view is also scored without adapter and gradient."""
    measured: int = 0
    """Views measured when a batch begins, each one forward with and one without adapter, without gradient."""
    measured_each_update: bool = False
    """Whether they are measured again before every later update."""
    remeasured: int = 0
    """Views of every update that the policy alone is measured on before it, each one forward without gradient."""
    valued: int = 0
    """Views whose values the method's head says when a batch begins, each one forward without gradient."""
    prompts: bool = False
    """Whether each group's prompt is read in every update, one forward of a row without gradient."""
    choices: bool = False
    """Whether choices of positions are scored where the rollout makes them."""
    teacher: bool = False
    """Whether each view is also scored by the phase's teacher, without gradient."""
    vocabulary: bool = False
    """Whether whole laws are scored, not only the tokens' log-probs."""
    completions: int | None = None
    """Completions that an update learns from; None for all of its groups'."""


def uniform_deviation(values: int) -> float:
    """Standard deviation of a number that is uniform on so many whole ones in a row."""
    return math.sqrt((values**2 - 1) / 12)


@dataclass(frozen=True)
class Phases:
    """How a method learns in phases: all completions of a phase are written by the weights that it began with, the
    teacher's, and every update learns from a buffer of them."""

    iterations: int
    """of a phase"""
    prompts: int
    """Groups in the buffer. An iteration that begins a phase draws all of them, a later one replaces the oldest."""
    decay: float | None
    """Of the running mean of the weights, with which a phase ends; None ends it with the last weights."""

    def of(self, iteration: int) -> int:
        """Number of the phase that an iteration, from 0, is part of."""
        return iteration // self.iterations

    def drawn(self, prompts_per_iteration: int) -> float:
        """Groups that an iteration draws, on average over a phase."""
        return (self.prompts + (self.iterations - 1) * prompts_per_iteration) / self.iterations

    def begin(self, iteration: int) -> int:
        """The first iteration of that phase."""
        return iteration - iteration % self.iterations


class ObjectiveSection(Section):
    """What all methods share. A variant's ``type`` names it."""

    smallest_group: ClassVar[int] = 2
    """Completions of a prompt that the method needs at least."""
    takes_greedy: ClassVar[bool] = False
    """Whether completions of a prompt may all be the same."""
    fills_leave_out_diversity: ClassVar[bool] = False
    """Whether branches are compared by what the task rewards alone, so that completions may have a part for their
    diversity (``reward.diversity_weight``) beside it."""
    method: ClassVar[str]
    """Where the class is that does it, as module:Class; nothing that torch needs is loaded with the settings."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Its settings that a run keeps, beside the type: another value would not fit what a checkpoint holds."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        """Of completions that this sampler wrote."""
        raise NotImplementedError

    def phases(self) -> Phases | None:
        """How it learns in phases; None when every iteration learns from its own groups alone."""
        return None

    def branches(self, sampler: SamplerSpec) -> BranchSpec | None:
        """Which states of the completions are branched, and graded too; None for a method that needs none."""
        return None

    def learns_thresholds(self) -> bool:
        """Whether it learns the law by which a completion draws one of several thresholds."""
        return False

    def reward_parts(self) -> dict[str, str]:
        """Components of the reward that it needs by name, by the setting that names them."""
        return {}

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        """Why the method can't learn from completions of this sampler, one sentence each; empty when it can."""
        problems = []
        if isinstance(sampler.threshold, tuple) and not self.learns_thresholds():
            problems.append(
                f"rollout.sampler.threshold={list(sampler.threshold)} leaves each completion one to draw, by a law "
                "that nobody learns here; give one number, or set objective.threshold_lr with a method that has it"
            )
        if sampler.temperature > 0 or self.takes_greedy:
            return problems
        return [
            *problems,
            "rollout.sampler.temperature=0 leaves nothing to learn from, every completion of a group being the same; "
            "set it above 0 (evaluation is greedy anyway)",
        ]
