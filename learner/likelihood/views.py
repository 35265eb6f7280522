"""Views: the model inputs that a likelihood is made of, and what is scored in each.

Every likelihood of a completion under a denoiser is a list of views (an input with some positions masked, the positions
that are scored in it, a weight) and a rule that adds them up. AGRPO's views are states that the rollout went through. A
``View`` is a few numbers; inputs exist for one forward at a time.

Shapes: Z views of a forward, L tokens of its longest view, N scored positions in all, M candidate positions in all,
C completion positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rollout.trajectory import TrajectoryGroup


class View(NamedTuple):
    """One trajectory state to score: what a completion looked like just before ``step``."""

    group: int
    """index into the update's list of groups"""
    row: int
    step: int
    advantage: float
    weight: float
    """Factor of every score in the view. 0 marks a pad, which keeps ranks in step and is left out of statistics."""
    draws: int = 1
    """How many draws of the step the weight stands for."""


@dataclass(frozen=True)
class PositionChoices:
    """The choice of positions in each view of a forward, where the rollout's rule makes it an action of the policy.

    Candidates are the positions that a step could have revealed: those of its block that were masked. They are ordered
    by view, then by position, and hold all scored positions.
    """

    candidate_rows: np.ndarray
    """[M] int64, flat indices z*L + l."""
    view_of_candidate: np.ndarray
    """[M] int64."""
    candidate_of_score: np.ndarray
    """[N] int64, which candidate each scored position is."""
    rank: np.ndarray
    """[N] int64, when the scored position was chosen within its step."""
    free: np.ndarray
    """[Z] bool, false where the step revealed all that was left, which is no choice."""
    logp: np.ndarray
    """[Z] float32, the rollout's log-prob of the choice; 0 where not free."""
    advantage: np.ndarray
    """[Z] float64."""
    weight: np.ndarray
    """[Z] float64."""
    temperature: float
    """tau of the rule."""
    confidence_temperature: float


@dataclass(frozen=True)
class ViewBatch:
    """The views of one forward, as arrays. Per-score arrays are ordered by view, then by position."""

    input_ids: np.ndarray
    """[Z, L] int64, left-padded."""
    attention_mask: np.ndarray | None
    """[Z, L] int64, 1 real and 0 pad; None when nothing is padded."""
    score_rows: np.ndarray
    """[N] int64, flat indices z*L + l of the scored positions; a model with shifted logits reads them one lower."""
    targets: np.ndarray
    """[N] int64, the token whose log-prob is wanted."""
    view_of_score: np.ndarray
    """[N] int64, the view z of each score."""
    support: tuple[np.ndarray, np.ndarray] | None
    """CSR ([N+1] int64, [nnz] int64): the token ids that the law was restricted to; None when nothing was truncated."""
    logp: np.ndarray
    """[N] float32, the rollout's log-prob of the target under the law that drew it."""
    logp_raw: np.ndarray
    """[N] float32, the same at temperature 1, untruncated."""
    entropy: np.ndarray
    """[N] float32, entropy of the law that drew it, nats."""
    advantage: np.ndarray
    """[N] float64."""
    weight: np.ndarray
    """[N] float64."""
    views: tuple[View, ...]
    """[Z], where each view comes from."""
    positions: PositionChoices | None = None
    """None where the choice of positions is no action of the policy."""


