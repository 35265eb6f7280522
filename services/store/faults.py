"""Faults of a run: events of one kind, counted by what failed and how."""

from typing import Any, Literal, Protocol, get_args

FAULT = "fault"
"""The kind of their events. ``data`` holds ``part``, ``cause``, what the fault cost, and ``times`` where it is of
several."""

Part = Literal["actor", "grader", "judge", "delivery", "node", "rank", "controller", "ray", "objects"]
"""What failed. delivery: what an actor delivered; objects: drawn groups in the object store."""
Cause = Literal["died", "hung", "late", "invalid", "lost", "preempted", "failed"]
"""How: its process died; it doesn't answer; its work took too long; what it gave breaks its contract; it is gone, or
can't be reached; its node is drained; it raised."""


class OnFault(Protocol):
    """Is told of a fault, as ``learner.reporting.reporter.Reporter.fault`` is."""

    def __call__(self, part: Part, cause: Cause, text: str, **cost: Any) -> None: ...


PARTS: tuple[str, ...] = get_args(Part)
CAUSES: tuple[str, ...] = get_args(Cause)
