"""Views of several denoising steps at once: the completion as it was before the first of them, which scores what was
drawn at any of them. One step a view is the exact likelihood of the rollout's path; the more are merged, the more
tokens are scored as if they were independent.

Shapes: C completion positions, P prompt tokens, N views.
"""

from collections.abc import Sequence

import numpy as np

from learner.likelihood.views import View
from rollout.trajectory import TrajectoryGroup


def merged_step_views(
    group: TrajectoryGroup,
    index: int,
    row: int,
    starts_N: Sequence[int],
    counted_C: np.ndarray,
    *,
    credit: float,
    weight: float = 1.0,
    hidden_P: np.ndarray | None = None,
) -> list[View]:
    """The views of one completion; steps at which nothing that counts was drawn have none.

    Args:
        starts_N: ascending, the first step of each view; the last one goes on to the end.
        counted_C: [C] bool, the positions that may be scored. Each is scored once, where it was drawn.
        hidden_P: [P] bool, the masked tokens of the prompt, in all views.
    """
    steps_C, counted_C = group.unmask_step[row], counted_C & group.drawn[row]
    views = []
    for start, end in zip(starts_N, [*starts_N[1:], group.sampler.most_steps], strict=True):
        scored = np.flatnonzero((steps_C >= start) & (steps_C < end) & counted_C)
        if scored.size:
            views.append(View(index, row, steps_C >= start, scored, credit, weight, hidden_P=hidden_P))
    return views