def build_batch(views: Sequence[View], groups: Sequence[TrajectoryGroup], *, mask_id: int, pad_id: int) -> ViewBatch:
    """Materialise views: prompt and completion, with every position revealed at or after the view's step masked.

    A position filled with EOS counts as revealed at its recorded step, as the policy saw it. Scored are the positions
    that were drawn at the step; fillers never are.
    """
    lengths_Z = np.array([groups[v.group].prompt_ids.size + groups[v.group].completion_ids.shape[1] for v in views])
    Z, L = len(views), int(lengths_Z.max())
    input_ids_ZL = np.full((Z, L), pad_id, dtype=np.int64)
    score_rows: list[np.ndarray] = []
    cells: list[np.ndarray] = []
    in_completion: list[np.ndarray] = []
    for z, view in enumerate(views):
        group = groups[view.group]
        steps_C, C = group.unmask_step[view.row], group.completion_ids.shape[1]
        scored = np.flatnonzero((steps_C == view.step) & group.drawn[view.row])
        assert scored.size, f"group {group.group_id} row {view.row} drew nothing at step {view.step}"
        input_ids_ZL[z, L - lengths_Z[z] : L - C] = group.prompt_ids
        input_ids_ZL[z, L - C :] = np.where(steps_C >= view.step, mask_id, group.completion_ids[view.row])
        score_rows.append(z * L + L - C + scored)
        cells.append(view.row * C + scored)
        in_completion.append(scored)
    counts_Z = np.array([cell.size for cell in cells])

    def gather(name: str) -> np.ndarray:
        per_view = [getattr(groups[v.group], name).ravel()[cell] for v, cell in zip(views, cells, strict=True)]
        return np.concatenate(per_view)

    return ViewBatch(
        input_ids=input_ids_ZL,
        attention_mask=_attention_mask(lengths_Z, L),
        score_rows=np.concatenate(score_rows),
        targets=gather("completion_ids").astype(np.int64),
        view_of_score=np.repeat(np.arange(Z), counts_Z),
        support=_support([groups[v.group] for v in views], cells),
        logp=gather("logp"),
        logp_raw=gather("logp_raw"),
        entropy=gather("entropy"),
        advantage=np.repeat(np.array([v.advantage for v in views], dtype=np.float64), counts_Z),
        weight=np.repeat(np.array([v.weight for v in views], dtype=np.float64), counts_Z),
        views=tuple(views),
        positions=_position_choices(views, groups, in_completion, L),
    )


def _position_choices(
    views: Sequence[View], groups: Sequence[TrajectoryGroup], scored: list[np.ndarray], L: int
) -> PositionChoices | None:
    laws = {_position_law(groups[view.group]) for view in views}
    assert len(laws) == 1, f"views with different laws of position choice: {laws}"
    law = laws.pop()
    if law is None:
        return None
    rows, of_score, ranks = [], [], []
    logp_Z = np.zeros(len(views), np.float32)
    offset = 0
    for z, (view, scored_n) in enumerate(zip(views, scored, strict=True)):
        group = groups[view.group]
        C, block = group.completion_ids.shape[1], group.sampler.block_length
        start = int(scored_n[0]) // block * block
        candidates = start + np.flatnonzero(group.unmask_step[view.row, start : start + block] >= view.step)
        assert group.position_logp is not None
        logp_Z[z] = group.position_logp[view.row, view.step]
        rows.append(z * L + L - C + candidates)
        of_score.append(offset + np.searchsorted(candidates, scored_n))
        ranks.append(group.unmask_rank[view.row, scored_n].astype(np.int64))
        offset += candidates.size
    counts_Z = np.array([row.size for row in rows])
    return PositionChoices(
        candidate_rows=np.concatenate(rows),
        view_of_candidate=np.repeat(np.arange(len(views)), counts_Z),
        candidate_of_score=np.concatenate(of_score),
        rank=np.concatenate(ranks),
        free=np.array([n.size for n in scored]) < counts_Z,
        logp=logp_Z,
        advantage=np.array([view.advantage for view in views], dtype=np.float64),
        weight=np.array([view.weight for view in views], dtype=np.float64),
        temperature=law[0],
        confidence_temperature=law[1],
    )


def _position_law(group: TrajectoryGroup) -> tuple[float, float] | None:
    sampler = group.sampler
    return None if group.position_logp is None else (sampler.position_temperature, sampler.confidence_temperature)


def _attention_mask(lengths_Z: np.ndarray, L: int) -> np.ndarray | None:
    if (lengths_Z == L).all():
        return None
    return (np.arange(L) >= L - lengths_Z[:, None]).astype(np.int64)


def _support(groups: list[TrajectoryGroup], cells: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    if groups[0].support_ids is None:
        assert all(group.support_ids is None for group in groups), "groups with and without a recorded support"
        return None
    kept: list[np.ndarray] = []
    for group, cell in zip(groups, cells, strict=True):
        assert group.support_ids is not None and group.support_indptr is not None
        starts, ends = group.support_indptr[cell], group.support_indptr[cell + 1]
        kept += [group.support_ids[start:end] for start, end in zip(starts, ends, strict=True)]
    indptr = np.concatenate([[0], np.cumsum([ids.size for ids in kept])]).astype(np.int64)
    return indptr, np.concatenate(kept).astype(np.int64)
