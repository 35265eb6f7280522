"""Views: the model inputs that a likelihood is made of, and what is scored in each.

Every likelihood of a completion under a denoiser is a list of views (an input with some positions masked, the positions
that are scored in it, a weight) and a rule that adds them up. AGRPO's views are states that the rollout went through,
others mask at random. A ``View`` is small; inputs exist for one forward at a time.

Views whose scores meet in one term that isn't a sum (a ratio of sequences, say) form a ``Unit``.

Shapes: Z views and U units of a forward, L tokens of its longest view, N scored positions in all, M candidate positions
in all, P prompt tokens, C completion positions, n scored positions and F fills of one view.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from rollout.spans import prompt_places
from rollout.trajectory import TrajectoryGroup


class Law(Enum):
    """The distribution whose log-probs are wanted."""

    DRAWN = "drawn"
    """What drew the token in the rollout: tempered, on the recorded support. Of recorded states only."""
    RAW = "raw"
    """Temperature 1, the whole vocabulary but the mask token. Of any state."""


class Fills(NamedTuple):
    """What is scored in the place of the completion's own tokens: several fills of the scored positions, all in one
    forward."""

    ids_Fn: np.ndarray
    """[F, n] int64, the tokens of each fill."""
    credit_F: np.ndarray
    """[F] float64, what each is credited with."""


class View(NamedTuple):
    """One input to score: a completion with some of its positions, and perhaps of its prompt's, masked."""

    group: int
    """index into the update's list of groups"""
    row: int
    hidden_C: np.ndarray
    """[C] bool, the positions that are shown as masks."""
    scored_n: np.ndarray
    """[n] int64, ascending: the positions whose tokens' log-probs are wanted, all of them hidden. A view without any is
    a pad: it keeps ranks in step, and counts nowhere."""
    credit: float
    """What the completion is credited with (``Objective.credit``)."""
    weight: float
    """Factor of every score in the view, of any sign."""
    hidden_P: np.ndarray | None = None
    """[P] bool, the prompt tokens that are shown as masks; None for none."""
    step: int | None = None
    """The denoising step whose state before it this is, where it is one of the rollout's."""
    draws: int = 1
    """How many draws of the view the weight stands for."""
    fills: Fills | None = None
    """None where the completion's own tokens are scored. The view has a score for each token of each fill, one fill
    after the other."""
    part: int = 0
    """Which loss the view belongs to, where a method adds up several (``Wanted.added``)."""
    value: float = 0.0
    """What the method's head is to say of the scored positions, where it has one that learns that."""


Unit = tuple[View, ...]
"""Views whose scores meet in one term: scored together, whatever the ranks and forwards."""


def step_view(
    group: TrajectoryGroup, index: int, row: int, step: int, credit: float, weight: float, draws: int = 1
) -> View:
    """The state just before ``step``, which scores what was drawn at it.

    A position filled with EOS counts as revealed at its recorded step, as the policy saw it; fillers are never scored.
    """
    steps_C = group.unmask_step[row]
    scored = np.flatnonzero((steps_C == step) & group.drawn[row])
    assert scored.size, f"group {group.group_id} row {row} drew nothing at step {step}"
    return View(index, row, steps_C >= step, scored, credit, weight, step=step, draws=draws)


