"""Recorded cases of DTM's official code, computed again with this code base: single losses, and a training loop.

The recorded states, completions and rewards are inputs; what is scored, targets, losses and gradients are compared, and
in the loop also what becomes of student, teacher and running mean. A reward that is no number counts as 0 there, and is
given so here. The loop's learning rates are given: its schedule is not this product's.

Shapes: R rows, P prompt tokens, C completion positions, B positions of a block, N scored positions, V vocabulary, U
updates, K micro-steps, E buffers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import View
from learner.objectives.dtm import Dtm
from learner.ranks.optim import FiniteAdamW
from learner.ranks.phases import PhaseWeights, TrainedWeights
from learner.settings.methods.matching import DtmConfig
from learner.verification.cases import Arrays
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import MethodCase, RecordedPolicy, compare_gradients, recorded_policy


class _Settings(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class LossSettings(_Settings):
    """Of a case of one loss."""

    h: NonNegativeFloat
    c: Annotated[float, Field(ge=0, le=1)]
    itpl_block: PositiveInt
    use_sar_active_block_norm: bool


class Tilt(_Settings):
    """The method's, of a loop."""

    h: PositiveFloat
    a_end: PositiveFloat
    control_variate: Annotated[float, Field(ge=0, le=1)]
    grad_accum_steps: PositiveInt
    use_ema: bool
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    use_sar_active_block_norm: bool


class LoopConfig(_Settings):
    """The trainer's, of a loop."""

    tm: Tilt
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat


class LoopSettings(_Settings):
    """Of a case of a training loop."""

    config: LoopConfig
    block_length: PositiveInt
    n_updates: PositiveInt
    boundaries_at: tuple[PositiveInt, ...]


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """What is scored, targets, losses and gradient of a case; and, where it is a training loop, what it leads to."""
    if "boundaries_at" in case.raw:
        return _loop(case, case.read(LoopSettings), meter)
    return _one_loss(case, case.read(LossSettings), meter)


class Step(NamedTuple):
    """What the product makes of some rows."""

    position_N: torch.Tensor
    row_R: torch.Tensor
    loss: torch.Tensor
    """their mean"""


def step(
    case: MethodCase,
    objective: Dtm,
    policy: RecordedPolicy,
    teacher: PhaseWeights,
    views: list[View],
    reward_R: np.ndarray,
) -> Step:
    """The losses of rows, each a group of its own, with the weights that are in place."""
    batch = case.batch(views, case.groups(reward_R[:, None]))
    with torch.no_grad(), teacher.teaching():
        taught = policy.scores(batch, vocabulary=True)
    scores = PolicyScores(policy.scores(batch, vocabulary=True), teacher=taught)
    position_N = objective.position_losses(scores, batch)
    weight_N = torch.as_tensor(batch.weight, dtype=position_N.dtype, device=position_N.device)
    row_of_N = torch.from_numpy(batch.view_of_score).to(position_N.device)
    row_R = torch.zeros(len(views), dtype=position_N.dtype, device=position_N.device)
    row_R = row_R.index_add(0, row_of_N, weight_N * position_N)
    return Step(position_N.detach(), row_R.detach(), objective.loss(scores, batch)[0] / len(views))


def _one_loss(case: MethodCase, s: LossSettings, meter: Meter) -> list[Measurement]:
    take, C = case.arrays.take, case.settings.C
    index_R = take("row_idx", (None,), "integers", within=(0, len(case.completion_ids) - 1))
    R = len(index_R)
    drawn = _of_rows(case, case.prompt_ids[index_R], case.completion_ids[index_R])
    reward_R = np.nan_to_num(take("rewards_per_func", (len(case.completion_ids), None))).sum(axis=1)[index_R]
    objective = _objective(s.h, s.h, s.c, s.itpl_block, s.use_sar_active_block_norm)
    credit_R = np.concatenate(objective.credit(drawn.groups(reward_R[:, None])))
    count_R = take("num_to_mask", (R,), "integers", within=(1, C))
    rank_RB = take("block_scores", (R, s.itpl_block))
    views = [
        objective.unit(row, 0, C, int(count_R[row]), rank_RB[row], s.h * float(credit_R[row]))[0] for row in range(R)
    ]
    inputs_RL = take("noised_inputs", (R, case.settings.P + C), "integers")
    hidden_RC = drawn.hidden("noised_inputs", inputs_RL, range(R))[1]
    weight_RC = take("loss_weights", (R, C))
    recorded_RC, row_R = take("per_position_losses", (R, C)), take("per_row_loss", (R,))
    with recorded_policy(case, meter) as policy:
        teacher = PhaseWeights(TrainedWeights(policy.model, 0), None)
        if any(name.startswith("cur/") for name in case.arrays.by_name):
            policy.use("cur")
        ours = step(drawn, objective, policy, teacher, views, reward_R)
        scored_RC = np.zeros((R, C), bool)
        for row, view in enumerate(views):
            scored_RC[row, view.scored_n] = True
        mass_R = np.exp([view.credit for view in views])
        return [
            meter.elements("masks", np.stack([view.hidden_C for view in views]), hidden_RC, "noised_inputs"),
            meter.elements("masks", scored_RC, weight_RC > 0, "loss_weights"),
            meter.elements("advantages", credit_R, take("rewards", (R,)), "rewards"),
            meter.scaled("ELBO loss", mass_R, take("target_mass", (R, C))[:, 0], "target_mass"),
            meter.scaled(
                "ELBO loss",
                ours.position_N.cpu().numpy(),
                recorded_RC[scored_RC],
                "per_position_losses",
                scale=np.maximum(recorded_RC, mass_R[:, None])[scored_RC],
            ),
            meter.scaled("ELBO loss", ours.row_R.cpu().numpy(), row_R, "per_row_loss", scale=np.maximum(row_R, mass_R)),
            meter.scaled("ELBO loss", ours.loss.item(), take("losses", (1,))[0], "losses"),
            compare_gradients(
                policy, [policy.gradient(ours.loss)], meter, quantity="gradient of the ELBO loss", floor=0.0
            ),
        ]


