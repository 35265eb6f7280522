"""Recorded sampler cases of the reference, replayed with their noise through this code base's truncation and laws.

The reference's conventions stay on this side: its law can draw the mask token, its confidence is the log-prob of the
law that was drawn from, its token is argmax exp(filtered logits / T) / (-ln rand), here in log space.

Shapes: B rows, R live rows, K positions of a block, C completion positions, V vocabulary, N = R K positions of a step.
"""

import numpy as np
import torch

from learner.likelihood.views import ViewBatch, build_batch, step_view
from learner.verification.cases import Case, SamplerSettings
from learner.verification.measurement import Measurement, Meter
from learner.verification.policy import batch_logits, check_laws, recorded_model
from rewards.errors import DataError
from rollout.sampling.truncation import Law, truncate


def check_sampler(case: Case, meter: Meter) -> list[Measurement]:
    """Tokens, positions, laws and supports of a sampler case, each step from its recorded state.

    The error of ``completion_ids`` is how far the recorded token's score (log-prob plus Gumbel noise) lies behind the
    best one's, 0 where it is the best; that of ``unmask_steps`` how far the worst chosen position's score lies behind
    the best one that was left masked. So a tie may be broken either way, and anything else shows.
    """
    s = case.settings
    assert isinstance(s, SamplerSettings)
    replay = _Replay(case)
    with recorded_model(case.weights, meter, mask=s.mask, eos=s.eos, pad=s.pad_id) as (model, family):
        found = check_laws(case, model, family, meter)
        replay.run(model)
    zero = np.zeros_like(replay.token_behind_BC)
    return [
        *found,
        meter.elements("completion_ids", replay.token_behind_BC, zero),
        meter.elements("unmask_steps", replay.position_behind_BC, zero),
    ]


class _Replay:
    """The steps of a sampler case. The two arrays are what ``check_sampler`` describes, 0 at fillers."""

    def __init__(self, case: Case) -> None:
        self.case, self.rollout = case, case.rollout
        self.token_behind_BC = np.zeros(self.rollout.drawn.shape)
        self.position_behind_BC = np.zeros(self.rollout.drawn.shape)
        self.taken = 0

    def run(self, model: torch.nn.Module) -> None:
        """Every step; raises DataError when the recorded noise is not what the steps need."""
        rollout, groups, s = self.rollout, self.rollout.groups(), self.case.settings
        for step in range(rollout.sampler.steps):
            rows_R = np.flatnonzero((rollout.drawn & (rollout.unmask_steps == step)).any(axis=1))
            if rows_R.size:
                views = [step_view(groups[row], int(row), 0, step, 0.0, 1.0) for row in rows_R]
                self._step(model, build_batch(views, groups, mask_id=s.mask, pad_id=s.pad_id), step, rows_R)
        if f"rand_{self.taken:03d}" in self.case.arrays.by_name:
            raise DataError(f"array rand_{self.taken:03d} is one more than the steps need")

    def _step(self, model: torch.nn.Module, batch: ViewBatch, step: int, rows_R: np.ndarray) -> None:
        s, rollout, sampler = self.case.settings, self.rollout, self.rollout.sampler
        assert isinstance(s, SamplerSettings)
        R, V, K = rows_R.size, s.V, sampler.block_length
        start = step * rollout.per_step // K * K
        L, C = batch.input_ids.shape[1], sampler.completion_length
        block_RK = np.arange(R)[:, None] * L + L - C + start + np.arange(K)
        tempered_NV = batch_logits(model, batch, torch.from_numpy(block_RK.ravel())) / (s.temperature or 1.0)
        if s.temperature > 0:
            law = truncate(tempered_NV, top_k=sampler.top_k, top_p=sampler.top_p)
            with np.errstate(divide="ignore"):
                gumbel_NV = -np.log(-np.log(self._noise((R, K, V)))).reshape(-1, V)
        else:
            law, gumbel_NV = Law(tempered_NV.log_softmax(-1), None), np.zeros((R * K, V))
        logp_NV = np.full((R * K, V), -np.inf)
        ids_NK = np.broadcast_to(np.arange(V), logp_NV.shape) if law.ids_NK is None else law.ids_NK.cpu().numpy()
        np.put_along_axis(logp_NV, ids_NK, law.logp_NK.double().cpu().numpy(), axis=1)
        proposal_N = (logp_NV + gumbel_NV).argmax(axis=1)

        here = (rows_R, slice(start, start + K))
        revealed_RK = rollout.unmask_steps[here] == step
        # The token is judged on the recorded support: a support that differs is a finding of its own.
        score_NV = np.where(rollout.kept[here].reshape(-1, V), tempered_NV.double().cpu().numpy() + gumbel_NV, -np.inf)
        recorded_N = rollout.completion_ids[here].ravel()
        behind_N = score_NV.max(axis=1) - score_NV[np.arange(R * K), recorded_N]
        self.token_behind_BC[here] += np.where(revealed_RK, behind_N.reshape(R, K), 0.0)

        if s.unmasking == "random":
            score_RK = self._noise((R, K))
        elif s.unmasking == "low_confidence":
            score_RK = logp_NV[np.arange(R * K), proposal_N].reshape(R, K)
        else:
            score_RK = -law.entropy().double().cpu().numpy().reshape(R, K)
        left_RK = np.where(rollout.unmask_steps[here] > step, score_RK, -np.inf)
        worst_R1 = np.where(revealed_RK, score_RK, np.inf).min(axis=1, keepdims=True)
        behind_R1 = (left_RK.max(axis=1, keepdims=True) - worst_R1).clip(min=0.0)
        self.position_behind_BC[here] += np.where(revealed_RK, behind_R1, 0.0)

    def _noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next recorded array of uniforms."""
        name = f"rand_{self.taken:03d}"
        self.taken += 1
        return self.case.arrays.take(name, shape, within=(0.0, 1.0))
