"""Settings of methods that score states which the rollout went through.

The text under a field is its help; it names the unit.
"""

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from learner.settings.objective import Average, ClipLow, Cost, ObjectiveSection
from learner.settings.sections import Fraction, NonNegative
from rollout.sampling.schedule import tokens_per_step
from rollout.trajectory import BranchSpec, GreedyBranches, SamplerSpec


class AgrpoConfig(ObjectiveSection):
    """AGRPO (arXiv 2510.04019)."""

    method: ClassVar[str] = "learner.objectives.agrpo:Agrpo"
    fills_leave_out_diversity: ClassVar[bool] = True
    type: Literal["agrpo"] = "agrpo"
    """The method."""
    k: PositiveInt = 4
    """Denoising steps sampled per completion and update."""
    timestep_sampling: Literal["uniform", "entropy"] = "entropy"
    """Law of the sampled steps; entropy draws by the entropy that the rollout recorded (docs/variance.md: the noise of
    uniform draws for little more than half of the work)."""
    low_discrepancy: bool = True
    """Stratify the draws."""
    strata: Literal["group", "row"] = "group"
    """What they are stratified over: the draws of a group, as published, or each completion's own (ours), which scores
    fewer steps twice and leaves less noise."""
    draws: Literal["repeated", "once"] = "repeated"
    """repeated: k draws of each completion, which may hit the same step, as published; once (ours): each step at most
    once, with a probability in proportion to the law and to the size of its advantage, k for each completion of a group
    that has one, on average. strata are those of repeated draws; once, low_discrepancy spreads over the group."""
    baseline: Literal["group", "fills"] = "group"
    """What is taken from the reward. group: the mean over the completions of the prompt, as published; fills (ours): in
    part the reward of the likeliest fill of the state before the step, as far as that foretells the reward; a part for
    diversity (reward.diversity_weight) is not of fills, and is compared with the others' alone."""
    fills: PositiveInt = 8
    """States of each completion whose likeliest fills are graded, evenly spaced, with baseline=fills."""
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

    @property
    def strata_of_draws(self) -> Literal["none", "group", "row"]:
        """What the draws are stratified over."""
        return self.strata if self.low_discrepancy else "none"

    def branches(self, sampler: SamplerSpec) -> BranchSpec | None:
        return GreedyBranches(min(self.fills, sampler.steps), evenly=True) if self.baseline == "fills" else None

    def cost(self, sampler: SamplerSpec) -> Cost:
        revealed = max(tokens_per_step(sampler.completion_length, sampler.block_length, sampler.steps))
        return Cost(views=self.k, scored=revealed, recorded=True, reference=self.beta > 0, choices=True)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler) + threshold_problem(sampler)
        chooses = sampler.position_rule == "decoupled_confidence" and sampler.position_temperature > 0
        if chooses and self.timestep_sampling == "entropy" and self.weight_floor == 0:
            problems.append(
                "objective.timestep_sampling=entropy with rollout.sampler.position_rule=decoupled_confidence needs "
                "objective.weight_floor above 0, or steps whose choice of positions is all but certain get unbounded "
                "weights; take 0.2, for example"
            )
        return problems


class AgrpoFillsConfig(AgrpoConfig):
    """AGRPO with fills (ours): no step is drawn twice, and a step is credited with what came after it. The expected
    gradient is G/(G-1) times AGRPO's, with less noise (docs/variance.md, docs/comparison-sudoku.md)."""

    type: Literal["agrpo_fills"] = "agrpo_fills"  # type: ignore[assignment]  # the variant's own name
    """The method."""
    k: PositiveInt = 2
    """Denoising steps taken per completion and update, on average."""
    draws: Literal["repeated", "once"] = "once"
    """once: each step at most once, with a probability in proportion to the law and to the size of its advantage;
    repeated: k draws of each completion, as AGRPO's."""
    baseline: Literal["group", "fills"] = "fills"
    """fills: what is taken from the reward is in part the reward of the likeliest fill of the state before the step;
    group: the mean over the completions of the prompt, as AGRPO's."""


