"""The pulse of a worker's process: whether it still answers while it works, or while it has nothing to do.

A worker answers ``ping`` in a thread of its own, so that work doesn't keep it from answering. A process that was
stopped, or whose Python holds the interpreter lock, does not answer; nor does one that is cut off. How long its work
may take is bounded elsewhere (leases, evaluations, updates).
"""

import time
from typing import Any, Literal, NamedTuple

import ray

from rewards.errors import first_line
from rollout.waits import bounded_get, bounded_wait

_GROUP = "pulse"
_SHARE = 8
"""How often a worker is asked within its limit."""


def with_pulse(worker: type[Any]) -> Any:
    """The Ray actor class of a class that has a method ``ping``, which returns at once."""
    remote: Any = ray.remote  # its stub doesn't know of concurrency groups
    return remote(concurrency_groups={_GROUP: 1})(worker)


class Trouble(NamedTuple):
    """A sentence, the cause, and for how many seconds the process has been silent."""

    text: str
    cause: Literal["died", "hung"]
    silent_s: float = 0.0


class Pulse:
    """Of one process. Nothing here waits.

    Args:
        handle: of an actor whose class is ``with_pulse``.
        limit_s: seconds that a question may stay without an answer.
    """

    def __init__(self, handle: Any, limit_s: float) -> None:
        self._handle, self._limit_s = handle, limit_s
        self._asked_at = time.monotonic()
        self._question: ray.ObjectRef[Any] | None = None
        self.ended: str | None = None
        """What Ray said in place of the newest answer: the process is dead."""

    def silent_s(self) -> float:
        """Seconds for which the newest question has been without an answer; 0 when there is none. Asks the next one
        when it is due. A process that is dead is not silent, but has ``ended``."""
        now = time.monotonic()
        if self._question is not None:
            done, _ = bounded_wait([self._question], who="a worker's pulse", timeout_s=0.0)
            if not done:
                return now - self._asked_at
            try:
                bounded_get(self._question, who="a worker's pulse", timeout_s=self._limit_s)
            except ray.exceptions.RayActorError as error:
                self.ended = first_line(error)
            self._question = None
        if now - self._asked_at >= self._limit_s / _SHARE:
            self._asked_at = now
            self._question = self._handle.ping.options(concurrency_group=_GROUP).remote()
        return 0.0

    def trouble(self, who: str) -> Trouble | None:
        """What is wrong with the process, which the sentence calls ``who``; None: it answers."""
        silent_s = self.silent_s()
        if self.ended is not None:
            return Trouble(f"{who} was lost: {self.ended}", "died")
        if silent_s > self._limit_s:
            text = f"{who} hangs: it has not answered for {silent_s:.0f} s (timeouts.heartbeat)"
            return Trouble(text, "hung", silent_s)
        return None
