"""The budget of a comparison, in forward-equivalents (``learner.settings.forwards``): what a run will cost at most."""

from learner.settings.forwards import forward_equivalents
from learner.settings.run import RunConfig


def planned_cost(config: RunConfig) -> float:
    """Forward-equivalents of one iteration at most, on average over a phase where the method learns in phases: every
    completion is learned from, no view repeats, none ends early."""
    rollout, phases = config.rollout, config.objective.phases()
    cost = config.objective.cost(rollout.sampler.spec())
    drawn = learned = float(rollout.prompts_per_iteration)
    if phases is not None:
        drawn, learned = drawn + (phases.prompts - drawn) / phases.iterations, float(phases.prompts)
    completions = learned * rollout.group_size
    views = cost.views * (completions if cost.completions is None else min(cost.completions, completions))
    return forward_equivalents(
        config,
        steps=drawn * rollout.group_size * rollout.sampler.steps,
        completions=completions,
        views=[views] * config.learner.updates_per_batch,
    )


def iterations_for(budget: float, cost: float) -> int:
    """Iterations of this cost that come nearest to the budget; one at least."""
    return max(1, round(budget / cost))