def pad_view(group: TrajectoryGroup) -> View:
    """Nothing to score: its forward and backward keep ranks in step and add zeros to the gradient."""
    hidden_C = np.zeros(group.completion_ids.shape[1], dtype=bool)
    return View(0, 0, hidden_C, np.zeros(0, np.int64), credit=0.0, weight=0.0)


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
    credit: np.ndarray
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
    position: np.ndarray
    """[N] int64, which position of the completion each score is of."""
    targets: np.ndarray
    """[N] int64, the token whose log-prob is wanted."""
    view_of_score: np.ndarray
    """[N] int64, the view z of each score."""
    unit_of_view: np.ndarray
    """[Z] int64, ascending from 0 without gaps."""
    temperature: float
    """Of the law."""
    support: tuple[np.ndarray, np.ndarray] | None
    """CSR ([N+1] int64, [nnz] int64): the token ids that the law is restricted to; None for the whole vocabulary."""
    logp: np.ndarray | None
    """[N] float32, the rollout's log-prob of the target under the same law; None where a view is no recorded state."""
    drawn_logp: np.ndarray
    """[N] float32, log-prob with which the rollout drew the completion's token, in the state and under the law that it
    was drawn from; 0 where it was not drawn."""
    credit: np.ndarray
    """[N] float64."""
    weight: np.ndarray
    """[N] float64."""
    views: tuple[View, ...]
    """[Z], where each row comes from."""
    choices: PositionChoices | None = None
    """None where the choice of positions is no action of the policy."""
    threshold_logp: np.ndarray | None = None
    """[Z] float32, log-prob with which each view's completion drew its threshold; None where there was none to draw."""

    @property
    def unit_of_score(self) -> np.ndarray:
        """[N] int64."""
        return self.unit_of_view[self.view_of_score]

    def tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The T positions that each unit scores, by unit, then by position, however many of its views score them: the
        unit of each [T], its first score [T], and the token of each score [N], all int64."""
        cells_2N = np.stack([self.unit_of_score, self.position])
        cells_2T, first_T, token_N = np.unique(cells_2N, axis=1, return_index=True, return_inverse=True)
        return cells_2T[0], first_T, token_N.reshape(-1)

    def of_part(self, part: int) -> tuple["ViewBatch", np.ndarray] | None:
        """The views of one loss as a batch of their own, and which scores of this batch theirs are, [n] int64; None
        where there are none."""
        assert self.support is None and self.choices is None, "parts are of the raw law"
        kept_Z = np.array([view.part == part for view in self.views])
        if not kept_Z.any():
            return None
        at_n, L, number_Z = np.flatnonzero(kept_Z[self.view_of_score]), self.input_ids.shape[1], np.cumsum(kept_Z) - 1
        names = ("position", "targets", "drawn_logp", "credit", "weight")
        view_n = number_Z[self.view_of_score[at_n]]
        batch = dataclasses.replace(
            self,
            **{name: getattr(self, name)[at_n] for name in names},
            input_ids=self.input_ids[kept_Z],
            attention_mask=None if self.attention_mask is None else self.attention_mask[kept_Z],
            score_rows=view_n * L + self.score_rows[at_n] % L,
            view_of_score=view_n,
            unit_of_view=np.unique(self.unit_of_view[kept_Z], return_inverse=True)[1],
            logp=None if self.logp is None else self.logp[at_n],
            views=tuple(view for view in self.views if view.part == part),
            threshold_logp=None if self.threshold_logp is None else self.threshold_logp[kept_Z],
        )
        return batch, at_n

    @property
    def first_views(self) -> list[View]:
        """[U], the first view of each unit."""
        return [self.views[z] for z in np.unique(self.unit_of_view, return_index=True)[1]]


def build_batch(
    views: Sequence[View],
    groups: Sequence[TrajectoryGroup],
    *,
    mask_id: int,
    pad_id: int,
    law: Law = Law.DRAWN,
    unit_sizes: Sequence[int] | None = None,
) -> ViewBatch:
    """Materialise views: prompt and completion, with what is hidden masked. Positions that a completion doesn't have
    are neither hidden nor scored, whatever its views say: of a random set of positions what is left is a random set of
    those that it has, so that what a method averages over its masks keeps its expectation.

    Args:
        groups: the update's; all of one sampler.
        unit_sizes: how many views, in their order, each unit has; None when each is a unit of its own.
    """
    sampler = groups[views[0].group].sampler
    assert all(groups[view.group].sampler == sampler for view in views), "views of different samplers in one forward"
    views = [_of_positions(view, groups[view.group]) for view in views]
    lengths_Z = np.array([groups[view.group].text_length(view.row) for view in views])
    Z, L = len(views), int(lengths_Z.max())
    input_ids_ZL = np.full((Z, L), pad_id, dtype=np.int64)
    score_rows: list[np.ndarray] = []
    cells: list[np.ndarray] = []
    position: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    credit: list[np.ndarray] = []
    for z, view in enumerate(views):
        group = groups[view.group]
        C = group.completion_ids.shape[1]
        assert view.hidden_C[view.scored_n].all(), f"a view of group {group.group_id} scores what it shows"
        prompt = group.prompt_ids if view.hidden_P is None else np.where(view.hidden_P, mask_id, group.prompt_ids)
        prompt_P, column_C, there_C = _columns(group, view.row, L)
        input_ids_ZL[z, prompt_P] = prompt
        shown_C = np.where(view.hidden_C, mask_id, group.completion_ids[view.row])
        input_ids_ZL[z, column_C[there_C]] = shown_C[there_C]
        if view.fills is None:
            position.append(view.scored_n)
            targets.append(group.completion_ids[view.row, view.scored_n])
            credit.append(np.full(view.scored_n.size, view.credit))
        else:
            position.append(np.tile(view.scored_n, len(view.fills.ids_Fn)))
            targets.append(view.fills.ids_Fn.ravel())
            credit.append(view.fills.credit_F.repeat(view.scored_n.size))
        score_rows.append(z * L + column_C[position[-1]])
        cells.append(view.row * C + position[-1])
    counts_Z = np.array([cell.size for cell in cells])
    recorded = all(not view.scored_n.size or (view.step is not None and view.fills is None) for view in views)
    assert recorded or law is Law.RAW, "the law that drew a token is known at recorded states only"

    def gather(name: str) -> np.ndarray:
        per_view = [getattr(groups[v.group], name).ravel()[cell] for v, cell in zip(views, cells, strict=True)]
        return np.concatenate(per_view)

    drawn = law is Law.DRAWN
    return ViewBatch(
        input_ids=input_ids_ZL,
        attention_mask=_attention_mask(lengths_Z, L),
        score_rows=np.concatenate(score_rows),
        position=np.concatenate(position),
        targets=np.concatenate(targets).astype(np.int64),
        view_of_score=np.repeat(np.arange(Z), counts_Z),
        unit_of_view=np.arange(Z) if unit_sizes is None else np.repeat(np.arange(len(unit_sizes)), unit_sizes),
        temperature=sampler.temperature if drawn else 1.0,
        support=_support([groups[v.group] for v in views], cells) if drawn else None,
        logp=gather("logp" if drawn else "logp_raw") if recorded else None,
        drawn_logp=gather("logp"),
        credit=np.concatenate(credit).astype(np.float64),
        weight=np.repeat(np.array([v.weight for v in views], dtype=np.float64), counts_Z),
        views=tuple(views),
        choices=_position_choices(views, groups, L) if drawn else None,
        threshold_logp=_threshold_logp(views, groups),
    )


def _of_positions(view: View, group: TrajectoryGroup) -> View:
    """The view without the positions that the completion doesn't have."""
    if group.places is None:
        return view
    kept_n = group.there[view.row, view.scored_n]
    if kept_n.all():
        return view
    fills = view.fills and view.fills._replace(ids_Fn=view.fills.ids_Fn[:, kept_n])
    return view._replace(scored_n=view.scored_n[kept_n], fills=fills)