def _loop(case: MethodCase, s: LoopSettings, meter: Meter) -> list[Measurement]:
    take, config, tm = case.arrays.take, s.config, s.config.tm
    updates, accumulated = s.n_updates, tm.grad_accum_steps
    shape = take("rewards", (updates * accumulated, None)).shape
    inputs = take("noised_inputs", (*shape, case.settings.P + case.settings.C), "integers")
    whole = take("x1", inputs.shape, "integers")
    active = take("active_masks", (*shape, case.settings.C), "integers").astype(bool)
    reward, learning_rate = take("rewards", shape), take("lr_used", (updates,))
    objective = _objective(tm.h, tm.a_end, tm.control_variate, s.block_length, tm.use_sar_active_block_norm)
    with recorded_policy(case, meter) as policy:
        trained = TrainedWeights(policy.model, 0)
        weights = PhaseWeights(trained, tm.ema_decay if tm.use_ema else None)
        parameters = list(policy.parameters.values())
        betas = (config.adam_beta1, config.adam_beta2)
        adam = FiniteAdamW(parameters, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay)
        losses, tilts, norms = [], [], []
        found: list[Measurement] = []
        for update in range(updates):
            phase = sum(boundary <= update for boundary in s.boundaries_at)
            h = objective.config.step_of(phase)
            for k in range(update * accumulated, (update + 1) * accumulated):
                rows = _of_rows(case, *np.split(whole[k], [case.settings.P], axis=1))
                hidden_RC = rows.hidden("noised_inputs", inputs[k], range(shape[1]))[1]
                views = _views(objective, hidden_RC, active[k], h * reward[k])
                loss = step(rows, objective, policy, weights, views, reward[k]).loss
                (loss / accumulated).backward()
                losses.append(loss.item())
                tilts.append(h)
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
            for group in adam.param_groups:
                group["lr"] = learning_rate[update]
            adam.step()
            adam.zero_grad()
            weights.updated()
            if update + 1 in s.boundaries_at:
                weights.next()
                adam.state.clear()
            found += _after(policy, s, meter, update + 1, trained, weights)
        return [
            meter.elements("importance_weights", tilts, take("h_used", (len(tilts),)), "h_used"),
            meter.scaled("ELBO loss", losses, take("micro_loss", (len(losses),)), "micro_loss"),
            meter.scaled("gradient of the ELBO loss", norms, take("grad_norm_before_clip", (updates,)), "grad_norm"),
            *found,
        ]


def _after(
    policy: RecordedPolicy, s: LoopSettings, meter: Meter, update: int, trained: TrainedWeights, weights: PhaseWeights
) -> list[Measurement]:
    """Student, teacher and running mean after an update, and the boundary that may have followed."""
    quantity, student, case = "gradient of the ELBO loss", trained.used(), policy.case
    state = {"student": student, "teacher": weights.teacher, "ema": weights.mean or student}
    found = []
    for name, held in state.items():
        size = float(torch.cat([tensor.flatten() for tensor in held.values()]).double().norm())
        recorded = case.arrays.take(f"{name}_norm_after", (s.n_updates,))[update - 1]
        found.append(meter.scaled(quantity, size, recorded, f"{name}_norm_after[{update - 1}]"))
    boundary = s.boundaries_at.index(update) + 1 if update in s.boundaries_at else 0
    for name in (f"student_after{update}", f"after_boundary{boundary}"):
        if any(array.startswith(f"{name}/") for array in case.arrays.by_name):
            recorded_tensors = case.arrays.tensors(f"{name}/", policy.parameters)
            found += [
                meter.scaled(quantity, student[tensor].float().cpu().numpy(), array, f"{name}/{tensor}")
                for tensor, array in recorded_tensors.items()
            ]
    return found


def _of_rows(case: MethodCase, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> MethodCase:
    """The case with these rows."""
    own = {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
    return dataclasses.replace(case, arrays=Arrays({**case.arrays.by_name, **own}))


def _objective(h: float, a_end: float, c: float, block: int, active_block: bool) -> Dtm:
    return Dtm(
        DtmConfig(
            tilt_step=h,
            tilt_end=a_end,
            control_variate=c,
            block_length=block,
            scored="active_block" if active_block else "all",
        )
    )


def _views(objective: Dtm, hidden_RC: np.ndarray, active_RC: np.ndarray, tilt_R: Sequence[float]) -> list[View]:
    """Of recorded states: the product's, given as draws what masks the same positions."""
    views = []
    C = hidden_RC.shape[1]
    block = objective.config.block_length
    assert block is not None
    for row, (hidden_C, active_C) in enumerate(zip(hidden_RC, active_RC, strict=True)):
        start = int(np.flatnonzero(active_C)[0]) // block * block
        rank_B = np.where(active_C[start : start + block], 0.0, 1.0)
        views.append(objective.unit(row, 0, C, int(hidden_C.sum()), rank_B, float(tilt_R[row]))[0])
    return views
