"""The prompt-group ledger: its transitions, and conservation under random sequences of faults."""

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from rewards.errors import ConfigError
from rewards.task import Problem
from rollout.ledger import STATUSES, Ledger
from rollout.trajectory import GroupSpec, Lease


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def specs(first: int, count: int) -> list[GroupSpec]:
    return [GroupSpec(i, Problem(f"p{i}", {"target": i}), 4, seed=1000 + i) for i in range(first, first + count)]


def new_ledger(clock: Clock | None = None, *, kind: type[Ledger] = Ledger, **changes: int) -> Ledger:
    settings = {"capacity": 8, "groups_per_lease": 2, "max_staleness": 0} | changes
    return kind(**settings, clock=clock or Clock())


def lease(ledger: Ledger, version: int = 0, timeout_s: float = 10.0) -> Lease:
    found = ledger.lease(policy_version=version, timeout_s=timeout_s)
    assert found is not None
    return found


def ids(found: Lease) -> list[int]:
    return [group.group_id for group in found.groups]


def test_life_of_an_iteration() -> None:
    ledger = new_ledger()
    ledger.issue(0, specs(0, 5))
    leases = [lease(ledger) for _ in range(3)]
    assert [ids(found) for found in leases] == [[0, 1], [2, 3], [4]]
    assert ledger.lease(policy_version=0, timeout_s=10.0) is None
    assert [ledger.deliver(leases[i].lease_id) for i in (2, 0, 1)] == [[4], [0, 1], [2, 3]]
    assert ledger.complete(0)
    ready = ledger.ready(0, 0)
    assert [group.group_id for group in ready] == [0, 1, 2, 3, 4]  # by id, not by arrival
    assert {group.policy_version for group in ready} == {0}
    assert ledger.counts()["ready"] == 5
    ledger.commit([0, 1, 2, 3, 4], 0)
    assert ledger.counts()["consumed"] == ledger.counts()["issued"] == 5
    assert not ledger._groups and not ledger._chunks and not ledger._open, "finished groups must not pile up"


def test_expired_lease_returns_whole_and_late_delivery_is_refused() -> None:
    clock = Clock()
    ledger = new_ledger(clock)
    ledger.issue(0, specs(0, 4))
    first = lease(ledger)
    clock.now = 9.9
    assert ledger.expire() == []
    clock.now = 10.0
    assert ledger.expire() == [first.lease_id]
    again = lease(ledger)
    assert again.groups == first.groups and again.lease_id != first.lease_id
    assert ledger.deliver(first.lease_id) == []
    assert ledger.deliver(again.lease_id) == [0, 1]
    assert ledger.deliver(again.lease_id) == []  # a duplicate
    counts = ledger.counts()
    assert (counts["expired"], counts["relet"], counts["refused"]) == (1, 1, 2)


def test_failed_lease_is_repeated_before_later_groups() -> None:
    ledger = new_ledger()
    ledger.issue(0, specs(0, 4))
    first = lease(ledger)
    assert ledger.fail_lease(first.lease_id)
    assert not ledger.fail_lease(first.lease_id)
    assert ids(lease(ledger)) == [0, 1]
    assert ids(lease(ledger)) == [2, 3]


def test_second_lease_and_first_delivery_wins() -> None:
    clock = Clock()
    ledger = new_ledger(clock)
    ledger.issue(0, specs(0, 4))
    slow = lease(ledger, timeout_s=100.0)
    assert ledger.second_lease(after_s=5.0, policy_version=0, timeout_s=100.0) is None
    clock.now = 5.0
    fast = ledger.second_lease(after_s=5.0, policy_version=0, timeout_s=100.0)
    assert fast is not None and fast.groups == slow.groups
    assert ledger.second_lease(after_s=0.0, policy_version=0, timeout_s=100.0) is None, "at most two at once"
    assert ledger.counts()["leased"] == 2
    assert ledger.deliver(fast.lease_id) == [0, 1]
    assert ledger.deliver(slow.lease_id) == []
    assert ledger.counts()["refused"] == 1


def test_one_of_two_leases_dies_the_other_goes_on() -> None:
    ledger = new_ledger()
    ledger.issue(0, specs(0, 2))
    first = lease(ledger)
    second = ledger.second_lease(after_s=0.0, policy_version=0, timeout_s=10.0)
    assert second is not None
    ledger.fail_lease(first.lease_id)
    assert ledger.counts()["leased"] == 2
    assert ledger.deliver(second.lease_id) == [0, 1]


