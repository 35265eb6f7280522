"""The settings of each method: one variant of ``objective.*``, whose defaults are the vetted ones; and what can be said
of it before anything is loaded: which samplers it can't learn from, and what an update costs.

The text under a field is its help; it names the unit.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from learner.settings.sections import Fraction, NonNegative, Section
from rollout.trajectory import SamplerSpec


@dataclass(frozen=True)
class Cost:
    """What one update costs for each completion that it learns from, at most."""

    views: int
    """Views scored, each one forward and backward of a row."""
    reference: bool
    """Whether each view is also scored without adapter and gradient."""


class ObjectiveSection(Section):
    """What all methods share. A variant's ``type`` names it."""

    @property
    def cost(self) -> Cost:
        raise NotImplementedError

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        """Why the method can't learn from completions of this sampler, one sentence each; empty when it can."""
        raise NotImplementedError


class AgrpoConfig(ObjectiveSection):
    """AGRPO (arXiv 2510.04019)."""

    type: Literal["agrpo"] = "agrpo"
    """The method."""
    k: PositiveInt = 4
    """Denoising steps sampled per completion and update."""
    timestep_sampling: Literal["uniform", "entropy"] = "entropy"
    """Law of the sampled steps; entropy draws by the entropy that the rollout recorded (docs/variance.md: the noise of
    uniform draws for little more than half of the work)."""
    low_discrepancy: bool = True
    """Stratify the draws over a group."""
    step_range: Literal["all", "until_last_token"] = "all"
    """Steps that can be sampled; until_last_token is the published range, all is the unbiased one."""
    weight_floor: Fraction = 0.1
    """Share a of the uniform law mixed into the entropy law; bounds the importance weight by 1/a. Published: 0."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    position_clip_low: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as clip_low for the choice of positions, where the position rule scores it; null: clip_low."""
    position_clip_high: PositiveFloat | None = None
    """The same as clip_high for the choice of positions; null: clip_high."""
    beta: NonNegative = 0.0
    """Weight of the KL against the policy without adapter, of tokens and of scored choices of positions; 0 saves the
    reference forwards."""

    @property
    def cost(self) -> Cost:
        return Cost(views=self.k, reference=self.beta > 0)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = []
        if sampler.temperature <= 0:
            problems.append(
                "rollout.sampler.temperature=0 leaves nothing to learn from, every completion of a group being the "
                "same; set it above 0 (evaluation is greedy anyway)"
            )
        if sampler.threshold is not None:
            problems.append(
                f"a confidence threshold ({sampler.threshold:g}) makes how many positions a step reveals depend on the "
                "policy, which isn't scored; sample without one"
            )
        chooses = sampler.position_rule == "decoupled_confidence" and sampler.position_temperature > 0
        if chooses and self.timestep_sampling == "entropy" and self.weight_floor == 0:
            problems.append(
                "objective.timestep_sampling=entropy with rollout.sampler.position_rule=decoupled_confidence needs "
                "objective.weight_floor above 0, or steps whose choice of positions is all but certain get unbounded "
                "weights; take 0.2, for example"
            )
        return problems


# The second method makes this a union: Annotated[AgrpoConfig | ..., Field(discriminator="type")].
ObjectiveConfig = AgrpoConfig
