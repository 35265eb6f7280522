"""diffu-GRPO, the method of d1 (arXiv 2504.12216, section 3): GRPO on log-probs that one view gives all at once.

The view is that of ``learner.objectives.one_step``: completion masked whole, each prompt token with ``prompt_mask``.
With A the reward minus its group's mean and j the positions up to and including the first EOS,

    rho_j = exp(logp_j - logp_old_j), old: of the weights that the batch's first update began with, on the same view
    l_j   = -min(rho_j A, clip(rho_j, 1 - clip_low, 1 + clip_high) A) + beta * k3_j
    k3_j  = exp(d_j) - d_j - 1,  d_j = logp_reference_j - logp_j

and the loss is the mean over completions of their mean l_j (``average: sequence``, as in the paper), or the mean over
all tokens (``average: token``). The KL term is neither weighted by rho nor clipped. Before the batch's weights have
moved rho is 1, and the gradient that of -A times the text's log-prob, over its length.

The authors' code takes the token mean, over one micro-batch of a device. With accumulation over several micro-batches
it picks masks by a counter of micro-batches, so each sees only part of its masks, or one mask in all updates; here each
update draws its own. Its pads on the left of a prompt are seen and may be masked; there are none here.

Shapes: G completions of a group, N scored tokens of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.one_step import averaging, draw_prompt_masks, one_step_unit
from learner.objectives.ratio import clipped_token_loss
from learner.objectives.statistics import Statistics
from learner.settings.methods.one_step import DiffuGrpoConfig
from rollout.trajectory import TrajectoryGroup


class DiffuGrpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: DiffuGrpoConfig) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(law=Law.RAW, old=True, reference=self.config.beta > 0)

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        return tuple(group_advantages(group.rewards) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """One view of each row that has a gradient: those with an advantage, all of them when there is a KL term."""
        hidden_GP = draw_prompt_masks(group, self.config.prompt_mask, context)
        lengths_G = text_lengths(group, context.eos_ids)
        weight_G, divisor = averaging(lengths_G, self.config.average)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs.reference]
        units = [
            one_step_unit(
                group, index, row, hidden_GP[row], int(lengths_G[row]), float(credit_G[row]), float(weight_G[row])
            )
            for row in live
        ]
        return Wanted(units, divisor, Statistics(totals={"live_completions": float(len(live))}))

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        """The sum over tokens of their weight times l_j; and their figures."""
        config, old = self.config, scores.old
        assert old is not None, "a ratio needs the old log-probs"
        return clipped_token_loss(scores, old.logp_N, batch, clip=(config.clip_low, config.clip_high), beta=config.beta)