def test_full_buffer_stops_leasing() -> None:
    ledger = new_ledger(capacity=4, max_staleness=5)
    for iteration in range(3):
        ledger.issue(iteration, specs(4 * iteration, 4))
    first, second = lease(ledger), lease(ledger)
    assert ledger.lease(policy_version=0, timeout_s=10.0) is None
    ledger.deliver(first.lease_id)
    ledger.deliver(second.lease_id)
    assert ledger.lease(policy_version=0, timeout_s=10.0) is None
    ledger.commit([0, 1, 2, 3], 0)
    assert ids(lease(ledger)) == [4, 5]
    assert ledger.counts()["dropped"] == 0


def test_a_lost_group_of_an_early_iteration_goes_before_a_later_iteration() -> None:
    """Or a buffer full of later groups would wait for the early one for ever."""
    ledger = new_ledger(capacity=6, max_staleness=5)
    ledger.issue(0, specs(0, 4))
    ledger.issue(1, specs(4, 4))
    for _ in range(3):
        ledger.deliver(lease(ledger).lease_id)
    ledger.lost(1)
    assert not ledger.complete(0)
    again = lease(ledger)
    assert ids(again) == [0, 1], "the whole chunk is repeated, so that the lost group is computed as before"
    assert ledger.deliver(again.lease_id) == [1], "group 0 keeps its first drawing"
    assert ledger.complete(0)


def test_lost_while_its_chunk_is_redrawn_joins_the_live_lease() -> None:
    ledger = new_ledger()
    ledger.issue(0, specs(0, 2))
    ledger.deliver(lease(ledger).lease_id)
    ledger.lost(0)
    again = lease(ledger)
    ledger.lost(1)
    assert ledger.counts()["leased"] == 2
    assert ledger.deliver(again.lease_id) == [0, 1]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_staleness_gate(max_staleness: int) -> None:
    ledger = new_ledger(capacity=100, groups_per_lease=1, max_staleness=max_staleness)
    for iteration in range(5):
        ledger.issue(iteration, specs(iteration, 1))
    for iteration in range(max_staleness + 1):
        ledger.deliver(lease(ledger, version=0).lease_id)
        assert ledger.complete(iteration)
    assert ledger.lease(policy_version=0, timeout_s=1.0) is None, "would be too stale when its turn comes"
    assert [ready.policy_version for ready in ledger.ready(max_staleness, max_staleness)] == [0]
    assert ids(lease(ledger, version=1)) == [max_staleness + 1]


def test_too_stale_groups_go_back_and_cannot_be_committed() -> None:
    ledger = new_ledger(max_staleness=1)
    ledger.issue(0, specs(0, 2))
    ledger.deliver(lease(ledger).lease_id)
    with pytest.raises(AssertionError, match="2 versions old"):
        ledger.commit([0], 2)
    assert ledger.ready(0, 2) == []
    assert ledger.counts()["too_stale"] == ledger.counts()["pending"] == 2
    assert not ledger.complete(0)


def test_dropping() -> None:
    ledger = new_ledger()
    ledger.issue(0, specs(0, 4))
    first = lease(ledger)
    ledger.drop(0, "reward is nan")
    assert ledger.deliver(first.lease_id) == [1]
    second = lease(ledger)
    ledger.drop(2, "reward is nan")
    ledger.drop(3, "prompt too long")
    assert ledger.deliver(second.lease_id) == [], "nothing of this lease is wanted any more"
    assert ledger.counts()["dropped_by_reason"] == {"reward is nan": 2, "prompt too long": 1}
    assert ledger.complete(0)
    with pytest.raises(KeyError):
        ledger.drop(3, "twice")


def test_settings_and_misuse() -> None:
    with pytest.raises(ConfigError, match="groups per lease"):
        new_ledger(groups_per_lease=0)
    with pytest.raises(ConfigError, match="iteration of 9 groups does not fit a buffer of 8"):
        new_ledger().issue(0, specs(0, 9))
    ledger = new_ledger()
    ledger.issue(0, specs(0, 2))
    with pytest.raises(AssertionError, match="never issued"):
        ledger.complete(1)
    with pytest.raises(AssertionError, match="ids must grow"):
        ledger.issue(1, specs(1, 2))
    with pytest.raises(AssertionError, match="only a ready group"):
        ledger.commit([0], 0)


