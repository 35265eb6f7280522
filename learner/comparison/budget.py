"""Forward-equivalents: what a run's training costs, whatever the method.

One forward of one sequence counts 1, and its backward 2 more. So an iteration that draws R completions in m denoising
steps, and learns from G completions of Q prompts in U updates of v views each, costs

    R m  +  U v (3 + reference + teacher)  +  (U - 1) v old  +  G (2 measured + valued)  +  U Q prompts

``reference``, ``teacher``, ``old``, ``measured``, ``valued`` and ``prompts`` are what the objective says that it needs
(``learner.settings.objective``); where it measures before each update, ``measured`` counts U times. Evaluations, and
second passes that only save memory, are left out: they are no property of a method.

Shapes: I iterations.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    return drawn * rollout.group_size * rollout.sampler.steps + _learning(config, completions, views)


def spent(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Forward-equivalents of each finished iteration, [I] float64, from its rows of metrics.jsonl."""
    return np.array([_rolled_out(config, row) + _learning(config, row["completions"], row["views"]) for row in rows])


def iterations_for(budget: float, cost: float) -> int:
    """Iterations of this cost that come nearest to the budget; one at least."""
    return max(1, round(budget / cost))


def _learning(config: RunConfig, completions: float, views: float) -> float:
    """``views``: of an iteration's first update. Its later ones score as many, but for repeated draws and masks without
    a complement, a percent or two."""
    cost, updates = config.objective.cost(config.rollout.sampler.spec()), config.learner.updates_per_batch
    old = (updates - 1) * views if cost.old else 0.0
    measured = 2 * completions * cost.measured * (updates if cost.measured_each_update else 1)
    valued = completions * cost.valued
    prompts = updates * completions / config.rollout.group_size * cost.prompts
    return updates * views * (3 + cost.reference + cost.teacher) + old + measured + valued + prompts


def _rolled_out(config: RunConfig, row: Mapping[str, Any]) -> float:
    """Steps taken by all completions. Every step reveals as many tokens, so the tokens drawn tell how many there were,
    also where a completion ended early."""
    sampler = config.rollout.sampler
    tokens = row["machine/tokens_per_s"] * row["time/iteration_s"]
    return float(round(tokens * sampler.steps / sampler.completion_length))
