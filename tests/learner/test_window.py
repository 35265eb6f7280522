"""The supply: which groups an iteration draws, and which it learns from."""

from typing import Any

import pytest

from learner.settings.objective import Phases
from learner.supply.window import Supply
from rollout.replay import ReplayItem

PHASES = Phases(iterations=3, prompts=5, decay=None)


def items(group_ids: range, lost: set[int] = frozenset()) -> list[ReplayItem]:  # type: ignore[assignment]
    report: Any = None
    return [ReplayItem(g, f"ref {g}", 0, 0, report) for g in group_ids if g not in lost]  # type: ignore[arg-type]


def test_on_the_policy_an_iteration_learns_from_its_own_groups():
    supply = Supply(4, None)
    for iteration in range(3):
        ids = supply.group_ids(iteration)
        assert ids == range(4 * iteration, 4 * iteration + 4)
        assert list(supply.take_in(iteration, items(ids))) == [f"ref {g}" for g in ids]


def test_a_phase_begins_with_a_whole_buffer_whose_oldest_groups_are_replaced():
    supply = Supply(2, PHASES)
    drawn = [supply.group_ids(iteration) for iteration in range(7)]
    assert [len(ids) for ids in drawn] == [5, 2, 2, 5, 2, 2, 5]
    assert [g for ids in drawn for g in ids] == list(range(sum(map(len, drawn)))), "ids grow without a gap"
    held = []
    for iteration, ids in enumerate(drawn):
        supply.take_in(iteration, items(ids))
        held.append(list(supply.held))
    assert held[:3] == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8]]
    assert held[3] == [9, 10, 11, 12, 13], "nothing of the phase before is left"
    assert supply.largest == 5


def test_taking_the_same_groups_in_again_changes_nothing():
    """An iteration that was interrupted is begun anew."""
    supply = Supply(2, PHASES)
    for iteration in range(2):
        supply.take_in(iteration, items(supply.group_ids(iteration)))
    before = dict(supply.held)
    supply.take_in(1, items(supply.group_ids(1)))
    assert supply.held == before


def test_dropped_and_lost_groups_leave_a_smaller_buffer():
    supply = Supply(2, PHASES)
    supply.take_in(0, items(supply.group_ids(0), lost={3}))
    assert list(supply.held) == [0, 1, 2, 4]
    supply.let_go([1, 4])
    assert list(supply.take_in(1, items(supply.group_ids(1)))) == ["ref 0", "ref 2", "ref 5", "ref 6"]


@pytest.mark.parametrize(("iteration", "phase", "begin"), [(0, 0, 0), (2, 0, 0), (3, 1, 3), (8, 2, 6)])
def test_phases_are_counted_in_iterations(iteration, phase, begin):
    assert (PHASES.of(iteration), PHASES.begin(iteration)) == (phase, begin)
