"""The feed's plan: which problems an iteration trains on is a function of the settings."""

from collections.abc import Callable
from typing import Any

import pytest

from learner.settings.run import load_config
from learner.supply.feed import Feed
from learner.supply.window import Supply
from rewards.task import Problem
from rollout.ledger import Ledger
from rollout.replay import ReplayBuffer
from rollout.trajectory import GroupSpec

PROBLEMS = [Problem(f"p{number}", {"number": number}) for number in range(10)]


@pytest.fixture
def make_feed() -> Callable[..., Feed]:
    """A feed of ten problems, four an iteration. Planning asks nothing of the pool, so there is none."""

    def make(*settings: str) -> Feed:
        config = load_config(["recipe=smoke", "run.iterations=6", *settings])
        ledger = Ledger(capacity=config.rollout.buffer_size, groups_per_lease=2, max_staleness=0)
        pool: Any = None
        supply = Supply(config.rollout.prompts_per_iteration, config.objective.phases())
        return Feed(config, PROBLEMS, pool, ReplayBuffer(ledger), supply, on_fault=print, stop=lambda: False)

    return make


def plan(feed: Feed, iterations: int) -> list[GroupSpec]:
    return [spec for iteration in range(iterations) for spec in feed.specs(iteration)]


def test_plan_is_a_function_of_the_settings(make_feed: Callable[..., Feed]) -> None:
    first, again = make_feed(), make_feed()
    assert plan(first, 6) == plan(again, 6)
    assert first.specs(3) == again.specs(3), "an iteration's groups depend on what was asked before"
    assert plan(first, 6) != plan(make_feed("run.seed=1"), 6)


def test_group_ids_grow_without_a_gap(make_feed: Callable[..., Feed]) -> None:
    assert [spec.group_id for spec in plan(make_feed(), 6)] == list(range(24))


def test_an_epoch_has_every_problem_once_and_each_epoch_has_its_own_order(make_feed: Callable[..., Feed]) -> None:
    ids = [spec.problem.id for spec in plan(make_feed(), 5)]  # two epochs; the border lies within an iteration
    epochs = ids[:10], ids[10:]
    for epoch in epochs:
        assert sorted(epoch) == sorted(problem.id for problem in PROBLEMS)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [problem.id for problem in PROBLEMS]


def test_every_group_has_its_own_seed_and_the_size_asked_for(make_feed: Callable[..., Feed]) -> None:
    specs = plan(make_feed("rollout.group_size=6"), 6)
    assert {spec.size for spec in specs} == {6}
    assert len({spec.seed for spec in specs}) == len(specs)
    other = plan(make_feed("run.seed=1"), 6)
    assert not {spec.seed for spec in specs} & {spec.seed for spec in other}


def test_issuing_goes_as_far_as_the_run_and_never_twice(make_feed: Callable[..., Feed]) -> None:
    feed = make_feed("rollout.max_staleness=1")
    feed.issue_through(1)
    feed.issue_through(1)
    assert feed.replay.ledger.counts()["issued"] == 8
    feed.issue_through(100)
    assert feed.replay.ledger.counts()["issued"] == 24
    assert feed.replay.ledger.last_iteration == 5
