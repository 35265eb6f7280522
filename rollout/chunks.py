"""Groups of the ledger and the chunks that they are leased in.

The table of chunks is made so that a transition costs as much with ten thousand leases as with ten.
"""

import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from rollout.trajectory import GroupSpec

Status = Literal["pending", "leased", "ready", "consumed", "dropped"]
STATUSES: tuple[Status, ...] = ("pending", "leased", "ready", "consumed", "dropped")


@dataclass(eq=False)
class Group:
    """A group that was issued."""

    spec: GroupSpec
    status: Status = "pending"
    policy_version: int = -1
    chunk: "Chunk" = field(init=False, repr=False)

    @property
    def finished(self) -> bool:
        return self.status in ("consumed", "dropped")

    @property
    def open(self) -> bool:
        return self.status in ("pending", "leased")


@dataclass(eq=False)
class Chunk:
    """Groups that are leased together."""

    iteration: int
    groups: list[Group]
    number: int = field(init=False)  # in plan order
    live: list[int] = field(default_factory=list)  # ids of its live leases
    times_leased: int = 0

    def has(self, status: Status) -> bool:
        return any(group.status == status for group in self.groups)


class Chunks:
    """Those that are not finished; iterating goes in plan order."""

    def __init__(self) -> None:
        self._added = 0
        self._iterations: dict[int, dict[int, Chunk]] = {}  # by number; both in plan order
        self._pending: list[int] = []  # a heap of numbers; who had a pending group may still be in it
        self._noted: dict[int, Chunk] = {}  # those in the heap

    def __iter__(self) -> Iterator[Chunk]:
        for chunks in self._iterations.values():
            yield from chunks.values()

    def __bool__(self) -> bool:
        return bool(self._iterations)

    def add(self, chunk: Chunk) -> None:
        """Later in plan order than all before it."""
        chunk.number = self._added
        self._added += 1
        self._iterations.setdefault(chunk.iteration, {})[chunk.number] = chunk
        if chunk.has("pending"):
            self.note_pending(chunk)

    def remove(self, chunk: Chunk) -> None:
        of_iteration = self._iterations[chunk.iteration]
        del of_iteration[chunk.number]
        if not of_iteration:
            del self._iterations[chunk.iteration]

    def of(self, iteration: int) -> Collection[Chunk]:
        """Those of an iteration, in plan order."""
        return self._iterations.get(iteration, {}).values()

    def note_pending(self, chunk: Chunk) -> None:
        """A group of this chunk became pending."""
        if chunk.number not in self._noted:
            self._noted[chunk.number] = chunk
            heapq.heappush(self._pending, chunk.number)

    def first_pending(self) -> Chunk | None:
        """The first chunk in plan order that has a pending group."""
        while self._pending:
            chunk = self._noted[self._pending[0]]
            if chunk.has("pending"):
                return chunk
            del self._noted[heapq.heappop(self._pending)]
        return None
