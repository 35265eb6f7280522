"""The feed: which prompts each iteration trains on, and the pump that keeps the rollout actors busy with them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from learner.runs.stopping import StopRequested
from learner.settings.run import RunConfig
from learner.supply.verdicts import Verdicts
from learner.supply.window import Supply
from rewards.errors import GradingFailed
from rewards.task import Problem
from rollout.events import ActorLost, Refused
from rollout.messages import GroupRef, GroupReport, Weights
from rollout.pool import RolloutPool
from rollout.replay import ReplayBuffer, ReplayItem
from rollout.seeds import derive_seed, numpy_generator
from rollout.trajectory import GroupSpec
from services.store.faults import OnFault


class Feed:
    """Issues groups, leases them to idle actors, takes in what they deliver, and hands out whole iterations.

    Nothing of it needs saving but the ledger: which prompts an iteration has is a function of the settings.

    Args:
        on_fault: called with what failed.
        stop: says whether the run was asked to stop.
        on_pump: called whenever work goes on, every second at least.
    """

    def __init__(
        self,
        config: RunConfig,
        problems: Sequence[Problem],
        pool: RolloutPool,
        replay: ReplayBuffer,
        supply: Supply,
        *,
        on_fault: OnFault,
        stop: Callable[[], bool],
        on_pump: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.problems, self.pool, self.replay, self.supply = config, problems, pool, replay, supply
        self.sampler = config.rollout.sampler.spec()
        self.branches = config.objective.branches(self.sampler)
        self._lease_seconds: list[dict[str, float]] = []
        self._on_fault, self._stop, self._on_pump = on_fault, stop, on_pump
        self.verdicts = Verdicts(on_fault)

    @property
    def grader_failures(self) -> int:
        """Verdicts that failed so far."""
        return self.verdicts.failed

    def issue_through(self, iteration: int) -> None:
        """Plan all iterations up to and including this one (from 0), as far as the run goes."""
        last = min(iteration, self.config.run.iterations - 1)
        for planned in range(self.replay.ledger.last_iteration + 1, last + 1):
            self.replay.ledger.issue(planned, self.specs(planned))

    def specs(self, iteration: int) -> list[GroupSpec]:
        """The iteration's groups: the next problems of a fresh shuffle per epoch."""
        group_ids, seed = self.supply.group_ids(iteration), self.config.run.seed
        orders = {epoch: self._order(epoch) for epoch in {group_id // len(self.problems) for group_id in group_ids}}
        return [
            GroupSpec(
                group_id=group_id,
                problem=self.problems[int(orders[group_id // len(self.problems)][group_id % len(self.problems)])],
                size=self.config.rollout.group_size,
                seed=derive_seed(seed, "rollout", group_id),
            )
            for group_id in group_ids
        ]

    def gather(self, iteration: int, weights: Weights) -> list[ReplayItem]:
        """Wait for all groups of an iteration, by ascending group id; their objects are on this node.

        Raises:
            StopRequested: the run was asked to stop.
            GradingFailed: when every group was dropped, or most verdicts failed.
        """
        version = weights.version
        while True:
            while not self.replay.ledger.complete(iteration):
                if self._stop():
                    raise StopRequested
                self.pump(weights, timeout_s=1.0)
            items = self.replay.take(iteration, version)
            refs = {item.group_id: item.ref for item in items}
            lost = self.replay.find_lost(refs, timeout_s=self.config.timeouts.publish)
            if lost:
                text = f"the objects of groups {lost} are gone; they are drawn again"
                self._on_fault("objects", "lost", text, groups=len(lost))
                self.replay.lost(lost)
            if self.replay.ledger.complete(iteration):
                break
        if not items:
            kinds = self.replay.ledger.counts()["dropped_by_reason"]
            told = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
            raise GradingFailed(f"iteration {iteration + 1} has no usable group left; dropped so far: {told}")
        reports = [item.report for item in items]
        self.verdicts.require_most(
            f"iteration {iteration + 1}",
            failed=sum(report.failures for report in reports),
            asked=sum(report.verdicts for report in reports),
        )
        return items

    def learned_from(self, iteration: int, items: Sequence[ReplayItem]) -> Sequence[GroupRef]:
        """The objects of the groups that the iteration learns from, by ascending group id, now that its own are there;
        as ``held`` has them."""
        refs = self.supply.take_in(iteration, items)
        return self.held() if len(refs) > len(items) else refs

    def held(self) -> Sequence[GroupRef]:
        """The objects of the groups in the buffer; those that are gone are told and left out."""
        lost = self.replay.find_lost(self.supply.held, timeout_s=self.config.timeouts.publish)
        if lost:
            text = f"the objects of groups {lost} are gone; the buffer is smaller now"
            self._on_fault("objects", "lost", text, groups=len(lost))
            self.supply.let_go(lost)
        return list(self.supply.held.values())

    def pump(self, weights: Weights, *, timeout_s: float) -> None:
        """Lease what may be leased, then take in what has happened, waiting at most ``timeout_s`` seconds for it."""
        self._on_pump()
        self._lease(weights)
        self.take_in(timeout_s=timeout_s)
        self._lease(weights)

    def take_in(self, *, timeout_s: float) -> None:
        """Take in what has happened, waiting at most ``timeout_s`` seconds for it, and lease nothing."""
        for lease_id in self.replay.ledger.expire():
            self.pool.kill_lease(lease_id)
        for event in self.pool.poll(timeout_s):
            if isinstance(event, ActorLost | Refused):
                self._take_fault(event)
                continue
            self.replay.deliver(event.report, event.refs)
            report = event.report
            self._lease_seconds.append(
                {"load": report.load_s, "generate": report.generate_s, "grade_wait": report.grade_wait_s}
            )
            for group in event.report.groups:
                self._take_grading(group)

    def tell_last_faults(self) -> None:
        """What the pool couldn't return any more, because it had to raise."""
        for event in self.pool.untold():
            if isinstance(event, ActorLost | Refused):
                self._take_fault(event)

    def _take_grading(self, group: GroupReport) -> None:
        """What failed over its verdicts; one without a reward was dropped for the first of them."""
        self.verdicts.note(fault for fault in group.faults if fault.cause in ("died", "hung"))
        if group.invalid is not None:
            why = next(fault for fault in group.faults if fault.cause not in ("died", "hung"))
            text = f"group {group.group_id} (problem {group.problem_id}) is dropped: {why.error}"
            self._on_fault(why.part, why.cause, text, groups=1)

    def _take_fault(self, event: ActorLost | Refused) -> None:
        """Its lease, if it had one that counts, is given out again."""
        cost: dict[str, Any] = {"actor_id": event.actor_id}
        text = event.error
        if event.lease_id is not None:
            groups = self.replay.ledger.groups_under(event.lease_id)
            self.replay.ledger.fail_lease(event.lease_id)
            cost |= {"lease_id": event.lease_id, "groups": groups}
            text += f"; lease {event.lease_id} is given out again"
        if isinstance(event, Refused):
            self._on_fault("delivery", event.cause, text, **cost)
        else:
            self._on_fault(
                "node" if event.cause == "preempted" else "actor", event.cause, text, **cost, silent_s=event.silent_s
            )

    def lease_seconds(self) -> dict[str, float]:
        """Mean seconds of a lease by stage, over those taken in since the last call; empty when there were none."""
        leases, self._lease_seconds = self._lease_seconds, []
        return {stage: sum(lease[stage] for lease in leases) / len(leases) for stage in (leases[0] if leases else ())}

    def _lease(self, weights: Weights) -> None:
        ledger, rollout, timeout_s = self.replay.ledger, self.config.rollout, self.config.timeouts.lease
        while self.pool.idle():
            lease = ledger.lease(policy_version=weights.version, timeout_s=timeout_s)
            if lease is None and rollout.second_lease_after_s is not None:
                lease = ledger.second_lease(
                    after_s=rollout.second_lease_after_s, policy_version=weights.version, timeout_s=timeout_s
                )
            if lease is None:
                return
            self.pool.submit(lease, self.sampler, weights, self.branches, limit_s=timeout_s)

    def _order(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.config.run.seed, "prompt order", epoch).permutation(len(self.problems))
