"""d2-StepMerge (arXiv 2509.21474): the likelihood of the rollout's own path, its T steps merged into N segments.

Segment n are the steps from floor(n T / N) on, up to the next segment. Its view is the completion as it was before the
segment's first step, with each token of the prompt masked with ``prompt_mask``, anew for each completion and update but
alike in all its segments; it scores what was drawn in the segment, up to and including the text's first EOS. With A the
reward minus its group's mean,

    rho_j = exp(logp_j - logp_old_j), old: of the weights that the batch's first update began with, on the same views
    l_j   = -min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A) + beta * k3_j
    k3_j  = exp(d_j) - d_j - 1,  d_j = logp_reference_j - logp_j

over all positions j of the text, each in the view of its segment. The loss is the mean over completions of their mean
l_j (``average: sequence``), or the mean over all tokens (``average: token``). Log-probs are at temperature 1 over the
whole vocabulary. N = 1 scores all tokens from the masked completion, as one-step methods do; with N = T and a clean
prompt the log-probs add up to those of the path, each token in the state in which it was drawn.

The authors' code makes a micro-step of each segment, with a loss of N times the sum over the segment's tokens, divided
by all tokens of the micro-batch: averaged over the N micro-steps that is the token mean. It can't make a single
update of a batch. The order of positions isn't scored: it counts as given.

Shapes: G completions of a group, C completion positions, N segments.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, View, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.merged_steps import merged_step_views
from learner.objectives.one_step import averaging, draw_prompt_masks
from learner.objectives.ratio import clipped_token_loss
from learner.objectives.statistics import Statistics
from learner.settings.methods.states import D2Config
from rollout.trajectory import TrajectoryGroup


class D2:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: D2Config) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW, old=True, reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """The segments of each row that has a gradient: those with an advantage, all of them when there is a KL term.
        The loss is a sum over tokens, so each view is a unit of its own."""
        hidden_GP = draw_prompt_masks(group, self.config.prompt_mask, context)
        lengths_G = text_lengths(group, context.eos_ids)
        weight_G, divisor = averaging(lengths_G, self.config.average)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        views = [
            view
            for row in live
            for view in self.segments(
                group, index, row, hidden_GP[row], int(lengths_G[row]), float(credit_G[row]), float(weight_G[row])
            )
        ]
        statistics = Statistics(totals={"live_completions": float(len(live))})
        return Wanted([(view,) for view in views], divisor=divisor, statistics=statistics)

    def segments(
        self,
        group: TrajectoryGroup,
        index: int,
        row: int,
        hidden_P: np.ndarray,
        length: int,
        credit: float,
        weight: float,
    ) -> list[View]:
        """The views of one completion, whose prompt shows ``hidden_P`` [P] bool as masks and whose text has ``length``
        tokens."""
        in_text_C = np.arange(group.completion_ids.shape[1]) < length
        starts = segment_starts(group.sampler.steps, self.config.segments)
        return merged_step_views(group, index, row, starts, in_text_C, credit=credit, weight=weight, hidden_P=hidden_P)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over tokens of their weight times l_j; and their figures."""
        config, old = self.config, scores.old
        assert old is not None, "a ratio needs the old log-probs"
        return clipped_token_loss(scores, old.logp_N, batch, clip=(config.clip_low, config.clip_high), beta=config.beta)


def segment_starts(steps: int, segments: int) -> list[int]:
    """The first step of each segment; more segments than steps are one for each step."""
    segments = min(segments, steps)
    return [n * steps // segments for n in range(segments)]