def test_saved_state_puts_unfinished_groups_back() -> None:
    ledger = new_ledger(max_staleness=1)
    ledger.issue(0, specs(0, 4))
    ledger.issue(1, specs(4, 4))
    for _ in range(3):
        ledger.deliver(lease(ledger).lease_id)
    lease(ledger)
    ledger.commit([0, 1, 2], 0)
    ledger.drop(4, "reward is nan")
    state = json.loads(json.dumps(ledger.state()))
    assert len(state["chunks"]) == 3, "finished chunks are saved as a count"

    restored = new_ledger(max_staleness=1, groups_per_lease=4)
    restored.restore(state)
    counts = restored.counts()
    assert {status: counts[status] for status in STATUSES} == {
        "pending": 4,
        "leased": 0,
        "ready": 0,
        "consumed": 3,
        "dropped": 1,
    }
    assert counts["issued"] == 8 and counts["dropped_by_reason"] == {"reward is nan": 1}
    again = lease(restored, version=1)
    assert again.groups == tuple(specs(2, 2)), "chunks keep their composition"
    assert again.lease_id == 4
    assert restored.deliver(again.lease_id) == [3]
    assert restored.complete(0) and not restored.complete(1)
    restored.issue(2, specs(8, 2))
    with pytest.raises(ConfigError, match="does not fit"):
        new_ledger(capacity=2).restore(state)


