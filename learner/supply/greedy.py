"""A run's own evaluation: the greedy exact-solve rate on held-out problems by number of denoising steps."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from learner.settings.run import RunConfig
from learner.supply.feed import Feed
from rewards.task import Problem
from rollout.messages import Weights
from rollout.trajectory import TrajectoryGroup


def greedy_solve_rates(
    config: RunConfig, feed: Feed, problems: Sequence[Problem], weights: Weights, *, on_tick: Callable[[], None]
) -> tuple[dict[str, float], list[TrajectoryGroup]]:
    """Share of problems whose verdict is right, by step count: ``{"m": 0.41, "m/2": ..., "m/4": ...}``; and how the
    first ``evaluation.kept`` completions were written in all m steps, each as a group of one with its number among
    the problems for a group id.

    Completions are decoded at temperature 0, without truncation, in the order that ``evaluation.position_rule`` says.
    Where training draws a threshold for each completion, ``threshold`` is the share by the likeliest of each prompt.
    ``on_tick`` is called every second or so, and ends the evaluation by raising. Raises GradingFailed when most
    verdicts failed.
    """

    def expire() -> Iterable[int]:
        on_tick()
        return feed.replay.ledger.expire()

    rule, samplers = config.evaluation.position_rule, {}
    for divisor in config.evaluation.step_divisors:
        greedy = feed.sampler.greedy(steps=feed.sampler.steps // divisor, position_rule=rule)
        samplers["m" if divisor == 1 else f"m/{divisor}"] = greedy
    if isinstance(feed.sampler.threshold, tuple):
        greedy = feed.sampler.greedy(steps=feed.sampler.steps, position_rule=rule)
        samplers["threshold"] = dataclasses.replace(greedy, threshold=feed.sampler.threshold)
    rates, kept = {}, []
    for name, sampler in samplers.items():
        results = feed.pool.evaluate(
            problems,
            sampler,
            weights,
            chunk_size=config.rollout.max_rows,
            timeout_s=config.timeouts.evaluate,
            expire=expire,
            keep=config.evaluation.kept if name == "m" else 0,
        )
        for result in results:
            feed.verdicts.note(result.faults)
        feed.verdicts.require_most(
            "the evaluation", failed=sum(result.grader_failures for result in results), asked=len(results)
        )
        rates[name] = sum(result.correct[0] for result in results) / len(results)
        kept += [
            dataclasses.replace(result.trajectory, group_id=number)
            for number, result in enumerate(results)
            if result.trajectory is not None
        ]
    return rates, kept
