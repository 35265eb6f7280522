"""The plan of an update on demonstrations: which sequences share a row, which rows share a forward, on which rank.

Sequences are packed by first-fit decreasing: the longest first, each into the first row that has room. The window is
the update's own examples, so packing never changes what an optimizer step learns from; a row numbers its sequences in
the attention mask (``rollout.models.layers``), and none sees another. Plan and batches are functions of the lengths
alone, so every rank computes the same for itself.

Shapes: Z rows of a forward, L tokens of its longest row, N masked tokens in all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.finetuning.noising import NoisedExample

Row = tuple[int, ...]
"""Indices of the sequences in a row, in order of place."""


@dataclass(frozen=True)
class PackedForward:
    """Rows computed together."""

    rows: tuple[Row, ...]
    live: bool = True
    """False marks a pad, which keeps ranks in step: its weights are 0."""


@dataclass(frozen=True)
class PackedPlan:
    """One optimizer step's work."""

    forwards: tuple[tuple[PackedForward, ...], ...]
    """[rank][forward]; every rank has the same number of forwards, at least one."""
    normaliser: float
    statistics: dict[str, float]
    """Figures of the whole update, the same on every rank."""
    credit: tuple[np.ndarray, ...] = ()
    """Of completions; demonstrations have none."""


@dataclass(frozen=True)
class TokenBatch:
    """A forward's input and targets. Per-token arrays are ordered by row, then by position."""

    input_ids: np.ndarray
    """[Z, L] int64, padded on the right."""
    attention_mask: np.ndarray | None
    """[Z, L] int64: 0 pad, otherwise the sequence's number in its row; None when each row is one whole sequence."""
    score_rows: np.ndarray
    """[N] int64, flat indices z*L + l of the masked tokens."""
    targets: np.ndarray
    """[N] int64."""
    weight: np.ndarray
    """[N] float64, of each token's negative log-likelihood before the update's normaliser."""


def plan_rows(
    sequences: Sequence[NoisedExample],
    *,
    capacity: int,
    packing: bool,
    by_example: bool,
    ranks: int,
    rows_per_forward: int,
) -> PackedPlan:
    """Pack, and deal the rows out: the longest first and to the ranks in turn, so that what runs at the same time has
    about the same length.

    Args:
        capacity: tokens of a row, at least those of the longest sequence.
        packing: False gives every sequence a row of its own.
        by_example: the normaliser counts examples, otherwise completion tokens.
    """
    lengths = [sequence.length for sequence in sequences]
    rows = first_fit_decreasing(lengths, capacity if packing else 0)
    rows.sort(key=lambda row: (-sum(lengths[i] for i in row), row))
    shares = [rows[rank::ranks] for rank in range(ranks)]
    count = max(1, math.ceil(len(shares[0]) / rows_per_forward))
    idle = PackedForward(((int(np.argmin(lengths)),),), live=False)
    forwards = tuple(
        tuple(
            PackedForward(tuple(share[start : start + rows_per_forward])) if share[start:] else idle
            for start in range(0, count * rows_per_forward, rows_per_forward)
        )
        for share in shares
    )
    completion = sum(sequence.completion_ids.size for sequence in sequences)
    grid = sum(_width(f, lengths) * len(f.rows) for share in forwards for f in share)
    return PackedPlan(
        forwards,
        normaliser=float(len(sequences) if by_example else completion),
        statistics={
            "examples": float(len(sequences)),
            "rows": float(len(rows)),
            "tokens": float(sum(lengths)),
            "completion_tokens": float(completion),
            "padding_share": 1 - sum(lengths) / grid,
            "eos_share": sum(sequence.eos for sequence in sequences) / completion,
        },
    )


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[Row]:
    """Indices by row; of equal lengths the first comes first. A sequence above ``capacity`` has a row of its own."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((row for row, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            rows.append([index])
            room.append(capacity - lengths[index])
        else:
            rows[place].append(index)
            room[place] -= lengths[index]
    return [tuple(row) for row in rows]


def build_tokens(
    forward: PackedForward, sequences: Sequence[NoisedExample], *, by_example: bool, mask_id: int, pad_id: int
) -> TokenBatch:
    """Materialise a forward. A forward in which nothing is masked scores one token with weight 0."""
    Z, L = len(forward.rows), _width(forward, [sequence.length for sequence in sequences])
    input_ZL = np.full((Z, L), pad_id, dtype=np.int64)
    number_ZL = np.zeros((Z, L), dtype=np.int64)
    rows, targets, weights = [], [], []
    for z, row in enumerate(forward.rows):
        start = 0
        for number, index in enumerate(row, start=1):
            sequence = sequences[index]
            P, end = sequence.prompt_ids.size, start + sequence.length
            assert P, "a completion without a prompt has no position before it"
            masked = np.flatnonzero(sequence.masked)
            input_ZL[z, start : start + P] = sequence.prompt_ids
            input_ZL[z, start + P : end] = np.where(sequence.masked, mask_id, sequence.completion_ids)
            number_ZL[z, start:end] = number
            rows.append(z * L + start + P + masked)
            targets.append(sequence.completion_ids[masked])
            divisor = sequence.completion_ids.size if by_example else 1
            weights.append(np.full(masked.size, sequence.weight / divisor if forward.live else 0.0))
            start = end
    if not sum(map(len, rows)):
        first = sequences[forward.rows[0][0]]
        rows, targets, weights = [np.array([first.prompt_ids.size])], [first.completion_ids[:1]], [np.zeros(1)]
    return TokenBatch(
        input_ids=input_ZL,
        attention_mask=None if (number_ZL == 1).all() else number_ZL,
        score_rows=np.concatenate(rows).astype(np.int64),
        targets=np.concatenate(targets).astype(np.int64),
        weight=np.concatenate(weights),
    )


def _width(forward: PackedForward, lengths: Sequence[int]) -> int:
    return max(sum(lengths[i] for i in row) for row in forward.rows)
