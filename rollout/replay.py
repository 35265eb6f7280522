"""The replay buffer: the ledger of prompt groups, and the references to the groups that are drawn.

It lives in the controller, which thereby keeps the objects alive: the actors *return* groups and never ``ray.put``
them, so a finished group survives the actor that drew it. A group on a lost node is gone all the same; ``lost`` has it
drawn again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.experimental.locations import get_local_object_locations

from rollout.ledger import Ledger
from rollout.messages import GroupRef, GroupReport, LeaseReport
from rollout.waits import bounded_get


@dataclass(frozen=True)
class ReplayItem:
    """A drawn group on its way to the learner."""

    group_id: int
    ref: GroupRef
    policy_version: int
    staleness: int
    report: GroupReport


class ReplayBuffer:
    """The drawn groups of a run. Planning, leasing and what state a group is in are the ledger's business."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._drawn: dict[int, tuple[GroupRef, GroupReport]] = {}

    def deliver(self, report: LeaseReport, refs: Sequence[GroupRef]) -> list[int]:
        """Take in a lease's groups; the ids of those that became ready.

        Empty when the lease was no longer live. Groups with a reward that can't be used are dropped, with the report's
        reason, and are not among the ids.
        """
        ready = []
        accepted = set(self.ledger.deliver(report.lease_id))
        for group, ref in zip(report.groups, refs, strict=True):
            if group.group_id not in accepted:
                continue
            if group.invalid is not None:
                self.ledger.drop(group.group_id, group.invalid)
                self._drawn.pop(group.group_id, None)  # an older, too stale drawing of it
            else:
                self._drawn[group.group_id] = (ref, group)
                ready.append(group.group_id)
        return ready

    def take(self, iteration: int, version: int) -> list[ReplayItem]:
        """The iteration's ready groups by group id, for the learner at ``version``.

        They stay in the buffer until ``commit``. Groups too stale for this version are sent back to be drawn again;
        then ``ledger.complete`` is false, and the caller has to wait once more.
        """
        items = []
        for group in self.ledger.ready(iteration, version):
            ref, report = self._drawn[group.group_id]
            staleness = version - group.policy_version
            items.append(ReplayItem(group.group_id, ref, group.policy_version, staleness, report))
        return items

    def find_lost(self, refs: Mapping[int, GroupRef], *, timeout_s: float) -> list[int]:
        """Ids of the groups that can't be had any more. Brings their outlines to this node, and no whole group.

        Raises:
            WaitTimeout: an object neither came nor was reported lost within ``timeout_s`` seconds.
        """
        far = _elsewhere([ref.whole for ref in refs.values()])
        # An outline was made where its group lies, so that what became of that node is found out by it. What Ray knows
        # to be lost has an error here in its place.
        asked = {group_id: {ref.outline} | ({ref.whole} - far) for group_id, ref in refs.items()}
        try:
            objects = [each for of_group in asked.values() for each in of_group]
            bounded_get(objects, who=f"groups {list(refs)} in the object store", timeout_s=timeout_s)
            return []
        except ray.exceptions.ObjectLostError:
            gone = []  # one question for all of them is cheaper, and doesn't say which it was
        for group_id, of_group in asked.items():
            try:
                bounded_get([*of_group], who=f"group {group_id} in the object store", timeout_s=timeout_s)
            except ray.exceptions.ObjectLostError:
                gone.append(group_id)
        return gone

    def lost(self, group_ids: Sequence[int]) -> None:
        """The objects of these ready groups are gone: have them drawn again."""
        for group_id in group_ids:
            self.ledger.lost(group_id)
            del self._drawn[group_id]

    def commit(self, items: Sequence[ReplayItem], version: int) -> None:
        """The learner has used these groups; their objects are let go."""
        self.ledger.commit([item.group_id for item in items], version)
        for item in items:
            del self._drawn[item.group_id]


def _elsewhere(refs: Sequence[ray.ObjectRef[Any]]) -> set[ray.ObjectRef[Any]]:
    """Those of them, which this process owns, that have a place on other nodes and none on this one."""
    here = ray.get_runtime_context().get_node_id()
    places = {ref: found["node_ids"] for ref, found in get_local_object_locations(list(refs)).items()}
    return {ref for ref, nodes in places.items() if nodes and here not in nodes}