class D2Config(ObjectiveSection):
    """d2-StepMerge (arXiv 2509.21474): the rollout's steps merged into segments, each scored from its first state."""

    method: ClassVar[str] = "learner.objectives.d2:D2"
    type: Literal["d2"] = "d2"
    """The method."""
    segments: PositiveInt = 16
    """Views of each completion, N: 16 is the published number for planning tasks and MATH, 8 for GSM8K. As many as the
    sampler's steps, or more, are the exact likelihood of the path."""
    prompt_mask: Fraction = 0.15
    """Probability with which each prompt token is masked."""
    clip_low: ClipLow = 0.5
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.5
    """The ratio is clipped above at 1 + clip_high."""
    beta: NonNegative = 0.04
    """Weight of the KL against the policy without adapter; 0 saves the reference forwards."""
    average: Average = "sequence"
    """sequence: mean over a completion's tokens, then over completions, as GRPO's; token: over all tokens of the
    update, as the authors' code does."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        views = min(self.segments, sampler.steps)
        return Cost(views=views, scored=sampler.completion_length / views, old=True, reference=self.beta > 0)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        return super().refuses(sampler) + threshold_problem(sampler)


class TraceRlConfig(ObjectiveSection):
    """TraceRL for models that attend to the whole sequence (arXiv 2509.06949): all steps, some of them at a time."""

    method: ClassVar[str] = "learner.objectives.trace_rl:TraceRl"
    type: Literal["trace_rl"] = "trace_rl"
    """The method."""
    shrink: PositiveInt = 8
    """Consecutive steps that are scored in one view, from the state before the first of them; 1 is the exact likelihood
    of the path."""
    eos_scored: NonNegativeInt | None = None
    """How many EOS of a completion are scored, the first ones; null: all that were drawn. Published: 0, for a model
    whose turn ends with a token of its own before them."""
    clip_low: ClipLow = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    beta: NonNegative = 0.01
    """Weight of the KL against the policy that the batch's first update began with, summed over a view's tokens."""
    kl: Literal["k3", "k1"] = "k3"
    """Its estimator. k3: exp(d) - d - 1; k1: -d, whose gradient keeps no policy near another."""
    value_lr: PositiveFloat | None = None
    """Peak learning rate, on the schedule of learner.lr, of a network on the policy's hidden states that gives each
    token a value, which its advantage is taken against; null: no values. Ours: what is published is a second model
    (5e-6, all of its weights), so its rate says nothing of this one's."""
    value_width: PositiveInt = 64
    """Units of the network's hidden layer (ours)."""
    value_clip: PositiveFloat = 0.2
    """A value's error is no smaller than where it would be this far from the old value, rewards' deviations."""
    value_discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """gamma of the advantages: what a reward is worth a view earlier."""
    value_lambda: Fraction = 1.0
    """lambda of the advantages: 1 goes by the reward alone; below 1 by later values too, read for one forward more when
    a batch begins."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        views = -(-sampler.steps // self.shrink)
        valued = views if self.value_lr is not None and self.value_lambda < 1 else 0
        return Cost(views=views, scored=sampler.completion_length / views, old=True, valued=valued)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        return super().refuses(sampler) + threshold_problem(sampler)


class JustGrpoConfig(ObjectiveSection):
    """JustGRPO (arXiv 2601.15165): completions written left to right, one token a step, each scored exactly."""

    method: ClassVar[str] = "learner.objectives.just_grpo:JustGrpo"
    type: Literal["just_grpo"] = "just_grpo"
    """The method. It needs rollout.sampler.position_rule=left_to_right, and as many steps as positions."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each block's positions that is scored, those with the largest entropy; 1 is the published exact form,
    0.25 the fast one, which is biased."""
    clip_low: ClipLow = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    beta: NonNegative = 0.0
    """Weight of the KL against the policy without adapter (ours: none was published); 0 saves the reference
    forwards."""

    def scored_per_block(self, sampler: SamplerSpec) -> int:
        """Positions scored of a block in which all were drawn; at least 1."""
        return math.ceil(self.share * sampler.block_length - 1e-9)  # 0.1 of 30 is 3.0000000000000004

    def cost(self, sampler: SamplerSpec) -> Cost:
        views = self.scored_per_block(sampler) * (sampler.completion_length // sampler.block_length)
        return Cost(views=views, scored=1, recorded=True, reference=self.beta > 0)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler) + threshold_problem(sampler)
        if sampler.position_rule != "left_to_right":
            problems.append(
                "objective.type=just_grpo learns from completions that were written left to right, and "
                f"rollout.sampler.position_rule={sampler.position_rule} doesn't; set it to left_to_right"
            )
        if sampler.steps != sampler.completion_length:
            problems.append(
                f"objective.type=just_grpo needs one token a step, and rollout.sampler.steps={sampler.steps} for "
                f"{sampler.completion_length} positions reveals more; set it to {sampler.completion_length}"
            )
        return problems


def threshold_problem(sampler: SamplerSpec) -> list[str]:
    """Why a method that scores the steps of the rollout can't learn from this sampler, if it can't."""
    if not isinstance(sampler.threshold, float):  # several are refused by all but one method
        return []
    return [
        f"a confidence threshold ({sampler.threshold:g}) makes how many positions a step reveals depend on the policy, "
        "which isn't scored; sample without one"
    ]


class DiffpoConfig(ObjectiveSection):
    """DiFFPO (arXiv 2510.02212): two states of each completion, the masked one and that before a drawn step."""

    method: ClassVar[str] = "learner.objectives.diffpo:Diffpo"
    type: Literal["diffpo"] = "diffpo"
    """The method."""
    prompt_mask: Fraction = 0.15
    """Probability with which each prompt token is masked (ours: d1's)."""
    clip_low: ClipLow = 0.5
    """The ratio is clipped below at 1 - clip_low (ours: d1's)."""
    clip_high: PositiveFloat = 0.5
    """The ratio is clipped above at 1 + clip_high (ours: d1's)."""
    beta: NonNegative = 0.04
    """Weight of the KL against the policy without adapter (ours: d1's); 0 saves the reference forwards."""
    importance: Literal["none", "token", "completion"] = "none"
    """Weights for the completions being the sampler's and the likelihood another law's: the likelihood over the
    probability with which the rollout drew a token, or all of a completion (ours: that there are such weights was
    published, not which)."""
    importance_cap: PositiveFloat = 2.0
    """No weight is larger (ours)."""
    threshold_lr: PositiveFloat | None = None
    """Peak learning rate, on the schedule of learner.lr, of a network that says by a prompt which of several
    rollout.sampler.threshold its completions draw; null: none is learned. Ours: that a prompt's threshold is learned
    with the policy was published, not how. 1e-3 is a rate to begin with."""
    threshold_width: PositiveInt = 64
    """Units of the network's hidden layer (ours)."""

    def learns_thresholds(self) -> bool:
        return self.threshold_lr is not None

    def cost(self, sampler: SamplerSpec) -> Cost:
        scored, reference, learned = sampler.completion_length / 2, self.beta > 0, self.learns_thresholds()
        return Cost(views=2, scored=scored, old=True, reference=reference, prompts=learned)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        if self.threshold_lr is not None and not isinstance(sampler.threshold, tuple):
            problems.append(
                f"objective.threshold_lr={self.threshold_lr:g} learns which of several thresholds to draw; set "
                "rollout.sampler.threshold=[0.5,0.7,0.9], for example, or leave it null"
            )
        if isinstance(sampler.threshold, tuple):
            # As they are recorded, where two that are too near are one.
            several = [float(np.float32(threshold)) for threshold in sampler.threshold]
            if len(set(several)) < len(several):
                problems.append(
                    f"rollout.sampler.threshold={list(sampler.threshold)} has a threshold twice, so that a draw of it "
                    "could be either; leave one out"
                )
        if sampler.threshold is None and sampler.steps < 2:
            problems.append(
                f"rollout.sampler.steps={sampler.steps} leaves no step after the first to draw one from; take 2 or more"
            )
        return problems
