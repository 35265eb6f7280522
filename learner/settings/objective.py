"""What the settings of all methods share, and what can be said of a method before anything is loaded: which samplers it
can't learn from, and what an update costs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from learner.settings.sections import Section
from rollout.trajectory import SamplerSpec

ClipLow = Annotated[float, Field(gt=0, le=1)]
Average = Literal["sequence", "token"]


@dataclass(frozen=True)
class Cost:
    """What one update costs for each completion that it learns from, at most."""

    views: int
    """Views scored, each one forward and backward of a row."""
    scored: float
    """Positions scored in each view; a mean where the views of a unit share a completion's positions out."""
    old: bool = False
    """Whether later updates on a batch score each view once more, without gradient, when the batch begins."""
    reference: bool = False
    """Whether each view is also scored without adapter and gradient."""
    measured: int = 0
    """Views measured when a batch begins, each one forward with and one without adapter, without gradient."""
    measured_each_update: bool = False
    """Whether they are measured again before every later update."""
    choices: bool = False
    """Whether choices of positions are scored where the rollout makes them."""


class ObjectiveSection(Section):
    """What all methods share. A variant's ``type`` names it."""

    method: ClassVar[str]
    """Where the class is that does it, as module:Class; nothing that torch needs is loaded with the settings."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        """Of completions that this sampler wrote."""
        raise NotImplementedError

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        """Why the method can't learn from completions of this sampler, one sentence each; empty when it can."""
        if sampler.temperature > 0:
            return []
        return [
            "rollout.sampler.temperature=0 leaves nothing to learn from, every completion of a group being the same; "
            "set it above 0 (evaluation is greedy anyway)"
        ]