def _columns(group: TrajectoryGroup, row: int, L: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where, in a row of L that ends with the text, the prompt's tokens stand [P], and the completion's positions [C];
    and which of these there are [C]."""
    P, C = group.prompt_ids.size, group.completion_ids.shape[1]
    place_C = group.place(row)
    start = L - group.text_length(row)
    at_C = P + np.arange(C) if place_C is None else place_C.astype(np.int64)
    return start + prompt_places(place_C, P), start + at_C, at_C >= 0


def _threshold_logp(views: Sequence[View], groups: Sequence[TrajectoryGroup]) -> np.ndarray | None:
    recorded = [groups[view.group].threshold_logp for view in views]
    found = [logp_G[view.row] for view, logp_G in zip(views, recorded, strict=True) if logp_G is not None]
    return np.array(found, np.float32) if len(found) == len(views) else None


def _position_choices(views: Sequence[View], groups: Sequence[TrajectoryGroup], L: int) -> PositionChoices | None:
    laws = {_position_law(groups[view.group]) for view in views}
    assert len(laws) == 1, f"views with different laws of position choice: {laws}"
    law = laws.pop()
    if law is None:
        return None
    rows, of_score, ranks = [], [], []
    logp_Z = np.zeros(len(views), np.float32)
    offset = 0
    for z, view in enumerate(views):
        group, scored_n = groups[view.group], view.scored_n
        if view.step is None:  # a pad
            rows.append(scored_n)
            of_score.append(scored_n)
            ranks.append(scored_n)
            continue
        block = group.sampler.block_length
        start = int(scored_n[0]) // block * block
        candidates = start + np.flatnonzero(group.unmask_step[view.row, start : start + block] >= view.step)
        _, column_C, _ = _columns(group, view.row, L)
        assert group.position_logp is not None
        logp_Z[z] = group.position_logp[view.row, view.step]
        rows.append(z * L + column_C[candidates])
        of_score.append(offset + np.searchsorted(candidates, scored_n))
        ranks.append(group.unmask_rank[view.row, scored_n].astype(np.int64))
        offset += candidates.size
    counts_Z = np.array([row.size for row in rows])
    return PositionChoices(
        candidate_rows=np.concatenate(rows),
        view_of_candidate=np.repeat(np.arange(len(views)), counts_Z),
        candidate_of_score=np.concatenate(of_score),
        rank=np.concatenate(ranks),
        free=np.array([view.scored_n.size for view in views]) < counts_Z,
        logp=logp_Z,
        credit=np.array([view.credit for view in views], dtype=np.float64),
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
    if not any(group.sampler.truncates or group.support_ids is not None for group in groups):
        return None
    kept: list[np.ndarray] = [np.zeros(0, np.int32)]
    for group, cell in zip(groups, cells, strict=True):
        if not cell.size:  # a pad, of a group that may be an outline
            continue
        assert group.support_ids is not None and group.support_indptr is not None, (
            f"group {group.group_id} was drawn from truncated laws, and its supports are not here"
        )
        starts, ends = group.support_indptr[cell], group.support_indptr[cell + 1]
        kept += [group.support_ids[start:end] for start, end in zip(starts, ends, strict=True)]
    indptr = np.cumsum([ids.size for ids in kept]).astype(np.int64)
    return indptr, np.concatenate(kept).astype(np.int64)
