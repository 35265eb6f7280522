"""AGRPO: policy gradients from the exact stepwise likelihood of sampled denoising steps (arXiv 2510.04019).

Completion b has advantage A_b. Its i-th drawn step t has weight w and reveals tokens j. The loss, over S completions
with k draws each, is

    (1 / (S k)) * sum over b, i, j of  w * l_j
    l_j   = -min(rho_j A_b, clip(rho_j, 1 - clip_low, 1 + clip_high) A_b) + beta * rho_j * k3_j
    rho_j = exp(logp_j - logp_rollout_j)
    k3_j  = exp(d_j) - d_j - 1,  d_j = logp_reference_j - logp_j

It is a sum over the tokens of a step, not a mean: a step's likelihood is the product of its tokens'. Where the rollout
drew the positions too (decoupled confidence), their choice is one more action j of the step, with a log-prob and a clip
width of its own. rho_j is taken against the log-prob that the rollout recorded, never a recomputed one, and its factor
in the KL term is neither detached nor clipped: actions drawn from the rollout policy then give the current policy's KL,
value and gradient (DeepSeek-V3.2).

On the policy that drew the batch, with a position rule that doesn't look at the policy or whose choice is scored, and
the ``all`` step range, its expectation is the gradient of expected reward times -(G-1)/(G m). After an update, or on
stale rollouts, rho_j corrects an action's probability but not that of the state it was taken in: a surrogate.

Shapes: G completions of a group, N scored tokens and Z views of a batch.
"""

from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.timesteps import draw_timesteps, draw_uniforms, step_table
from learner.likelihood.views import View, ViewBatch
from learner.objectives.advantages import group_advantages
from learner.objectives.base import Wanted
from learner.objectives.statistics import Statistics
from learner.settings.objectives import AgrpoConfig
from rollout.seeds import numpy_generator
from rollout.trajectory import TrajectoryGroup


