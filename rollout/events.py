"""What a pool of rollout actors reports: deliveries, what was refused of them, and actors that were lost."""

from dataclasses import dataclass
from typing import Literal

import ray

from rewards.errors import ConfigError, DataError, RayLost, WeightMismatch
from rollout.messages import GroupRef, LeaseReport

FATAL = (ConfigError, DataError, WeightMismatch, RayLost)
"""What an actor's task may fail by so that repeating it would end the same way."""

Cause = Literal["died", "hung", "late", "preempted", "invalid"]
"""Of the loss of an actor. hung: its process did not answer; late: what it was asked took too long; preempted: its node
goes; invalid: too much of what it delivered was refused."""


@dataclass(frozen=True)
class Delivery:
    """A lease's report, and where its trajectory groups lie, in the lease's order."""

    report: LeaseReport
    refs: list[GroupRef]


@dataclass(frozen=True)
class ActorLost:
    """An actor died, failed or was given up; lease_id is what it was working on, if anything. It has been replaced.

    silent_s: for how long it had not answered.
    """

    actor_id: str
    lease_id: int | None
    error: str
    cause: Cause = "died"
    silent_s: float = 0.0


@dataclass(frozen=True)
class Refused:
    """What an actor delivered is no good, for a reason; cause lost: it was gone before anybody had read it. lease_id
    is None for a chunk of an evaluation, which is repeated."""

    actor_id: str
    lease_id: int | None
    error: str
    cause: Literal["invalid", "lost"] = "invalid"


Event = Delivery | ActorLost | Refused


def sentence_of(error: Exception) -> str:
    """What an actor raised, or Ray says of its end."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"
