"""Settings of methods that score bounds of a completion's likelihood, from random masks.

The text under a field is its help; it names the unit.
"""

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from learner.settings.objective import Cost, ObjectiveSection, uniform_deviation
from learner.settings.sections import Fraction, NonNegative
from rollout.trajectory import SamplerSpec


class EspoConfig(ObjectiveSection):
    """ESPO (arXiv 2512.03759): one ratio per completion, of its evidence lower bounds."""

    method: ClassVar[str] = "learner.objectives.espo:Espo"
    type: Literal["espo"] = "espo"
    """The method."""
    samples: PositiveInt = 2
    """Masks drawn per completion and update."""
    estimator: Literal["coupled", "plain"] = "coupled"
    """coupled: each mask and its complement, as published; plain: the mask alone, for half of the work."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    beta: NonNegative = 1e-3
    """Weight of the KL against the policy without adapter; 0 saves the reference forwards."""
    scale_advantages: bool = False
    """Divide advantages by the deviation of their group's rewards."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C, coupled = sampler.completion_length, self.estimator == "coupled"
        return Cost(
            views=self.samples * (2 if coupled else 1),
            scored=C / 2,
            most=C,
            deviation=uniform_deviation(C + 1),
            balanced="completion" if coupled else "group",  # the group's masks are spread evenly
            together="completion",
            old=True,
            reference=self.beta > 0,
        )


class GdpoConfig(ObjectiveSection):
    """GDPO (arXiv 2510.08554): as ESPO, with the bound from few fixed mask rates (Gauss-Legendre)."""

    method: ClassVar[str] = "learner.objectives.gdpo:Gdpo"
    type: Literal["gdpo"] = "gdpo"
    """The method."""
    nodes: Annotated[int, Field(ge=1, le=16)] = 3
    """Mask rates, one drawn mask each."""
    normalise_ratio: bool = False
    """Divide the exponent of the ratio by the completion's length; the paper's isn't."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low. Ours: no value was published."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high. Ours: no value was published."""
    beta: NonNegative = 0.0
    """Weight of the KL against the policy without adapter (k2 of the bounds, ours: the estimator wasn't published); 0
    saves the reference forwards."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C = sampler.completion_length
        rates = (np.polynomial.legendre.leggauss(self.nodes)[0] + 1) / 2
        return Cost(
            views=self.nodes,
            scored=C / 2,
            each=tuple((C * rates).tolist()),
            together="completion",
            old=True,
            reference=self.beta > 0,
        )


class BgpoConfig(ObjectiveSection):
    """BGPO (arXiv 2510.11683): a bound of the ratio of evidence lower bounds that is a sum over masks."""

    method: ClassVar[str] = "learner.objectives.bgpo:Bgpo"
    type: Literal["bgpo"] = "bgpo"
    """The method."""
    samples: PositiveInt = 8
    """Masks drawn per completion and update; ours: the published number isn't known. They are never in memory
    together."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low. Ours, as above it."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C = sampler.completion_length
        return Cost(views=self.samples, scored=(C + 1) / 2, most=C, deviation=uniform_deviation(C), old=True)


class SpgConfig(ObjectiveSection):
    """SPG (arXiv 2510.09541): a lower bound of good completions' likelihood goes up, an upper one of bad ones' down."""

    method: ClassVar[str] = "learner.objectives.spg:Spg"
    type: Literal["spg"] = "spg"
    """The method."""
    samples: PositiveInt = 2
    """Masks drawn per completion and update."""
    masking: Literal["block_random", "block_all", "random", "all"] = "block_random"
    """block_random: some of one block, and all later ones; block_all: all of one block and all later ones; random: some
    of the completion; all: all of it, which needs samples=1."""
    negative: Literal["mixture", "eubo", "elbo", "zero"] = "mixture"
    """What is lowered where the advantage isn't positive: the mixture of both bounds, the upper one, the lower one, or
    nothing."""
    eubo_beta: Annotated[float, Field(ge=1)] = 1.5
    """Order of the upper bound."""
    mixture_weight: Fraction = 0.5
    """Share of the upper bound in the mixture."""
    context_mask: Fraction = 0.15
    """Probability with which each token of the prompt, and of the blocks before the drawn one, is masked."""
    min_masked: Fraction = 0.0
    """Smallest masked share of what is drawn from; one token at least."""
    max_masked: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest masked share of what is drawn from."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C, block = sampler.completion_length, sampler.block_length
        drawn = C if self.masking in ("random", "all") else block
        # What is drawn from is one of the parts, another one in each view; how much of it is masked is uniform. All
        # that follows is masked, of what comes before the share ``context_mask``.
        parts, before = C // drawn, (C - drawn) / 2
        count = drawn if self.masking in ("all", "block_all") else drawn * (self.min_masked + self.max_masked) / 2
        others = math.sqrt((parts - self.samples) / (parts - 1)) if parts > 1 else 0.0
        spread = uniform_deviation(parts) * drawn * (1 - self.context_mask) * others
        if self.masking in ("random", "block_random"):
            spread = math.hypot(spread, uniform_deviation(drawn) * (self.max_masked - self.min_masked))
        scored = before * (1 + self.context_mask) + count
        return Cost(views=self.samples, scored=scored, most=C, deviation=spread, together="completion")

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        blocks = sampler.completion_length // sampler.block_length
        if self.masking in ("block_random", "block_all") and self.samples > blocks:
            problems.append(
                f"objective.samples={self.samples} masks each take a block, and "
                f"rollout.sampler.block_length={sampler.block_length} gives {blocks} to a completion; take shorter "
                "blocks, fewer samples or objective.masking=random"
            )
        if self.masking == "all" and self.samples > 1:
            problems.append(
                f"objective.masking=all masks the same tokens each time; set objective.samples={self.samples} to 1"
            )
        if self.min_masked > self.max_masked:
            problems.append(
                f"objective.min_masked={self.min_masked:g} is above objective.max_masked={self.max_masked:g}; swap the "
                "two"
            )
        return problems


