"""Settings of methods that score all tokens at once.

The text under a field is its help; it names the unit.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from learner.settings.objective import Average, ClipLow, Cost, ObjectiveSection
from learner.settings.sections import Fraction, NonNegative
from rollout.trajectory import SamplerSpec


class DiffuGrpoConfig(ObjectiveSection):
    """diffu-GRPO, the method of d1 (arXiv 2504.12216): one forward, all tokens at once from a masked prompt."""

    method: ClassVar[str] = "learner.objectives.diffu_grpo:DiffuGrpo"
    type: Literal["diffu_grpo"] = "diffu_grpo"
    """The method."""
    prompt_mask: Fraction = 0.15
    """Probability with which each prompt token is masked."""
    clip_low: ClipLow = 0.5
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.5
    """The ratio is clipped above at 1 + clip_high."""
    beta: NonNegative = 0.04
    """Weight of the KL against the policy without adapter; 0 saves the reference forwards."""
    average: Average = "sequence"
    """sequence: mean over a completion's tokens, then over completions, as published; token: over all tokens of the
    update, as the authors' code does."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        return Cost(views=1, scored=sampler.completion_length, old=True, reference=self.beta > 0)


class Wd1Config(ObjectiveSection):
    """wd1 (arXiv 2507.08838): no ratio; weighted log-likelihood, with weights from two softmaxes over advantages."""

    method: ClassVar[str] = "learner.objectives.wd1:Wd1"
    type: Literal["wd1"] = "wd1"
    """The method."""
    prompt_mask: Fraction = 0.15
    """Probability with which each prompt token is masked."""
    psi: PositiveFloat = 1.0
    """Factor of the advantages in both softmaxes."""
    negative_weight: NonNegative = 1.0
    """Weight of the completions that are made less likely; 0 leaves the positive half alone."""
    softmax_over: Literal["group", "batch"] = "group"
    """group: the completions of one prompt, as published; batch: all of the update, as the authors' code does (per
    device)."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        return Cost(views=1, scored=sampler.completion_length)


class CoupledGrpoConfig(ObjectiveSection):
    """coupled-GRPO, the method of DiffuCoder (arXiv 2506.20639): a mask and its complement, beside the full mask."""

    method: ClassVar[str] = "learner.objectives.coupled_grpo:CoupledGrpo"
    type: Literal["coupled_grpo"] = "coupled_grpo"
    """The method."""
    mask_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Smallest rate of the drawn mask."""
    mask_high: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Largest rate of the drawn mask."""
    clip_low: ClipLow = 0.5
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.5
    """The ratio is clipped above at 1 + clip_high."""
    beta: NonNegative = 0.01
    """Weight of the KL against the policy without adapter; 0 saves the reference forwards."""
    scale_advantages: bool = False
    """Divide advantages by the deviation of their group's rewards."""
    average: Average = "sequence"
    """sequence: mean over a completion's tokens, then over completions, as published; token: over all tokens of the
    update, as the authors' code does."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C = sampler.completion_length
        each = (C, C / 2, C / 2)  # one view scores all, the other two share it out
        return Cost(views=3, scored=2 * C / 3, each=each, together="completion", old=True, reference=self.beta > 0)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        if self.mask_low > self.mask_high:
            problems.append(
                f"objective.mask_low={self.mask_low:g} is above objective.mask_high={self.mask_high:g}; swap the two"
            )
        return problems
