"""Where a completion's positions stand when its prompt has gaps (``rewards.infill``).

A completion has C positions, the sampler's ``completion_length``, whatever the gaps are. They take the gaps' tokens in
reading order, and blocks lie within a gap: with blocks shorter than C each gap begins a new one. Positions that are
left over, at the end of the last block of a gap or of the completion, don't exist: they stand nowhere in the text, are
never masked, drawn or scored.

Shapes: C completion positions, P prompt tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rollout.seeds import numpy_generator


class Gap(NamedTuple):
    """A gap of a prompt, in tokens."""

    before: int
    """Tokens of the prompt before it."""
    lengths: tuple[int, ...]
    """Of which each completion draws one, all alike."""


NOWHERE = -1
"""In the place of a position that a completion doesn't have."""


def positions_needed(gaps: Sequence[Gap], block_length: int, completion_length: int) -> int:
    """Completion positions that the gaps take at their longest."""
    return _ends([max(gap.lengths) for gap in gaps], block_length, completion_length)[-1]


def places(gaps: Sequence[Gap], block_length: int, completion_length: int, key: int) -> np.ndarray:
    """[C] int32, where in the text (prompt and completion together) each position of a completion stands; NOWHERE where
    it has none.

    Args:
        key: the completion's, which names its draw of lengths.
    """
    stream = numpy_generator(key, "gap lengths")
    lengths = [gap.lengths[int(stream.integers(len(gap.lengths)))] for gap in gaps]
    ends = _ends(lengths, block_length, completion_length)
    assert ends[-1] <= completion_length, f"gaps of {lengths} tokens in {completion_length} positions"
    place_C = np.full(completion_length, NOWHERE, np.int32)
    written = 0
    for gap, length, end in zip(gaps, lengths, ends, strict=True):
        place_C[end - length : end] = gap.before + written + np.arange(length)
        written += length
    return place_C


def ascending(places_GC: np.ndarray, prompt: int) -> bool:
    """Whether every completion has positions, and they ascend within the text that they make with so many tokens."""
    found = [place_C[place_C >= 0] for place_C in places_GC]
    return all(at.size and bool((np.diff(at) > 0).all()) and at[-1] < prompt + at.size for at in found)


def prompt_places(place_C: np.ndarray | None, prompt: int) -> np.ndarray:
    """[P] int64, where in the text each token of the prompt stands."""
    if place_C is None:
        return np.arange(prompt)
    free = np.ones(prompt + int((place_C >= 0).sum()), dtype=bool)
    free[place_C[place_C >= 0]] = False
    return np.flatnonzero(free)


def contents(place_C: np.ndarray) -> list[np.ndarray]:
    """The positions of each gap, ascending."""
    there = np.flatnonzero(place_C >= 0)
    return np.split(there, np.flatnonzero(np.diff(place_C[there]) != 1) + 1)


def _ends(lengths: Sequence[int], block_length: int, completion_length: int) -> list[int]:
    """The position behind each gap's last one."""
    ends: list[int] = []
    start = 0
    for length in lengths:
        ends.append(start + length)
        start = ends[-1] if block_length == completion_length else -(-ends[-1] // block_length) * block_length
    return ends
