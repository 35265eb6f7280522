"""A run's own evaluation: the greedy exact-solve rate on held-out problems by number of denoising steps."""

from collections.abc import Callable, Iterable, Sequence

from learner.config import RunConfig
from learner.evaluation.cells import greedy_sampler
from learner.feed import Feed
from rewards.task import Problem
from rollout.actor import Weights


def greedy_solve_rates(
    config: RunConfig, feed: Feed, problems: Sequence[Problem], weights: Weights, *, on_tick: Callable[[], None]
) -> dict[str, float]:
    """Share of problems whose verdict is right, by step count: ``{"m": 0.41, "m/2": ..., "m/4": ...}``.

    Completions are decoded at temperature 0, without truncation, in the order that ``evaluation.position_rule`` says.
    ``on_tick`` is called every second or so, and ends the evaluation by raising.
    """

    def expire() -> Iterable[int]:
        on_tick()
        return feed.replay.ledger.expire()

    rates = {}
    for divisor in config.evaluation.step_divisors:
        results = feed.pool.evaluate(
            problems,
            greedy_sampler(
                feed.sampler, steps=feed.sampler.steps // divisor, position_rule=config.evaluation.position_rule
            ),
            weights,
            chunk_size=config.rollout.max_rows,
            timeout_s=config.timeouts.evaluate,
            expire=expire,
        )
        rates["m" if divisor == 1 else f"m/{divisor}"] = sum(result.correct[0] for result in results) / len(results)
    return rates
