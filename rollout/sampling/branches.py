"""Branches of a completion in the making: recorded states whose masked positions are all filled at once.

They need no forward of their own. A step of the loop that leaves a branched state also asks the head for fills of all
masked positions of the row.

Shapes: S branched states, Z fills of a state, C completion positions, m steps, B masked positions of a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rollout.sampling.head import Filled
from rollout.seeds import derive_seed, numpy_generator
from rollout.trajectory import BranchSpec, GreedyBranches, SamplerSpec


@dataclass(frozen=True)
class Branches:
    """Of one completion; arrays as in ``TrajectoryGroup``, without the leading G."""

    step: np.ndarray
    ids: np.ndarray
    logp: np.ndarray | None

    @property
    def found_ids(self) -> np.ndarray:
        """[F, C] int32, the fills of the states that there were, in their order."""
        return self.ids[self.step >= 0].reshape(-1, self.ids.shape[-1])


class Written(Protocol):
    """What is known of a finished completion, as ``rollout.sampling.denoise.Completion`` has it."""

    ids: np.ndarray
    unmask_step: np.ndarray
    drawn: np.ndarray
    entropy: np.ndarray


class Branching(Protocol):
    """Makes the branches of one completion while it is written."""

    keys: tuple[int, ...]
    """as ``Fill.keys``"""

    def wants(self, step: int) -> bool:
        """Whether the state before this step may be a branched one."""

    def take(self, step: int, filled: Filled) -> None:
        """The fills of all masked positions of the state before ``step``."""

    def finish(self, written: Written) -> Branches:
        """The branches of the finished completion."""


def branching(spec: BranchSpec, sampler: SamplerSpec, key: int, *, eos: tuple[int, ...]) -> Branching:
    """For the completion whose noise ``key`` names."""
    if isinstance(spec, GreedyBranches):
        return _Greedy(spec, sampler, eos)
    assert sampler.temperature > 0, "drawn fills of a greedy rollout"
    return _Drawn(spec.fills, drawn_step(key, sampler.steps, spec.degree), key)


def drawn_step(key: int, steps: int, degree: float) -> int:
    """The step within which a drawn progress falls: t in [0, 1) with density (degree + 1) t**degree."""
    t = numpy_generator(key, "branched step").random() ** (1.0 / (degree + 1.0))
    return min(int(t * steps), steps - 1)


def highest_entropy_steps(
    unmask_step_GC: np.ndarray, drawn_GC: np.ndarray, entropy_GC: np.ndarray, *, states: int, last_G: np.ndarray
) -> np.ndarray:
    """The steps whose drawn tokens have the largest mean entropy, descending; of equal ones the earlier first.

    Args:
        last_G: [G] the last step of each completion that may be taken.

    Returns:
        [G, S] int16; -1 at the end where fewer steps than ``states`` drew anything.
    """
    G, m = len(unmask_step_GC), int(unmask_step_GC.max()) + 1
    rows, positions = np.nonzero(drawn_GC)
    steps = unmask_step_GC[rows, positions].astype(np.int64)
    count_Gm, sum_Gm = np.zeros((G, m)), np.zeros((G, m))
    np.add.at(count_Gm, (rows, steps), 1.0)
    np.add.at(sum_Gm, (rows, steps), entropy_GC[rows, positions].astype(np.float64))
    eligible_Gm = (count_Gm > 0) & (np.arange(m) <= last_G[:, None])
    mean_Gm = np.where(eligible_Gm, sum_Gm / np.maximum(count_Gm, 1.0), -np.inf)
    order_GS = np.argsort(-mean_Gm, axis=1, kind="stable")[:, :states]
    found_GS = np.full((G, states), -1, np.int16)
    found_GS[:, : order_GS.shape[1]] = np.where(np.take_along_axis(eligible_Gm, order_GS, axis=1), order_GS, -1)
    return found_GS


def even_steps(steps: int, states: int) -> np.ndarray:
    """[S] int64: S of the sampler's steps, evenly spaced, ascending, the first one among them."""
    assert states <= steps, f"{states} states of {steps} steps"
    return np.arange(states) * steps // states


def last_branch_step(
    ids_GC: np.ndarray, unmask_step_GC: np.ndarray, eos: Sequence[int], *, until_last_token: bool
) -> np.ndarray:
    """[G] int64, the last step that ``highest_entropy_steps`` may take: the one that revealed the last token other than
    EOS, where this is wanted and there is one."""
    end_G = unmask_step_GC.max(axis=1).astype(np.int64)
    if not until_last_token:
        return end_G
    last_G = np.where(~np.isin(ids_GC, eos), unmask_step_GC, -1).max(axis=1).astype(np.int64)
    return np.where(last_G < 0, end_G, last_G)


class _Greedy:
    """Which states have the largest entropy is known when all entropies are, so every step's fill is kept until then: C
    int32 at most."""

    keys: tuple[int, ...] = ()

    def __init__(self, spec: GreedyBranches, sampler: SamplerSpec, eos: tuple[int, ...]) -> None:
        self._spec, self._C, self._eos = spec, sampler.completion_length, eos
        self._even = even_steps(sampler.steps, spec.states).tolist() if spec.evenly else None
        self._fills: dict[int, np.ndarray] = {}

    def wants(self, step: int) -> bool:
        return self._even is None or step in self._even

    def take(self, step: int, filled: Filled) -> None:
        self._fills[step] = filled.ids_ZB[0]

    def finish(self, written: Written) -> Branches:
        step_S = self._steps(written)
        ids_SZC = np.zeros((self._spec.states, 1, self._C), np.int32)
        for s, step in enumerate(step_S[step_S >= 0]):
            ids_SZC[s, 0] = written.ids
            ids_SZC[s, 0, written.unmask_step >= step] = self._fills[step]
        return Branches(step_S, ids_SZC, None)

    def _steps(self, written: Written) -> np.ndarray:
        if self._even is not None:  # those that the completion didn't end before
            return np.array([step if step in self._fills else -1 for step in self._even], np.int16)
        steps_1C, ids_1C = written.unmask_step[None], written.ids[None]
        last_1 = last_branch_step(ids_1C, steps_1C, self._eos, until_last_token=self._spec.until_last_token)
        return highest_entropy_steps(
            steps_1C, written.drawn[None], written.entropy[None], states=self._spec.states, last_G=last_1
        )[0]


class _Drawn:
    """One step, known beforehand; each fill has noise of its own."""

    def __init__(self, fills: int, step: int, key: int) -> None:
        self._step = step
        self.keys = tuple(derive_seed(key, "fill", z) for z in range(fills))
        self._filled: Filled | None = None

    def wants(self, step: int) -> bool:
        return step == self._step

    def take(self, step: int, filled: Filled) -> None:
        self._filled = filled

    def finish(self, written: Written) -> Branches:
        Z, C = len(self.keys), written.ids.size
        ids_SZC, logp_SZC = np.zeros((1, Z, C), np.int32), np.zeros((1, Z, C), np.float32)
        if self._filled is None:  # the completion ended before the step
            return Branches(np.full(1, -1, np.int16), ids_SZC, logp_SZC)
        hidden_C = written.unmask_step >= self._step
        ids_SZC[0] = written.ids
        ids_SZC[0][:, hidden_C], logp_SZC[0][:, hidden_C] = self._filled.ids_ZB, self._filled.logp_ZB
        return Branches(np.full(1, self._step, np.int16), ids_SZC, logp_SZC)
