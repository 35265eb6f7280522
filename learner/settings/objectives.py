"""The settings of each method: one variant of ``objective.*``, whose defaults are the vetted ones; and what can be said
of it before anything is loaded: which samplers it can't learn from, and what an update costs.

The text under a field is its help; it names the unit.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from learner.settings.sections import Fraction, NonNegative, Section
from rollout.sampling.schedule import tokens_per_step
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


class AgrpoConfig(ObjectiveSection):
    """AGRPO (arXiv 2510.04019)."""

    method: ClassVar[str] = "learner.objectives.agrpo:Agrpo"
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
    clip_low: ClipLow = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    position_clip_low: ClipLow | None = None
    """The same as clip_low for the choice of positions, where the position rule scores it; null: clip_low."""
    position_clip_high: PositiveFloat | None = None
    """The same as clip_high for the choice of positions; null: clip_high."""
    beta: NonNegative = 0.0
    """Weight of the KL against the policy without adapter, of tokens and of scored choices of positions; 0 saves the
    reference forwards."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        revealed = max(tokens_per_step(sampler.completion_length, sampler.block_length, sampler.steps))
        return Cost(views=self.k, scored=revealed, reference=self.beta > 0, choices=True)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
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
        scored = 2 * sampler.completion_length / 3
        return Cost(views=3, scored=scored, old=True, reference=self.beta > 0)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        if self.mask_low > self.mask_high:
            problems.append(
                f"objective.mask_low={self.mask_low:g} is above objective.mask_high={self.mask_high:g}; swap the two"
            )
        return problems


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
        views = self.samples * (2 if self.estimator == "coupled" else 1)
        return Cost(views=views, scored=sampler.completion_length / 2, old=True, reference=self.beta > 0)


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
        return Cost(views=self.nodes, scored=sampler.completion_length / 2, old=True, reference=self.beta > 0)


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
        return Cost(views=self.samples, scored=sampler.completion_length)

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
    centering: Literal["negative", "mean"] = "negative"
    """What is taken from the weights w+: those of the negated reward, or their own mean."""
    centering_strength: NonNegative = 1.0
    """How much of it."""
    ess_target: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Flatten the weights of a group until their effective sample size is this share of it; null: as they are."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        return Cost(views=self.samples, scored=sampler.completion_length / 2, measured=self.measured_samples)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        odd = [name for name in ("samples", "measured_samples") if getattr(self, name) % 2]
        if self.antithetic and odd:
            problems += [
                f"objective.{name}={getattr(self, name)} is odd, and antithetic copies are pairs" for name in odd
            ]
        return problems


ObjectiveConfig = Annotated[
    AgrpoConfig | DiffuGrpoConfig | Wd1Config | CoupledGrpoConfig | EspoConfig | GdpoConfig | SpgConfig | DmpoConfig,
    Field(discriminator="type"),
]
