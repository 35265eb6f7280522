"""What controller and actors send each other beside leases and trajectories: weights one way, reports the other.

Small values: what is large in them travels as a reference.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import ray

from rollout.trajectory import TrajectoryGroup, arrays_of, outline


class GroupRef(NamedTuple):
    """Where a drawn group lies."""

    whole: ray.ObjectRef[TrajectoryGroup]
    outline: ray.ObjectRef[TrajectoryGroup]
    """What ``trajectory.outline`` makes of it; the same object where nothing was truncated."""


def put_group(group: TrajectoryGroup) -> GroupRef:
    """Put a group that was read from a file."""
    whole = ray.put(group)
    return GroupRef(whole, ray.put(outline(group)) if group.sampler.truncates else whole)


class Weights(NamedTuple):
    """A published version of the policy. refs holds the reference to its AdapterState; it is a list because Ray would
    resolve a bare reference before every call, also when the actor has these weights already."""

    version: int
    digest: str
    refs: list[ray.ObjectRef[Any]]


BASE_WEIGHTS = Weights(-1, "", [])
"""The base without an adapter."""


@dataclass(frozen=True)
class GradingFault:
    """What failed over a completion's verdict, and how: a grader's process died or hung, the task or the judge that it
    asked failed, or gave no reward that can be used. error: the reason in full. graded: another grader gave the verdict
    in the end. A verdict that graders died or hung over counts as wrong; with the others its group is dropped."""

    part: Literal["grader", "judge"]
    cause: Literal["died", "hung", "failed", "invalid"]
    error: str
    graded: bool = False


@dataclass(frozen=True)
class GroupReport:
    """What the controller must know of a drawn group without fetching it. tokens: drawn ones. steps: denoising steps of
    its completions, all together. failures: verdicts, of ``verdicts``, that graders died or hung over. invalid: the
    kind of failure for which the group can't be trained on, or None. faults: one at most of each verdict. digest: the
    group's ``content_digest``."""

    group_id: int
    problem_id: str
    tokens: int
    steps: int
    verdicts: int
    failures: int
    invalid: str | None
    faults: tuple[GradingFault, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class LeaseReport:
    """What a lease took and gave; groups in the lease's order. Times in seconds."""

    lease_id: int
    actor_id: str
    policy_version: int
    adapter_digest: str
    groups: tuple[GroupReport, ...]
    load_s: float
    """For fetching and loading the weights."""
    generate_s: float
    grade_wait_s: float
    """For the verdicts that were still out when all completions were drawn."""
    usage: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the actor's process uses, see ``rollout.usage``."""


@dataclass(frozen=True)
class EvalResult:
    """The completions of one problem in the order of their rows: texts, verdicts, reward components (NaN where the
    grader gave none), drawn tokens and forward passes. faults: one at most of each verdict."""

    problem_id: str
    completions: tuple[str, ...]
    correct: tuple[bool, ...]
    components: Mapping[str, tuple[float, ...]]
    tokens: tuple[int, ...]
    nfe: tuple[int, ...]
    faults: tuple[GradingFault, ...] = ()
    trajectory: TrajectoryGroup | None = None
    """How they were written, graded, with the problem's number in its chunk for a group id; where it was asked for."""

    @property
    def grader_failures(self) -> int:
        """Verdicts that nobody gave."""
        return sum(not fault.graded for fault in self.faults)


@dataclass(frozen=True)
class EvalReport:
    """A chunk's results, in the order of its problems. generate_s: seconds that the engine took for all of them."""

    results: list[EvalResult]
    generate_s: float


def content_digest(group: TrajectoryGroup) -> str:
    """SHA-256 of all that was drawn and graded, by field: who did it and what it took aside."""
    told = {
        f.name: getattr(group, f.name)
        for f in dataclasses.fields(group)
        if f.name not in ("actor_id", "counters") and not isinstance(getattr(group, f.name), np.ndarray)
    }
    found = hashlib.sha256(repr(told).encode())
    for name, array in arrays_of(group).items():
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
