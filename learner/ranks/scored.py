"""What an update scored, kept for playback: a learner rank picks it out of the forwards that it makes anyway.

Shapes: n scored positions of one view.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from learner.likelihood.scorer import Scores
from learner.likelihood.views import ViewBatch


class ScoredView(NamedTuple):
    """What an update scored of a completion in one view, with the log-probs of the weights that it started from."""

    group: int
    """index into the update's list of groups"""
    row: int
    step: int
    """the denoising step before which this was the completion's state; -1 for a view that the rollout never saw"""
    draws: int
    """how often this view was drawn for the completion"""
    weight: float
    """draws times the importance weight of one draw"""
    positions: np.ndarray
    """[n] int32, the completion positions that were scored, ascending"""
    logp: np.ndarray
    """[n] float32, log-prob of each one's token under the method's law"""
    choice_logp: float
    """log-prob of the choice of these positions; NaN where that is no action of the policy"""


def recorded_groups(credit: Sequence[np.ndarray], completions: int) -> tuple[int, ...]:
    """Indices of the groups that are kept for playback: whole ones, until ``completions`` completions are reached.

    Groups with a signal come first, since the others aren't scored; among equals the first by group id.

    Args:
        credit: [group], each completion's (``UpdatePlan.credit``).
    """
    silent = [not credit_G.any() for credit_G in credit]
    chosen: list[int] = []
    for index in sorted(range(len(credit)), key=lambda index: silent[index]):
        if sum(len(credit[i]) for i in chosen) >= completions:
            break
        chosen.append(index)
    return tuple(sorted(chosen))


def scored_views(batch: ViewBatch, scores: Scores, wanted: Collection[int]) -> list[ScoredView]:
    """The views of one forward that score tokens of the ``wanted`` groups' completions."""
    kept = [
        z for z, view in enumerate(batch.views) if view.scored_n.size and view.fills is None and view.group in wanted
    ]
    if not kept:
        return []
    logp_N = scores.logp_N.detach().float().cpu().numpy()
    choice_logp_Z = None
    if scores.choice_logp_Z is not None:
        choice_logp_Z = scores.choice_logp_Z.detach().float().cpu().numpy()
    found = []
    for z in kept:
        view = batch.views[z]
        at = np.flatnonzero(batch.view_of_score == z)
        found.append(
            ScoredView(
                group=view.group,
                row=view.row,
                step=-1 if view.step is None else view.step,
                draws=view.draws,
                weight=view.weight,
                positions=batch.position[at].astype(np.int32),
                logp=logp_N[at],
                choice_logp=float("nan") if choice_logp_Z is None else float(choice_logp_Z[z]),
            )
        )
    return found
