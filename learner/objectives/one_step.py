"""The one-step likelihood of d1 (arXiv 2504.12216, section 3): one view gives the log-probs of all tokens.

The completion is masked whole, each token of the prompt with a small probability, anew for each completion and update;
a text's log-prob is the sum over its tokens, as if they were independent. Scored is the text up to and including its
first EOS. What differs from view to view is the prompt alone, which is what makes several updates on a batch differ.

Shapes: G completions of a group, P prompt tokens, C completion positions.
"""

import numpy as np

from learner.likelihood.views import Unit, View
from learner.objectives.base import UpdateContext
from learner.settings.objective import Average
from rollout.trajectory import TrajectoryGroup


def draw_prompt_masks(group: TrajectoryGroup, rate: float, context: UpdateContext) -> np.ndarray:
    """[G, P] bool, each set with probability ``rate``."""
    return context.stream(group, "prompt masks").random((group.size, group.prompt_ids.size)) < rate


def averaging(lengths_G: np.ndarray, average: Average) -> tuple[np.ndarray, float]:
    """What each token of a completion of this length weighs, [G] float64, and the group's divisor: so that the loss is
    the mean over a completion's tokens, then over completions, or over all tokens."""
    if average == "sequence":
        return 1.0 / lengths_G, float(lengths_G.size)
    return np.ones(lengths_G.size), float(lengths_G.sum())


def one_step_unit(
    group: TrajectoryGroup, index: int, row: int, hidden_P: np.ndarray, length: int, credit: float, weight: float
) -> Unit:
    """The view of one completion.

    Args:
        hidden_P: [P] bool, the masked tokens of the prompt.
        length: tokens of the text, at least 1.
    """
    hidden_C = np.ones(group.completion_ids.shape[1], dtype=bool)
    return (View(index, row, hidden_C, np.arange(length), credit, weight, hidden_P=hidden_P),)
