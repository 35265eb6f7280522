"""Forward-equivalents: what a run's training costs, whatever the method.

One forward of one sequence counts 1, and its backward 2 more. So an iteration that draws its completions in S denoising
steps, all together, and learns from G completions of Q prompts in U updates of v views each, costs

    S  +  U v (3 + reference + teacher)  +  (U - 1) v old  +  G (2 measured + U remeasured + valued)  +  U Q prompts

``reference``, ``teacher``, ``old``, ``measured``, ``remeasured``, ``valued`` and ``prompts`` are what the objective
says that it needs (``learner.settings.objective``); where it measures before each update, ``measured`` counts U times.
Evaluations, and second passes that only save memory, are left out: they are no property of a method.
"""

from collections.abc import Sequence

from learner.settings.run import RunConfig


def forward_equivalents(config: RunConfig, *, steps: float, completions: float, views: Sequence[float]) -> float:
    """Of one iteration.

    Args:
        steps: denoising steps of all completions that it drew.
        completions: that it learned from.
        views: that each of its updates scored.
    """
    cost, updates = config.objective.cost(config.rollout.sampler.spec()), len(views)
    old = sum(views[1:]) if cost.old else 0.0
    measured = 2 * completions * cost.measured * (updates if cost.measured_each_update else 1)
    measured += updates * completions * cost.remeasured
    valued = completions * cost.valued
    prompts = updates * completions / config.rollout.group_size * cost.prompts
    return steps + sum(views) * (3 + cost.reference + cost.teacher) + old + measured + valued + prompts
