"""The prompt-group ledger: which groups are wanted, being drawn, drawn, or used.

Each group is in exactly one state, and ``issued = pending + leased + ready + consumed + dropped`` holds after every
transition:

    pending -> leased -> ready -> consumed          any of the first three -> dropped(reason)
    leased -> pending    its lease timed out or failed, and no other live lease holds it
    ready -> pending     its object was lost, or it is too stale to be used

What is computed together must be a function of the plan and never of timing. Groups are
therefore cut into *chunks* when they are issued, in plan order; a lease hands out one whole chunk, a repeated lease the
same chunk again, and a chunk may hold several live leases. A group counts as leased exactly while its chunk has a live
lease that will deliver it. When only some groups of a chunk must be drawn again, the whole chunk is drawn again and
the answers for the others are ignored.

No Ray and no threads in here; the clock is an argument.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rewards.errors import ConfigError
from rewards.task import Problem
from rollout.chunks import STATUSES, Chunk, Chunks, Group, Status
from rollout.trajectory import GroupSpec, Lease

EVENTS = ("relet", "second", "expired", "failed", "refused", "lost", "too_stale")


@dataclass(frozen=True)
class ReadyGroup:
    """A drawn group that may be consumed, and the version of the weights that drew it."""

    group_id: int
    policy_version: int


class Ledger:
    """The states of all groups of a run.

    Args:
        capacity: most groups that may be leased or ready at once; a full ledger stops leasing (backpressure).
        groups_per_lease: groups in a chunk; the last chunk of an iteration may be smaller.
        max_staleness: a group is consumed at learner version v only if ``v - policy_version <= max_staleness``. The
            version counts the iterations the learner has finished, so iteration i is consumed at version i.
        clock: seconds, monotonic.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        capacity: int,
        groups_per_lease: int,
        max_staleness: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if groups_per_lease < 1 or max_staleness < 0:
            raise ConfigError(
                f"groups per lease ({groups_per_lease}) must be at least 1, max_staleness ({max_staleness}) at least 0"
            )
        self.capacity = capacity
        self.groups_per_lease = groups_per_lease
        self.max_staleness = max_staleness
        self._clock = clock
        self._count: Counter[Status] = Counter()
        self._events: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._issued = 0
        self._last_group_id = -1
        self._last_iteration = -1
        self._next_lease_id = 0
        # Finished groups, chunks and iterations leave these tables, so their size follows what is in flight.
        self._groups: dict[int, Group] = {}
        self._chunks = Chunks()
        self._open: Counter[int] = Counter()  # iteration -> groups that are pending or leased
        self._leases: dict[int, _LiveLease] = {}  # oldest first
        self._deadlines: list[tuple[float, int]] = []  # a heap; of leases that were closed too, until they are over

    @property
    def last_iteration(self) -> int:
        """The newest iteration that was issued; -1 before the first."""
        return self._last_iteration

    def issue(self, iteration: int, specs: Sequence[GroupSpec]) -> None:
        """Plan all groups that ``iteration`` will consume, in this order. Group ids grow over the whole run.

        Raises:
            ConfigError: the iteration has more groups than the ledger's capacity, so it could never be complete.
        """
        assert iteration > self._last_iteration and specs, f"iteration {iteration} after {self._last_iteration}"
        self._require_room(len(specs))
        self._last_iteration = iteration
        for start in range(0, len(specs), self.groups_per_lease):
            groups = [Group(spec) for spec in specs[start : start + self.groups_per_lease]]
            self._add_chunk(Chunk(iteration, groups))
        self._check()

    def lease(self, *, policy_version: int, timeout_s: float) -> Lease | None:
        """Hand out the first chunk in plan order that has a pending group.

        None when nothing is pending, when the buffer is full, or when the chunk's iteration is more than
        ``max_staleness`` ahead of ``policy_version``, the newest version of the learner: its groups would be too stale
        by the time they are consumed. A later chunk is never handed out before an earlier one.
        """
        chunk = self._chunks.first_pending()
        if chunk is None or chunk.iteration > policy_version + self.max_staleness:
            return None
        wanted = [group for group in chunk.groups if group.status == "pending"]
        if self._count["leased"] + self._count["ready"] + len(wanted) > self.capacity:
            return None
        self._events["relet"] += chunk.times_leased > 0
        for group in wanted:
            self._move(group, "leased")
        return self._open_lease(chunk, policy_version, timeout_s)

    def second_lease(self, *, after_s: float, policy_version: int, timeout_s: float) -> Lease | None:
        """A straggler's second chance: lease the first chunk once more whose only live lease is older than ``after_s``.

        The first delivery counts. With ``max_staleness`` 0 both are drawn with the same weights, and are the same bit
        for bit; otherwise which weights deliver depends on timing.
        """
        now = self._clock()
        oldest = next(iter(self._leases.values()), None)
        if oldest is None or now - oldest.since < after_s:
            return None
        for chunk in self._chunks:
            live = chunk.live
            if len(live) == 1 and now - self._leases[live[0]].since >= after_s:
                self._events["second"] += 1
                return self._open_lease(chunk, policy_version, timeout_s)
        return None

    def deliver(self, lease_id: int) -> list[int]:
        """The lease's groups were drawn: ids of the groups that became ready.

        Closes all live leases of these groups. An empty list: the lease is no longer live, and its delivery is refused.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            self._events["refused"] += 1
            return []
        for other in list(lease.chunk.live):
            self._close_lease(other)
        accepted = [group for group in lease.chunk.groups if group.status == "leased"]
        for group in accepted:
            self._move(group, "ready")
            group.policy_version = lease.policy_version
        self._check()
        return [group.spec.group_id for group in accepted]

    def expire(self) -> list[int]:
        """Close the leases whose time is over and return their ids; see ``fail_lease`` for their groups."""
        now = self._clock()
        overdue = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, lease_id = heapq.heappop(self._deadlines)
            if lease_id in self._leases:
                self._events["expired"] += 1
                self._give_back(lease_id)
                overdue.append(lease_id)
        return overdue

    def fail_lease(self, lease_id: int) -> bool:
        """Close a lease whose actor died or whose delivery is not valid. False when it was not live any more.

        Its groups go back to pending whole, unless another live lease of theirs goes on.
        """
        if lease_id not in self._leases:
            return False
        self._events["failed"] += 1
        self._give_back(lease_id)
        return True

    def groups_under(self, lease_id: int) -> int:
        """Number of groups that a lease draws; 0 when it is not live any more."""
        lease = self._leases.get(lease_id)
        return 0 if lease is None else len(lease.chunk.groups)

    def lost(self, group_id: int) -> None:
        """A ready group's object is gone: it must be drawn again."""
        self._events["lost"] += 1
        self._redraw(self._groups[group_id])
        self._check()

    def drop(self, group_id: int, reason: str) -> None:
        """Give a group up for good. Drops are counted by reason, so the reason names a kind of failure."""
        group = self._groups[group_id]
        chunk = group.chunk
        self._move(group, "dropped")
        self._dropped[reason] += 1
        if not chunk.has("leased"):
            for lease_id in list(chunk.live):
                self._close_lease(lease_id)
        self._forget_if_done(chunk)
        self._check()

    def complete(self, iteration: int) -> bool:
        """True when no group of this iteration is pending or leased any more."""
        assert iteration <= self._last_iteration, f"iteration {iteration} was never issued"
        return self._open[iteration] == 0

    def ready(self, iteration: int, version: int) -> list[ReadyGroup]:
        """The iteration's ready groups by group id, for consumption at learner version ``version``.

        They stay ready until ``commit``, so a lost object can still be drawn again. Groups that are too stale for
        this version go back to pending and are left out.
        """
        found = []
        for group in [group for chunk in self._chunks.of(iteration) for group in chunk.groups]:
            if group.status != "ready":
                continue
            if version - group.policy_version > self.max_staleness:
                self._events["too_stale"] += 1
                self._redraw(group)
            else:
                found.append(ReadyGroup(group.spec.group_id, group.policy_version))
        self._check()
        return found

    def commit(self, group_ids: Sequence[int], version: int) -> None:
        """These ready groups were used by the learner at version ``version``."""
        for group_id in group_ids:
            group = self._groups[group_id]
            assert group.status == "ready", f"group {group_id} is {group.status}, only a ready group can be consumed"
            staleness = version - group.policy_version
            assert staleness <= self.max_staleness, f"group {group_id} is {staleness} versions old"
            self._move(group, "consumed")
            self._forget_if_done(group.chunk)
        self._check()

    def counts(self) -> dict[str, Any]:
        """``issued``, the number of groups by state, of recoveries by kind, and ``dropped_by_reason``."""
        by_state: dict[str, int] = {status: self._count[status] for status in STATUSES}
        events = {event: self._events[event] for event in EVENTS}
        return {"issued": self._issued, **by_state, **events, "dropped_by_reason": dict(self._dropped)}

    def state(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint. Finished chunks are in it as counts only."""
        return {
            "last_group_id": self._last_group_id,
            "last_iteration": self._last_iteration,
            "next_lease_id": self._next_lease_id,
            "events": dict(self._events),
            "dropped_by_reason": dict(self._dropped),
            "finished": {"consumed": self._finished("consumed"), "dropped": self._finished("dropped")},
            "chunks": [
                {
                    "iteration": chunk.iteration,
                    "groups": [
                        asdict(group.spec) | {"status": group.status if group.finished else "pending"}
                        for group in chunk.groups
                    ],
                }
                for chunk in self._chunks
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Fill a new ledger with a saved state. Objects die with their process, so what was leased or ready is pending.

        Chunks keep their composition, also when ``groups_per_lease`` has changed since.

        Raises:
            ConfigError: the buffer has become too small for a planned iteration.
        """
        assert self._issued == 0 and self._last_group_id == -1, "only a new ledger can take over a saved state"
        for chunk in state["chunks"]:
            groups = [_group_from_state(group) for group in chunk["groups"]]
            self._add_chunk(Chunk(chunk["iteration"], groups))
        for status in ("consumed", "dropped"):
            self._count[status] += state["finished"][status]
            self._issued += state["finished"][status]
        self._events.update(state["events"])
        self._dropped.update(state["dropped_by_reason"])
        for groups_left in self._open.values():
            self._require_room(groups_left)
        self._last_group_id = state["last_group_id"]
        self._last_iteration = state["last_iteration"]
        self._next_lease_id = state["next_lease_id"]
        self._check()

    def _require_room(self, groups: int) -> None:
        if groups > self.capacity:
            raise ConfigError(
                f"an iteration of {groups} groups does not fit a buffer of {self.capacity}; raise the buffer's size"
            )

    def _add_chunk(self, chunk: Chunk) -> None:
        for group in chunk.groups:
            group_id = group.spec.group_id
            assert group_id > self._last_group_id, f"group id {group_id} after {self._last_group_id}: ids must grow"
            self._last_group_id = group_id
            group.chunk = chunk
            self._groups[group_id] = group
            self._count[group.status] += 1
            self._open[chunk.iteration] += group.open
        self._issued += len(chunk.groups)
        self._chunks.add(chunk)

    def _open_lease(self, chunk: Chunk, policy_version: int, timeout_s: float) -> Lease:
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        now = self._clock()
        self._leases[lease_id] = _LiveLease(chunk, policy_version, since=now)
        heapq.heappush(self._deadlines, (now + timeout_s, lease_id))
        chunk.live.append(lease_id)
        chunk.times_leased += 1
        self._check()
        return Lease(lease_id, tuple(group.spec for group in chunk.groups))

    def _close_lease(self, lease_id: int) -> None:
        self._leases.pop(lease_id).chunk.live.remove(lease_id)

    def _give_back(self, lease_id: int) -> None:
        chunk = self._leases[lease_id].chunk
        self._close_lease(lease_id)
        if not chunk.live:
            for group in chunk.groups:
                if group.status == "leased":
                    self._move(group, "pending")
        self._check()

    def _redraw(self, group: Group) -> None:
        assert group.status == "ready", f"group {group.spec.group_id} is {group.status}, not ready"
        # A live lease of the chunk draws this group anyway.
        self._move(group, "leased" if group.chunk.live else "pending")

    def _move(self, group: Group, status: Status) -> None:
        assert not group.finished, f"group {group.spec.group_id} is {group.status} for good"
        self._count[group.status] -= 1
        self._open[group.chunk.iteration] -= group.open
        group.status = status
        self._count[status] += 1
        self._open[group.chunk.iteration] += group.open
        if status == "pending":
            self._chunks.note_pending(group.chunk)

    def _forget_if_done(self, chunk: Chunk) -> None:
        if all(group.finished for group in chunk.groups):
            for group in chunk.groups:
                del self._groups[group.spec.group_id]
            self._chunks.remove(chunk)
            if not self._chunks.of(chunk.iteration):
                del self._open[chunk.iteration]

    def _finished(self, status: Status) -> int:
        return self._count[status] - sum(group.status == status for group in self._groups.values())

    def _check(self) -> None:
        """Conservation, from the running counts: cheap enough for every transition."""
        total = sum(self._count[status] for status in STATUSES)
        assert total == self._issued, f"{self._issued} groups issued but {total} accounted for: {dict(self._count)}"
        assert min(self._count[status] for status in STATUSES) >= 0, f"negative count: {dict(self._count)}"
        assert sum(self._dropped.values()) == self._count["dropped"], "drops and their reasons differ"


@dataclass(frozen=True, eq=False)
class _LiveLease:
    chunk: Chunk
    policy_version: int
    since: float


def _group_from_state(saved: dict[str, Any]) -> Group:
    problem = Problem(**saved["problem"])
    return Group(GroupSpec(saved["group_id"], problem, saved["size"], saved["seed"]), saved["status"])
