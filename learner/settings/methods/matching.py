"""Settings of methods that match the policy to a target law of tokens.

The text under a field is its help; it names the unit.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from learner.settings.objective import Cost, ObjectiveSection, Phases, uniform_deviation
from learner.settings.sections import Fraction
from rollout.trajectory import SamplerSpec


class DtmConfig(ObjectiveSection):
    """DTM (arXiv 2604.18739): in phases, the policy is matched to its teacher's law, tilted towards the reward."""

    smallest_group: ClassVar[int] = 1
    takes_greedy: ClassVar[bool] = True  # the reward alone tells completions apart
    method: ClassVar[str] = "learner.objectives.dtm:Dtm"
    fixed: ClassVar[tuple[str, ...]] = ("phase_iterations", "buffer_prompts", "ema")
    type: Literal["dtm"] = "dtm"
    """The method."""
    tilt_step: PositiveFloat = 5.0
    """h, by which a phase raises the tilt: a completion of reward r weighs exp(h r) times one of reward 0."""
    tilt_end: PositiveFloat = 100.0
    """Tilt at which h shrinks to what is left, then to 0."""
    control_variate: Fraction = 1.0
    """Share of the teacher's law in the target of every completion, whatever its reward; the minimiser is the same for
    any, the noise least for 1."""
    phase_iterations: PositiveInt = 8
    """Iterations of a phase."""
    buffer_prompts: PositiveInt = 80
    """Groups in the buffer; rollout.prompts_per_iteration of them are replaced in an iteration."""
    completions: PositiveInt = 64
    """Completions that an update learns from, drawn from the buffer; all of a smaller one."""
    block_length: PositiveInt | None = None
    """Positions of a block of the interpolant; null: rollout.sampler.block_length."""
    scored: Literal["active_block", "all"] = "active_block"
    """active_block: the masked positions of the block that is partly masked; all: the later blocks' too."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the running mean of the weights, with which a phase ends; null: it ends with the last weights."""

    def cost(self, sampler: SamplerSpec) -> Cost:
        block = self.block_length or sampler.block_length
        most = block if self.scored == "active_block" else sampler.completion_length
        return Cost(
            views=1,
            scored=(most + 1) / 2,
            most=most,
            deviation=uniform_deviation(most),
            teacher=True,
            vocabulary=True,
            completions=self.completions,
        )

    def phases(self) -> Phases:
        return Phases(self.phase_iterations, self.buffer_prompts, self.ema)

    def refuses(self, sampler: SamplerSpec) -> list[str]:
        problems = super().refuses(sampler)
        block = self.block_length or sampler.block_length
        if sampler.completion_length % block:
            problems.append(
                f"objective.block_length={block} does not divide "
                f"rollout.sampler.completion_length={sampler.completion_length}; take one that does"
            )
        return problems

    def step_of(self, phase: int) -> float:
        """h of a phase, from 0."""
        return max(0.0, min(self.tilt_step, self.tilt_end - phase * self.tilt_step))
