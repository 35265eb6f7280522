"""The controller's cycle over the product's feed, for stand-ins of actors and ranks, virtual or real.

The order is ``learner.control.controller``'s: plan, gather, update while the feed is pumped, publish, commit, report.
Evaluations and checkpoints are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from learner.settings.run import RunConfig
from learner.supply.feed import Feed
from learner.supply.window import Supply
from rewards.task import Problem
from rollout.ledger import Ledger
from rollout.messages import Weights
from rollout.pool import RolloutPool
from rollout.replay import ReplayBuffer, ReplayItem
from services.store.faults import OnFault

PROBLEMS = 256
"""Different ones; they say nothing but their names."""


class Learner(Protocol):
    """The ranks' side of a cycle."""

    def update(self, items: Sequence[ReplayItem], pump: Callable[[], None]) -> None:
        """Learn from these, calling ``pump`` as often as the controller does."""

    def publish(self, version: int, pump: Callable[[], None]) -> Weights:
        """The weights after an update; ``pump`` is called as before."""

    def report(self) -> None:
        """What the controller does at the end of an iteration."""


@dataclass
class Marks:
    """When things were over, in seconds of the clock."""

    begun: list[float] = field(default_factory=list)
    gathered: list[float] = field(default_factory=list)
    updated: list[float] = field(default_factory=list)
    published: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Cycle:
    """One run. ``staleness``: of all consumed groups, an iteration each."""

    feed: Feed
    marks: Marks
    staleness: list[list[int]]

    def run(
        self,
        learner: Learner,
        weights: Weights,
        clock: Callable[[], float],
        *,
        iterations: int,
        on_iteration: Callable[[], None] = lambda: None,
    ) -> None:
        """So many iterations of the run, from its first, beginning with these weights of version 0. ``on_iteration`` is
        called before each and after the last."""
        config, ledger, marks = self.feed.config, self.feed.replay.ledger, self.marks
        for iteration in range(iterations):
            on_iteration()
            marks.begun.append(clock())
            self.feed.issue_through(iteration + config.rollout.max_staleness)
            items = self.feed.gather(iteration, weights)
            marks.gathered.append(clock())
            self.feed.learned_from(iteration, items)
            held = weights

            def pump(held: Weights = held) -> None:
                self.feed.pump(held, timeout_s=0.0)

            learner.update(items, pump)
            marks.updated.append(clock())
            weights = learner.publish(iteration + 1, pump)
            self.feed.replay.commit(items, held.version)
            marks.published.append(clock())
            self.feed.issue_through(iteration + 1 + config.rollout.max_staleness)
            self.feed.pump(weights, timeout_s=0.0)
            learner.report()
            self.staleness.append([item.staleness for item in items])
        on_iteration()
        counts = ledger.counts()
        assert counts["consumed"] == sum(map(len, self.staleness)), f"groups went astray: {counts}"


def make_cycle(
    config: RunConfig,
    pool: RolloutPool,
    make_replay: Callable[[Ledger], ReplayBuffer],
    clock: Callable[[], float],
    on_fault: OnFault,
) -> Cycle:
    """The feed of a run over this pool, as the controller makes it."""
    rollout = config.rollout
    supply = Supply(rollout.prompts_per_iteration, config.objective.phases())
    ledger = Ledger(
        capacity=max(rollout.buffer_size, supply.largest),
        groups_per_lease=rollout.groups_per_lease,
        max_staleness=rollout.max_staleness,
        clock=clock,
    )
    problems = [Problem(f"stand-in {number}", {}) for number in range(PROBLEMS)]
    feed = Feed(config, problems, pool, make_replay(ledger), supply, on_fault=on_fault, stop=lambda: False)
    return Cycle(feed, Marks(), [])
