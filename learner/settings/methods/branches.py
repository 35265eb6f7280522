"""Settings of methods that learn from branches of recorded states.

The text under a field is its help; it names the unit.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from learner.settings.methods.bounds import EspoConfig, GdpoConfig, SpgConfig
from learner.settings.methods.one_step import CoupledGrpoConfig, DiffuGrpoConfig, Wd1Config
from learner.settings.methods.states import D2Config, threshold_problem
from learner.settings.objective import ClipLow, Cost, ObjectiveSection
from learner.settings.sections import Fraction, NonNegative
from rollout.sampling.schedule import tokens_per_step
from rollout.trajectory import BranchSpec, DrawnBranches, GreedyBranches, SamplerSpec


class EgspoConfig(ObjectiveSection):
    """EGSPO and EGSPO-SA (arXiv 2603.12554): the steps of largest entropy, each with a ratio and an advantage."""

    method: ClassVar[str] = "learner.objectives.egspo:Egspo"
    type: Literal["egspo"] = "egspo"
    """The method."""
    k: PositiveInt = 8
    """Steps of each completion that are learned from, those of the largest mean entropy."""
    lam: NonNegative = 0.5
    """Weight of what a step gained (EGSPO-SA): the reward less that of the likeliest fill of the state before the step.
    0: EGSPO, which grades completions alone. The paper's values for each task were not reachable; 0.5 is the code's."""
    normalise: bool = True
    """Divide returns by 1 + lam."""
    centre: Literal["return", "reward"] = "return"
    """return: advantages are returns less their mean over the steps of equal rank of a group; reward: the mean of the
    rewards is taken off, and what the step gained added as it is (the code's standard returns), which is unbiased."""
    step_reward: str | None = None
    """The component of the reward that alone counts for the likeliest fills; null: all of it. The code's is that of a
    right answer."""
    step_range: Literal["all", "until_last_token"] = "all"
    """Steps that can be taken; until_last_token: up to the one that revealed the last token other than EOS."""
    aggregate: Literal["sum", "mean"] = "sum"
    """How the log-probs of a step's tokens make its own; with mean, nothing is divided by the tokens of a step."""
    clip_low: ClipLow = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.5
    """The ratio is clipped above at 1 + clip_high."""
    kl: Literal["k3", "exact"] = "k3"
    """Of the step's log-prob; or the whole law's of each token, which needs its log-probs for the whole vocabulary."""
    beta: NonNegative = 0.04
    """Weight of the KL against the policy without adapter; 0 saves the reference forwards."""

    def branches(self, sampler: SamplerSpec) -> BranchSpec | None:
        return GreedyBranches(self.k, self.step_range == "until_last_token") if self.lam > 0 else None

    def reward_parts(self) -> dict[str, str]:
        return {} if self.step_reward is None else {"step_reward": self.step_reward}

    def cost(self, sampler: SamplerSpec) -> Cost:
        revealed = max(tokens_per_step(sampler.completion_length, sampler.block_length, sampler.steps))
        reference = self.beta > 0
        return Cost(self.k, scored=revealed, reference=reference, vocabulary=reference and self.kl == "exact")

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler) + threshold_problem(sampler)
        if self.k > sampler.steps:
            problems.append(
                f"objective.k={self.k} steps of a completion, and rollout.sampler.steps={sampler.steps} are all; take "
                f"{sampler.steps} at most"
            )
        return problems


BaseConfig = Annotated[
    DiffuGrpoConfig | Wd1Config | CoupledGrpoConfig | EspoConfig | GdpoConfig | SpgConfig | D2Config,
    Field(discriminator="type"),
]
"""Methods that a loss of drawn fills can be added to: those that score the raw law of views, and nothing recorded or
measured."""


class DispoConfig(ObjectiveSection):
    """DiSPO (arXiv 2602.06462): a loss of another method, and one of drawn fills of a state of each completion."""

    method: ClassVar[str] = "learner.objectives.dispo:Dispo"
    type: Literal["dispo"] = "dispo"
    """The method."""
    base: BaseConfig = DiffuGrpoConfig()
    alpha: PositiveFloat = 0.5
    """Weight of the loss of fills. The paper takes 0.1, 0.5 and 0.9."""
    samples: Annotated[int, Field(ge=2)] = 2
    """Z, fills of a state, each graded."""
    degree: NonNegative = 4.0
    """The state's progress t from 0 to 1 is drawn with a density proportional to t**degree."""
    prompt_mask: Fraction = 0.15
    """Probability with which each prompt token is masked where fills are scored."""
    prompt_masks: PositiveInt = 1
    """Masks of the prompt that a fill's log-prob is the mean over. Ours: how many wasn't reachable."""
    clip_low: ClipLow = 0.5
    """The ratio of a whole fill is clipped below at 1 - clip_low. Ours: no value was published."""
    clip_high: PositiveFloat = 0.5
    """The ratio of a whole fill is clipped above at 1 + clip_high. Ours: no value was published."""
    beta: NonNegative = 0.04
    """Weight of the fills' KL against the policy without adapter, beside the base's own. Ours: no value was
    published."""

    def branches(self, sampler: SamplerSpec) -> BranchSpec:
        return DrawnBranches(self.samples, self.degree)

    def cost(self, sampler: SamplerSpec) -> Cost:
        base, C = self.base.cost(sampler), sampler.completion_length
        views = base.views + self.prompt_masks
        # Of a state at progress t, 1 - t is masked: 1 / (degree + 2) of the completion on average.
        Z, d = self.samples, self.degree
        share, deviation = 1 / (d + 2), math.sqrt((d + 1) / (d + 3)) / (d + 2)
        fills = Cost(views=self.prompt_masks, scored=Z * C * share, most=Z * C, deviation=Z * C * deviation)
        return Cost(
            views=views,
            scored=(base.views * base.scored + fills.views * fills.scored) / views,
            parts=(base, fills),
            old=True,
            reference=base.reference or self.beta > 0,
        )

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = [problem.replace("objective.", "objective.base.") for problem in self.base.refuses(sampler)]
        if isinstance(sampler.threshold, float):
            problems.append(
                f"objective.type=dispo draws the step of its states beforehand, and a confidence threshold "
                f"({sampler.threshold:g}) leaves open how many steps there will be; sample without one"
            )
        return problems
