"""The supply: which groups an iteration draws, and which it learns from.

On the policy that is the same: an iteration's own groups. A method that learns in phases learns from a buffer: an
iteration that begins a phase draws all of its groups, and each later one the next few, which replace the oldest.
"""

from collections.abc import Mapping, Sequence

from learner.settings.objective import Phases
from rollout.messages import GroupRef, put_group
from rollout.replay import ReplayItem
from rollout.trajectory import TrajectoryGroup


class Supply:
    """The groups that are learned from, by group id.

    Args:
        prompts: groups that an iteration draws, where it doesn't begin a phase.
        phases: None where the method learns on the policy.
    """

    def __init__(self, prompts: int, phases: Phases | None) -> None:
        self._prompts, self._phases = prompts, phases
        self.held: Mapping[int, GroupRef] = {}
        """What the newest iteration learned from, and the next one may; ascending."""

    @property
    def largest(self) -> int:
        """Groups that one iteration draws, at most."""
        return self._prompts if self._phases is None else self._phases.prompts

    def group_ids(self, iteration: int) -> range:
        """The groups that an iteration draws."""
        phases, n = self._phases, self._prompts
        if phases is None:
            return range(iteration * n, (iteration + 1) * n)
        within = iteration - phases.begin(iteration)
        of_a_phase = phases.prompts + (phases.iterations - 1) * n
        first = phases.of(iteration) * of_a_phase + (phases.prompts + (within - 1) * n if within else 0)
        return range(first, first + (n if within else phases.prompts))

    def take_in(self, iteration: int, items: Sequence[ReplayItem]) -> Sequence[GroupRef]:
        """The groups that an iteration learns from, by ascending group id, now that its own are there."""
        begins = self._phases is None or self._phases.begin(iteration) == iteration
        kept = {} if begins else dict(self.held)
        kept |= {item.group_id: item.ref for item in items}
        self.held = {group_id: kept[group_id] for group_id in sorted(kept)[-self.largest :]}
        return list(self.held.values())

    def restore(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Hold what a checkpoint held."""
        self.held = {group.group_id: put_group(group) for group in groups}

    def let_go(self, group_ids: Sequence[int]) -> None:
        """The objects of these groups are gone."""
        self.held = {group_id: ref for group_id, ref in self.held.items() if group_id not in group_ids}
