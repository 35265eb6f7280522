"""What actors deliver is looked at before it counts: the report by the controller, the groups where they lie.

Groups are big, and the controller has no need of them. So a task on the actor's node reads them, one at a time on each
node and for all deliveries that wait there, and answers in a few words. It also leaves the outlines of groups with
supports there, which are small enough for every rank to fetch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rewards.errors import RayLost, TrajectoryError, UnmaskError, first_line
from rollout.messages import GroupRef, LeaseReport, Weights, content_digest
from rollout.trajectory import Lease, SamplerSpec, TrajectoryGroup, outline
from rollout.waits import bounded_get, bounded_wait

LIMIT_S = 120.0
"""For one look, the start of its process included."""
_RETRIES = 2


@dataclass(eq=False)
class Arrival:
    """A delivery before it is known to be good."""

    report: LeaseReport
    refs: Sequence[ray.ObjectRef[Any]]
    lease: Lease
    sampler: SamplerSpec
    handle: Any
    """Of the actor that delivered it."""
    outlines: Sequence[ray.ObjectRef[Any]] = ()
    """Of its groups, made by the look; none where the sampler doesn't truncate."""
    problem: str | None = None
    """What is wrong with it, once it has been looked at."""
    lost: bool = False
    """Whether nobody could look at it."""

    @property
    def groups(self) -> list[GroupRef]:
        """Where its groups lie."""
        return [GroupRef(*each) for each in zip(self.refs, self.outlines or self.refs, strict=True)]


@dataclass(eq=False)
class _Look:
    node: str
    arrivals: list[Arrival]
    deadline: float = field(default_factory=lambda: time.monotonic() + LIMIT_S)


class Arrivals:
    """Those of a pool. Nothing here waits."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Arrival]] = {}
        self._looks: dict[ray.ObjectRef[Any], _Look] = {}

    def add(self, arrival: Arrival, node: str) -> None:
        """Have it looked at on the node where its groups lie."""
        self._waiting.setdefault(node, []).append(arrival)
        self._begin(node)

    @property
    def awaited(self) -> list[ray.ObjectRef[Any]]:
        return list(self._looks)

    def looked_at(self) -> list[Arrival]:
        """Those whose looks are over since the last call."""
        done, pending = bounded_wait(
            self.awaited, who="looks at deliveries", timeout_s=0.0, num_returns=len(self._looks)
        )
        found = []
        for ref in done:
            look = self._looks.pop(ref)
            try:
                for arrival, problem in zip(
                    look.arrivals, bounded_get(ref, who="a look", timeout_s=LIMIT_S), strict=True
                ):
                    arrival.problem = problem
            except RayLost:
                raise
            except (UnmaskError, ray.exceptions.RayError) as error:
                _not_seen(look, first_line(error))
            found += look.arrivals
            self._begin(look.node)
        for ref in pending:
            if time.monotonic() >= self._looks[ref].deadline:
                look = self._looks.pop(ref)
                ray.cancel(ref, force=True)
                _not_seen(look, f"nobody had read it within {LIMIT_S:g} s")
                found += look.arrivals
                self._begin(look.node)
        return found

    def _begin(self, node: str) -> None:
        if node not in self._waiting or any(look.node == node for look in self._looks.values()):
            return
        arrivals = self._waiting.pop(node)
        # Their process may be anywhere if the node is gone: then it finds nothing.
        strategy = NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT"
        remote: Any = ray.remote(look_at)
        outlined = [arrival for arrival in arrivals if arrival.sampler.truncates]
        count = sum(len(arrival.refs) for arrival in outlined)
        look = remote.options(num_cpus=0, num_returns=1 + count, max_retries=_RETRIES, scheduling_strategy=strategy)
        asked = [(arrival.report, arrival.lease, arrival.sampler) for arrival in arrivals]
        made = look.remote(asked, *(ref for arrival in arrivals for ref in arrival.refs))
        answer, *outlines = made if count else [made]
        for arrival in outlined:
            arrival.outlines, outlines = outlines[: len(arrival.refs)], outlines[len(arrival.refs) :]
        self._looks[answer] = _Look(node, arrivals)


def _not_seen(look: _Look, why: str) -> None:
    for arrival in look.arrivals:
        arrival.problem, arrival.lost = why, True


def report_problem(report: Any, lease: Lease, actor_id: str, weights: Weights) -> str | None:
    """What is wrong with a report, of a lease that was given to this actor with these weights."""
    if not isinstance(report, LeaseReport):
        return f"a {type(report).__name__} in place of a report"
    if (report.lease_id, report.actor_id) != (lease.lease_id, actor_id):
        return f"a report of lease {report.lease_id} by {report.actor_id}"
    if (report.policy_version, report.adapter_digest) != (weights.version, weights.digest):
        return (
            f"drawn with version {report.policy_version} ({report.adapter_digest[:12]}), given out was version "
            f"{weights.version} ({weights.digest[:12]})"
        )
    found, wanted = [group.group_id for group in report.groups], [spec.group_id for spec in lease.groups]
    if found != wanted:
        return f"groups {found}, asked for were {wanted}"
    for group in report.groups:
        if not (min(group.tokens, group.steps) >= 0 and 0 <= group.failures <= group.verdicts):
            numbers = f"{group.tokens} tokens, {group.steps} steps"
            return f"group {group.group_id} has {numbers}, {group.failures} of {group.verdicts} failed"
    return None


def look_at(asked: Sequence[tuple[LeaseReport, Lease, SamplerSpec]], *groups: Any) -> Any:
    """What is wrong with each delivery, whose groups follow one another, and after it, if there are any, the outlines
    of those that a truncating sampler drew (None of one that is none). Runs on the node where they lie."""
    found: list[str | None] = []
    outlines: list[TrajectoryGroup | None] = []
    left = iter(groups)
    for report, lease, sampler in asked:
        of_lease = [next(left) for _ in lease.groups]
        problems = [group_problem(group, report, number, lease, sampler) for number, group in enumerate(of_lease)]
        found.append(next((problem for problem in problems if problem is not None), None))
        if sampler.truncates:
            outlines += [outline(group) if isinstance(group, TrajectoryGroup) else None for group in of_lease]
    return (found, *outlines) if outlines else found


def group_problem(group: Any, report: LeaseReport, number: int, lease: Lease, sampler: SamplerSpec) -> str | None:
    """What is wrong with the group of this number in its lease: shapes, ranges, what was asked, rewards, digest."""
    spec, told = lease.groups[number], report.groups[number]
    if not isinstance(group, TrajectoryGroup):
        return f"a {type(group).__name__} in place of group {spec.group_id}"
    asked = (spec.group_id, spec.problem.id, spec.size, spec.seed, report.policy_version, report.adapter_digest)
    try:
        group.validate()
        drawn = (group.group_id, group.problem_id, group.size, group.seed, group.policy_version, group.adapter_digest)
        if drawn != asked or group.sampler != sampler:
            return f"group {spec.group_id} is another one than was asked for: {drawn}, {group.sampler}"
        if told.invalid is None and not np.isfinite(group.rewards).all():
            return f"group {spec.group_id} has a reward that is not a finite number"
        if content_digest(group) != told.digest:
            return f"group {spec.group_id} is not what its actor had hashed"
    except TrajectoryError as error:
        return str(error)
    except (TypeError, ValueError, AttributeError, IndexError) as error:  # fields of any kind
        return f"group {spec.group_id} can't be read: {type(error).__name__}: {first_line(error)}"
    return None
