"""DTM, Discrete Tilt Matching (arXiv 2604.18739): the policy is matched to its teacher's law, tilted by the reward.

A phase begins with the teacher equal to the policy, draws a buffer of completions from it, and makes updates on
completions y drawn from the buffer, with reward r at least 0. From each comes a state x between prompt and y: n of its
C positions, n uniform from 1 to C, are masked as a decoder by blocks would meet them. The last (n-1) // B blocks are
masked whole; in the block before them, the active one, (n-1) % B + 1 random positions are. At each masked position i
of the active block the target is a law that isn't normalised,

    t(v) = c p_teacher(v | x, i) + 1[v = y_i] (exp(h r) - c),        loss = - sum over v of t(v) log p(v | x, i)

averaged over these positions, then over completions. Whatever c, its minimiser is the teacher's posterior of y_i given
x, with each y weighed by exp(h r); c = 1 leaves a completion without reward pure distillation, which keeps the noise
low. When a phase ends, the tilt is h higher: the policy becomes the running mean of its weights, if one is kept, and
the next teacher; AdamW forgets its moments, and the buffer is drawn anew. From the tilt ``tilt_end`` on, h is 0.

As in the authors' code, positions after the first EOS are scored, and a negative reward counts as 0. There is no
advantage, ratio or KL, and a group may be of one completion. Their buffer is one process', and a reward that is no
number counts as 0; ours is the run's, and a group with such a reward is dropped before.

Shapes: G completions of a group, C completion positions, R completions of the buffer, N scored positions, B positions
of a block, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import Law, Unit, View, ViewBatch
from learner.objectives.advantages import total_rewards
from learner.objectives.base import Needs, UpdateContext, Wanted
from learner.objectives.statistics import Statistics
from learner.settings.methods.matching import DtmConfig
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup

LARGEST_TILT = 80.0
"""Of h times the reward: exp of it is still finite in float32."""


class Dtm:
    """DTM as ``learner.objectives.base.Objective`` wants it."""

    needs = Needs(law=Law.RAW, teacher=True, vocabulary=True)

    def __init__(self, config: DtmConfig) -> None:
        self.config = config

    def credit(self, groups: Sequence[TrajectoryGroup]) -> tuple[np.ndarray, ...]:
        """The rewards, those below 0 as 0; raises DataError when one isn't finite."""
        return tuple(np.maximum(total_rewards(group.rewards), 0.0) for group in groups)

    def wanted(self, index: int, group: TrajectoryGroup, credit_G: np.ndarray, context: UpdateContext) -> Wanted:
        """One state of each completion that the update draws from the buffer.

        Raises:
            DataError: when a completion's weight isn't finite.
        """
        block = self.config.block_length or group.sampler.block_length
        h = self.config.step_of(context.phase)
        reward = float(credit_G.max())
        if h * reward > LARGEST_TILT:
            raise DataError(
                f"objective.tilt_step={self.config.tilt_step:g} and a reward of {reward:g} give a completion the "
                f"weight exp({h * reward:.0f}), which no gradient holds; lower tilt_step to about 10 / reward"
            )
        rng = context.stream(group, "interpolant")
        count_G = rng.integers(1, group.completion_ids.shape[1], endpoint=True, size=group.size)
        rank_GB = rng.random((group.size, block))
        units = [
            self.unit(index, row, group.completion_ids.shape[1], int(count_G[row]), rank_GB[row], h * credit_G[row])
            for row in self._drawn(index, group, context)
        ]
        mass = float(np.exp([unit[0].credit for unit in units]).sum())
        figures = {"tilt/step": (h, 1.0), "tilt/target_mass": (mass, float(len(units)))}
        return Wanted(units, divisor=float(len(units)), statistics=Statistics(means=figures))

    def unit(self, index: int, row: int, C: int, count: int, rank_B: np.ndarray, tilt: float) -> Unit:
        """The state of a completion with ``count`` positions masked: in the active block those of the smallest
        ``rank_B``. ``tilt``: h times the reward."""
        B = rank_B.size
        full, rest = (count - 1) // B, (count - 1) % B + 1
        start = C - (full + 1) * B
        active = start + np.sort(np.argsort(rank_B, kind="stable")[:rest])
        hidden_C = np.arange(C) >= start + B
        hidden_C[active] = True
        scored = active if self.config.scored == "active_block" else np.flatnonzero(hidden_C)
        return (View(index, row, hidden_C, scored, tilt, weight=1.0 / scored.size),)

    def position_losses(self, scores: PolicyScores, batch: ViewBatch) -> torch.Tensor:
        """[N], the cross-entropy of each scored position with its target."""
        policy_NV, teacher = scores.policy.law_NV, scores.teacher
        assert policy_NV is not None and teacher is not None and teacher.law_NV is not None
        shared_N = self.config.control_variate * _expected(teacher.law_NV, policy_NV)
        extra_N = np.expm1(batch.credit) + (1.0 - self.config.control_variate)
        own_N = torch.as_tensor(extra_N, dtype=shared_N.dtype, device=shared_N.device) * scores.policy.logp_N
        return -(shared_N + own_N)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[torch.Tensor, Statistics]:
        loss_N = self.position_losses(scores, batch)
        weight_N = torch.as_tensor(batch.weight, dtype=loss_N.dtype, device=loss_N.device)
        policy_NV, teacher = scores.policy.law_NV, scores.teacher
        assert policy_NV is not None and teacher is not None and teacher.law_NV is not None
        with torch.no_grad():
            divergence_N = _expected(teacher.law_NV, teacher.law_NV) - _expected(teacher.law_NV, policy_NV)
        N = float(batch.targets.size)
        means = {"teacher/kl": (float(divergence_N.sum()), N)}
        return (weight_N * loss_N).sum(), Statistics(means=means, totals={"scored_tokens": N})

    def _drawn(self, index: int, group: TrajectoryGroup, context: UpdateContext) -> list[int]:
        """Rows of the group that the update learns from: its part of a draw from the whole buffer."""
        R = context.groups * group.size  # groups are of one size
        drawn_R = context.shared("completions").permutation(R)[: self.config.completions]
        return sorted(int(row) for row in drawn_R - index * group.size if 0 <= row < group.size)


def _expected(law_NV: torch.Tensor, logp_NV: torch.Tensor) -> torch.Tensor:
    """[N], of ``logp_NV`` under the law; the mask token, of log-prob -inf in both, is nobody's target."""
    return (law_NV.exp() * logp_NV.masked_fill(logp_NV == -torch.inf, 0.0)).sum(1)