class Agrpo:
    """The method as ``learner.objectives.base.Objective`` wants it."""

    def __init__(self, config: AgrpoConfig) -> None:
        self.config = config

    @property
    def needs_reference(self) -> bool:
        return self.config.beta > 0

    def credit(self, group: TrajectoryGroup) -> np.ndarray:
        return group_advantages(group.rewards)

    def wanted(
        self,
        index: int,
        group: TrajectoryGroup,
        credit_G: np.ndarray,
        *,
        run_seed: int,
        update_index: int,
        eos_ids: tuple[int, ...],
    ) -> Wanted:
        """Drawn steps of the rows that have a gradient: those with an advantage, all of them when there is a KL term.

        The draws are made for every row first, so they don't depend on which rows are left out.
        """
        config = self.config
        table = step_table(group, config.step_range, eos_ids)
        stream = numpy_generator(run_seed, int(group.group_id), int(group.policy_version), update_index, "timesteps")
        u_Gk = draw_uniforms(stream, group.size, config.k, low_discrepancy=config.low_discrepancy)
        drawn = draw_timesteps(table, u_Gk, config.timestep_sampling, config.weight_floor)
        live = [row for row in range(group.size) if credit_G[row] != 0 or self.needs_reference]
        views = [
            View(index, row, int(step), float(credit_G[row]), float(weight), int(count))
            for row in live
            for step, count, weight in zip(*drawn[row], strict=True)
        ]
        largest = [float((drawn[row].weights / drawn[row].counts).max()) for row in live]
        statistics = Statistics(
            maxima={"importance_weight/max": max(largest)} if live else {},
            totals={"draws_merged": float(len(live) * config.k - len(views)), "live_completions": float(len(live))},
        )
        return Wanted(views, divisor=float(group.size * config.k), statistics=statistics)

    def loss(
        self,
        logp_N: torch.Tensor,
        ref_logp_N: torch.Tensor | None,
        batch: ViewBatch,
        *,
        position_logp_Z: torch.Tensor | None = None,
        ref_position_logp_Z: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Statistics]:
        """The sum over scores of w * l_j, and the figures of the scores that aren't pads.

        Args:
            logp_N: [N] log-probs of the targets under the current policy, on the recorded support, with gradient.
            ref_logp_N: [N] the same without adapter; needed when beta > 0.
            batch: the views that were scored.
            position_logp_Z: [Z] log-probs of the choices of positions, with gradient; needed when the batch has them.
            ref_position_logp_Z: [Z] the same without adapter; needed when beta > 0.
        """
        config = self.config
        loss, figures = self._clipped(
            logp_N,
            ref_logp_N,
            rollout_logp=batch.logp,
            advantage=batch.advantage,
            weight=batch.weight,
            clip=(config.clip_low, config.clip_high),
        )
        choices = batch.positions
        if choices is None:
            return loss, figures.statistics("", "scored_tokens")
        assert position_logp_Z is not None, "the choices of positions are part of the policy, and weren't scored"
        free = torch.from_numpy(choices.free).to(position_logp_Z.device)
        position_loss, position_figures = self._clipped(
            position_logp_Z[free],
            None if ref_position_logp_Z is None else ref_position_logp_Z[free],
            rollout_logp=choices.logp[choices.free],
            advantage=choices.advantage[choices.free],
            weight=choices.weight[choices.free],
            clip=(
                config.clip_low if config.position_clip_low is None else config.position_clip_low,
                config.clip_high if config.position_clip_high is None else config.position_clip_high,
            ),
        )
        parts = [figures.statistics("", "scored_tokens"), position_figures.statistics("position_", "scored_choices")]
        return loss + position_loss, Statistics.merged(parts)

    def _clipped(
        self,
        logp_N: torch.Tensor,
        ref_logp_N: torch.Tensor | None,
        *,
        rollout_logp: np.ndarray,
        advantage: np.ndarray,
        weight: np.ndarray,
        clip: tuple[float, float],
    ) -> tuple[torch.Tensor, "_Figures"]:
        """The sum of w * l_j over actions of one kind."""
        rollout_logp_N, advantage_N, weight_N = (
            torch.as_tensor(array, dtype=logp_N.dtype, device=logp_N.device)
            for array in (rollout_logp, advantage, weight)
        )
        low, high = 1.0 - clip[0], 1.0 + clip[1]
        log_ratio_N = logp_N - rollout_logp_N
        ratio_N = log_ratio_N.exp()
        loss_N = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(low, high) * advantage_N)
        kl_N = None
        if self.needs_reference:
            assert ref_logp_N is not None, "beta > 0 needs the reference's log-probs"
            d_N = ref_logp_N.detach() - logp_N
            kl_N = ratio_N * (torch.expm1(d_N) - d_N)
            loss_N = loss_N + self.config.beta * kl_N
        averages = {
            "ratio/mean": ratio_N,
            "clip_fraction/low": (ratio_N < low) & (advantage_N < 0),
            "clip_fraction/high": (ratio_N > high) & (advantage_N > 0),
        }
        if kl_N is not None:
            averages["kl"] = kl_N
        return (weight_N * loss_N).sum(), _Figures(averages, log_ratio_N, weight_N > 0)


class _Figures(NamedTuple):
    averages: dict[str, torch.Tensor]
    log_ratio_N: torch.Tensor
    real_N: torch.Tensor

    def statistics(self, prefix: str, count: str) -> Statistics:
        """``log_ratio/abs_max`` has no prefix: whatever the kind of action, it tells how far learner and rollout are
        apart."""
        scores = int(self.real_N.sum())
        if not scores:
            return Statistics()
        log_ratio = self.log_ratio_N.detach()[self.real_N]
        figures = [value.detach()[self.real_N].to(log_ratio.dtype).sum() for value in self.averages.values()]
        figures += [log_ratio.square().sum(), log_ratio.abs().max(), log_ratio.max().exp()]
        *sums, squares, largest, ratio_max = torch.stack(figures).tolist()
        return Statistics(
            means={prefix + name: (total, float(scores)) for name, total in zip(self.averages, sums, strict=True)},
            rms={f"{prefix}log_ratio/rms": (squares, float(scores))},
            maxima={"log_ratio/abs_max": largest, f"{prefix}ratio/max": ratio_max},
            totals={count: float(scores)},
        )