class DmpoConfig(ObjectiveSection):
    """DMPO (arXiv 2510.08233): cross-entropy on the policy's own completions, weighted to favour good ones."""

    method: ClassVar[str] = "learner.objectives.dmpo:Dmpo"
    type: Literal["dmpo"] = "dmpo"
    """The method."""
    alpha: NonNegative = 0.04
    """Temperature of the target, in units of the reward; 0 takes weights from the rewards alone."""
    samples: PositiveInt = 4
    """Masked copies per completion and update."""
    measured_samples: PositiveInt = 4
    """Masked copies per completion that measure how far policy and base are apart, once per batch."""
    antithetic: bool = True
    """Draw copies in pairs of a mask and its complement."""
    rate_low: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Smallest mask rate; the largest is 1."""
    centering: Literal["negative", "mean", "unbiased"] = "negative"
    """What is taken from the weights w+: those of the negated reward, their own mean, or weights of how far the policy
    has moved since the batch began, which is measured before every update."""
    centering_strength: NonNegative = 1.0
    """How much of it."""
    ess_target: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Flatten the weights of a group until their effective sample size is this share of it; null: as they are."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C = sampler.completion_length
        return Cost(
            views=self.samples,
            scored=C / 2 if self.antithetic else C * (1 + self.rate_low) / 2,
            most=C,
            deviation=uniform_deviation(C) * (1 - self.rate_low),
            balanced="completion" if self.antithetic else None,
            measured=self.measured_samples,
            remeasured=self.samples if self.centering == "unbiased" else 0,
        )

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        odd = [name for name in ("samples", "measured_samples") if getattr(self, name) % 2]
        if self.antithetic and odd:
            problems += [
                f"objective.{name}={getattr(self, name)} is odd, and antithetic copies are pairs" for name in odd
            ]
        return problems


class RspoConfig(ObjectiveSection):
    """RSPO (arXiv 2605.10218): likelihood weighted by how far the advantage is above the distance from the base."""

    method: ClassVar[str] = "learner.objectives.rspo:Rspo"
    type: Literal["rspo"] = "rspo"
    """The method."""
    lam: NonNegative = 0.01
    """Weight of the distance from the base, of mean log-probs of a token, against the z-scored advantage; 0: plain
    advantage-weighted likelihood."""
    samples: PositiveInt = 4
    """Masks drawn per completion and update."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C, views = sampler.completion_length, self.samples
        return Cost(
            views=views,
            scored=(C + 1) / 2,
            most=C,
            deviation=uniform_deviation(C),
            measured=views,
            measured_each_update=True,
        )


class TraflConfig(ObjectiveSection):
    """TraFL (arXiv 2605.13935): the squared residual between likelihood ratio and reward, up to a normaliser."""

    method: ClassVar[str] = "learner.objectives.trafl:Trafl"
    type: Literal["trafl"] = "trafl"
    """The method."""
    b: PositiveFloat = 0.3
    """How far the mean log-prob of a token is to be above the base's for one unit of reward, nats. Ours: which constant
    the paper uses isn't known; times completion_length it is the weight of the reward against the KL of a completion,
    which is reported."""
    samples: PositiveInt = 4
    """Masks drawn per completion and update."""
    masks: Literal["paired", "independent"] = "paired"
    """paired: masks and their complements, as published; independent: each drawn by itself."""
    normaliser: Literal["learned", "profiled"] = "learned"
    """learned: the logarithm of the target's normaliser is what a small network makes of the prompt, as published;
    profiled: the value that suits the group's completions best, without a network."""
    head_width: PositiveInt = 64
    """Units of the network's hidden layer (ours: its shape isn't known)."""
    head_lr: PositiveFloat = 3e-4
    """The network's peak learning rate, on the schedule of learner.lr (ours: it isn't known)."""
    unbiased: bool = False
    """Leave the variance between masks out of the squares; needs independent masks."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        C = sampler.completion_length
        return Cost(
            views=self.samples,
            scored=C / 2,
            most=C,
            deviation=uniform_deviation(C),
            balanced="completion" if self.masks == "paired" else None,
            together="completion" if self.normaliser == "learned" else "group",
            reference=True,
            prompts=self.normaliser == "learned",
        )

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        if self.masks == "paired" and self.samples % 2:
            problems.append(f"objective.samples={self.samples} is odd, and paired masks are pairs")
        if self.masks == "paired" and sampler.completion_length < 2:
            problems.append(
                "objective.masks=paired finds no mask of a single token that leaves a complement; take "
                "objective.masks=independent"
            )
        if self.unbiased and (self.masks == "paired" or self.samples < 2):
            problems.append(
                f"objective.unbiased=true needs two masks or more that are drawn independently, and objective.masks="
                f"{self.masks}, objective.samples={self.samples}; take objective.masks=independent and more samples"
            )
        return problems