class Model:
    """What each group's state must be, from what the ledger answered alone; the ledger is checked against it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.status: dict[int, str] = {}
        self.drops: Counter[str] = Counter()
        self.live: dict[int, list[int]] = {}  # live lease -> ids of its groups

    def check(self) -> None:
        counts = self.ledger.counts()
        assert counts["issued"] == len(self.status)
        assert counts["issued"] == sum(counts[status] for status in STATUSES), "conservation"
        expected = Counter(self.status.values())
        assert {status: counts[status] for status in STATUSES} == {status: expected[status] for status in STATUSES}
        assert counts["dropped_by_reason"] == dict(self.drops)
        assert counts["leased"] + counts["ready"] <= self.ledger.capacity
        held = {group_id for groups in self.live.values() for group_id in groups}
        for group_id, status in self.status.items():
            assert (status == "leased") <= (group_id in held), f"group {group_id} is leased to nobody"
            assert (status == "pending") <= (group_id not in held), f"group {group_id} waits, yet somebody draws it"
        for group in self.ledger._groups.values():
            assert group.status == self.status[group.spec.group_id]

    def close(self, lease_id: int) -> None:
        groups = self.live.pop(lease_id)
        for group_id in groups:
            alive = any(group_id in others for others in self.live.values())
            if self.status[group_id] == "leased" and not alive:
                self.status[group_id] = "pending"

    def redraw(self, group_id: int) -> None:
        alive = any(group_id in groups for groups in self.live.values())
        self.status[group_id] = "leased" if alive else "pending"


def random_life(kind: type[Ledger], seed: int, steps: int) -> Iterator[Model]:
    """Random deaths, timeouts, second leases, duplicates, losses and drops; yields after every step."""
    rng = np.random.default_rng(seed)
    clock = Clock()
    max_staleness = int(rng.integers(0, 4))
    ledger = new_ledger(
        clock,
        kind=kind,
        capacity=int(rng.integers(4, 12)),
        groups_per_lease=int(rng.integers(1, 4)),
        max_staleness=max_staleness,
    )
    model = Model(ledger)
    version = issued = next_id = 0
    closed: list[int] = []  # leases that are over: their deliveries are late
    for _ in range(steps):
        action = rng.choice(
            ["issue", "lease", "lease", "second", "deliver", "deliver", "fail", "tick", "late", "lost", "drop", "train"]
        )
        in_state = {s: [i for i, status in model.status.items() if status == s] for s in STATUSES}
        some_lease = int(rng.choice(list(model.live))) if model.live else None
        if action == "issue" and issued <= version + max_staleness:
            count = int(rng.integers(1, 5))
            ledger.issue(issued, specs(next_id, count))
            model.status.update(dict.fromkeys(range(next_id, next_id + count), "pending"))
            issued, next_id = issued + 1, next_id + count
        elif action in ("lease", "second"):
            timeout_s = float(rng.integers(1, 20))
            if action == "lease":
                found = ledger.lease(policy_version=version, timeout_s=timeout_s)
            else:
                found = ledger.second_lease(after_s=2.0, policy_version=version, timeout_s=timeout_s)
            if found is not None:
                model.live[found.lease_id] = ids(found)
                for group_id in ids(found):
                    if model.status[group_id] == "pending":
                        model.status[group_id] = "leased"
        elif action == "deliver" and some_lease is not None:
            wanted = [i for i in model.live[some_lease] if model.status[i] == "leased"]
            assert ledger.deliver(some_lease) == wanted
            model.status.update(dict.fromkeys(wanted, "ready"))
            same = [i for i, groups in model.live.items() if groups == model.live[some_lease]]
            for lease_id in same:
                del model.live[lease_id]
            closed += same
        elif action == "fail" and some_lease is not None:
            assert ledger.fail_lease(some_lease)
            model.close(some_lease)
            closed.append(some_lease)
        elif action == "tick":
            clock.now += float(rng.integers(1, 4))
            for lease_id in ledger.expire():
                model.close(lease_id)
                closed.append(lease_id)
        elif action == "late" and closed:
            assert ledger.deliver(int(rng.choice(closed))) == []
        elif action == "lost" and in_state["ready"]:
            group_id = int(rng.choice(in_state["ready"]))
            ledger.lost(group_id)
            model.redraw(group_id)
        elif action == "drop" and rng.random() < 0.3:
            group_id = int(rng.choice(in_state["pending"] + in_state["leased"] + in_state["ready"] or [-1]))
            if group_id >= 0:
                ledger.drop(group_id, f"reason {group_id % 2}")
                model.status[group_id] = "dropped"
                model.drops[f"reason {group_id % 2}"] += 1
                over = [i for i, gs in model.live.items() if all(model.status[g] != "leased" for g in gs)]
                for lease_id in over:
                    del model.live[lease_id]
                closed += over
        elif action == "train" and version < issued and ledger.complete(version):
            ready = ledger.ready(version, version)
            assert [group.group_id for group in ready] == sorted(group.group_id for group in ready)
            assert all(version - group.policy_version <= max_staleness for group in ready)
            ledger.commit([group.group_id for group in ready], version)
            model.status.update(dict.fromkeys([group.group_id for group in ready], "consumed"))
            version += 1
        yield model


@pytest.mark.parametrize("seed", range(30))
def test_conservation_under_random_faults(seed: int) -> None:
    for model in random_life(Ledger, seed, steps=400):
        model.check()
    counts = model.ledger.counts()
    assert counts["consumed"] > 0, "the sequence never got anywhere"
    restored = new_ledger(capacity=model.ledger.capacity)
    restored.restore(json.loads(json.dumps(model.ledger.state())))
    again = restored.counts()
    assert again["issued"] == counts["issued"] and again["consumed"] == counts["consumed"]
    assert again["pending"] == counts["pending"] + counts["leased"] + counts["ready"]


def test_random_lives_see_every_kind_of_fault() -> None:
    seen: Counter[str] = Counter()
    for seed in range(10):
        *_, last = random_life(Ledger, seed, steps=400)
        seen.update({name: count for name, count in last.ledger.counts().items() if isinstance(count, int)})
    for name in ("relet", "second", "expired", "failed", "refused", "lost", "consumed", "dropped"):
        assert seen[name] > 0, f"no {name} in any sequence"


class ForgetsFailedLeases(Ledger):
    """Control: a dead actor's groups stay leased to nobody."""

    def _give_back(self, lease_id: int) -> None:
        self._close_lease(lease_id)


class LosesCount(Ledger):
    """Control: a transition that leaves one counter behind."""

    def _move(self, group, status):
        super()._move(group, status)
        if status == "consumed":
            self._count["consumed"] -= 1


class TakesLateDeliveries(Ledger):
    """Control: groups that nobody leased become ready twice."""

    def deliver(self, lease_id: int) -> list[int]:
        return super().deliver(lease_id) or [0]


class LeasesBeyondCapacity(Ledger):
    """Control: no backpressure."""

    def lease(self, *, policy_version: int, timeout_s: float) -> Lease | None:
        capacity, self.capacity = self.capacity, 10**9
        try:
            return super().lease(policy_version=policy_version, timeout_s=timeout_s)
        finally:
            self.capacity = capacity


@pytest.mark.parametrize("broken", [ForgetsFailedLeases, LosesCount, TakesLateDeliveries, LeasesBeyondCapacity])
def test_broken_ledgers_are_caught(broken: type[Ledger]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(10):
            for model in random_life(broken, seed, steps=400):
                model.check()
