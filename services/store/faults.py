"""Faults of a run: events of one kind, counted by what failed and how."""

from typing import Literal, get_args

FAULT = "fault"
"""The kind of their events. ``data`` holds ``part``, ``cause``, and what the fault cost."""

Part = Literal["actor", "grader", "judge", "delivery", "node", "rank", "controller", "ray", "objects", "disk"]
"""What failed. delivery: what an actor delivered; objects: drawn groups in the object store."""
Cause = Literal["died", "hung", "late", "invalid", "lost", "preempted", "full", "failed"]
"""How: its process died; it doesn't answer; its work took too long; what it gave breaks its contract; it is gone, or
can't be reached; its node is drained; no room was left; it raised."""

PARTS: tuple[str, ...] = get_args(Part)
CAUSES: tuple[str, ...] = get_args(Cause)
