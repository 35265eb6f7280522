"""Our engine and learner step as the benchmarks run them, and the check that the plain way gives the same numbers."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch

from learner.bench.plain import PlainRollout, plain_generate
from learner.bench.policy import RUN_SEED, Shape
from learner.likelihood.scorer import PolicyScores, Scores, score
from learner.likelihood.views import ViewBatch, build_batch
from learner.objectives.agrpo import Agrpo
from learner.objectives.statistics import Statistics
from learner.ranks.plan import Forward, UpdatePlan, plan_update
from learner.settings.methods.states import AgrpoConfig
from rollout.adapters import adapter_parameters
from rollout.models.family import PolicyAdapter
from rollout.sampling import noise
from rollout.seeds import derive_seed, numpy_generator
from rollout.trajectory import TrajectoryGroup

LOGP_TOLERANCE, RELATIVE_TOLERANCE = 2e-5, 1e-4
"""Between ours and plain, in fp32: log-probs absolute (nats); loss and gradient (L2) relative."""


class Update(NamedTuple):
    """One update's loss, gradient by parameter, and log-probs by (row, step)."""

    loss: float
    gradient: dict[str, torch.Tensor]
    logp: dict[tuple[int, int], torch.Tensor]


def our_update(
    model: torch.nn.Module, family: PolicyAdapter, group: TrajectoryGroup, shape: Shape, k: int
) -> tuple[UpdatePlan, list[tuple[Any, torch.Tensor]], float]:
    """The learner's update of this group, as ``learner.ranks.rank`` does it but for DeepSpeed; gradients stay.

    Returns the plan, each forward's batch with its log-probs, and the loss.
    """
    objective, plan = planned_update(family, group, shape, k)
    total, scored = 0.0, []
    for forward in plan.forwards[0]:
        batch, scores, loss, _ = forward_loss(model, family, objective, forward, group)
        loss = loss / plan.normaliser
        loss.backward()
        total += float(loss.detach())
        scored.append((batch, scores.logp_N.detach()))
    return plan, scored, total


def planned_update(family: PolicyAdapter, group: TrajectoryGroup, shape: Shape, k: int) -> tuple[Agrpo, UpdatePlan]:
    """AGRPO with uniform draws, and its update of this group on one rank."""
    objective = Agrpo(AgrpoConfig(k=k, timestep_sampling="uniform"))
    plan = plan_update(
        [group],
        objective=objective,
        run_seed=RUN_SEED,
        update_index=0,
        eos_ids=(family.eos_token_id,),
        ranks=1,
        views_per_forward=shape.views_per_forward,
    )
    return objective, plan


def forward_loss(
    model: torch.nn.Module, family: PolicyAdapter, objective: Agrpo, forward: Forward, group: TrajectoryGroup
) -> tuple[ViewBatch, Scores, torch.Tensor, Statistics]:
    """One forward's batch, log-probs, loss before the update's normaliser, and figures."""
    batch = build_batch(forward.views, [group], mask_id=family.mask_token_id, pad_id=family.pad_token_id)
    scores = score(model, batch, family=family)
    return batch, scores, *objective.loss(PolicyScores(scores), batch)


def draws_of(plan: UpdatePlan, rows: int) -> list[list[int]]:
    """[B][k] drawn steps with their repeats. Uniform draws over all steps have weight 1 each, so a merged view's weight
    is its count."""
    draws: list[list[int]] = [[] for _ in range(rows)]
    for view in (view for forward in plan.forwards[0] for view in forward.views):
        assert view.step is not None
        draws[view.row] += [view.step] * round(view.weight)
    return draws


def off_policy(group: TrajectoryGroup) -> TrajectoryGroup:
    """The group as if other weights had drawn it: with ratios of exactly 1 the loss would be 0, whatever is wrong."""
    shift = numpy_generator("bench shift").normal(0.0, 0.1, group.logp.shape).astype(np.float32)
    return dataclasses.replace(group, logp=np.minimum(group.logp + shift, 0.0))


def as_plain(group: TrajectoryGroup, shape: Shape) -> PlainRollout:
    """The group with its support as a boolean mask over the vocabulary."""
    assert group.support_indptr is not None and group.support_ids is not None
    cells = shape.rows * shape.completion
    support = torch.zeros(cells, shape.vocabulary, dtype=torch.bool)
    kept_in = torch.from_numpy(np.repeat(np.arange(cells), np.diff(group.support_indptr)))
    support[kept_in, torch.from_numpy(group.support_ids.astype(np.int64))] = True
    return PlainRollout(
        completion_ids=torch.from_numpy(group.completion_ids.astype(np.int64)),
        unmask_step=torch.from_numpy(group.unmask_step.astype(np.int64)),
        logp=torch.from_numpy(group.logp),
        logp_raw=torch.from_numpy(group.logp_raw),
        entropy=torch.from_numpy(group.entropy),
        support=support.view(shape.rows, shape.completion, shape.vocabulary),
    )


def compare_engine(
    model: torch.nn.Module, group: TrajectoryGroup, shape: Shape, family: PolicyAdapter, *, steps: int
) -> dict[str, float]:
    """The plain sampler with our noise must write what the engine wrote in its first ``steps``.

    Raises:
        AssertionError: when tokens, supports or log-probs differ by more than the tolerance.
    """
    keys_B = torch.tensor([derive_seed(group.seed, row) for row in range(shape.rows)])

    def our_noise(step: int, block: slice) -> torch.Tensor:
        at_BW = torch.arange(block.start, block.stop).repeat(shape.rows, 1)
        streams = noise.streams(
            keys_B.repeat_interleave(shape.block), torch.full((at_BW.numel(),), step), at_BW.flatten()
        )
        return noise.gumbel(streams, shape.vocabulary).view(*at_BW.shape, shape.vocabulary)

    plain = plain_generate(model, shape, group.unmask_step, mask_id=family.mask_token_id, steps=steps, noise=our_noise)
    mine = as_plain(group, shape)
    written = mine.unmask_step < steps
    assert torch.equal(plain.completion_ids[written], mine.completion_ids[written]), "the plain way wrote other tokens"
    assert torch.equal(plain.support[written], mine.support[written]), "the plain way kept another support"
    error = max(
        float((getattr(plain, name)[written] - getattr(mine, name)[written]).abs().max())
        for name in ("logp", "logp_raw", "entropy")
    )
    assert error <= LOGP_TOLERANCE, f"log-probs of engine and plain way differ by {error:.2g}"
    return {"logp_error": error}


def compare_updates(mine: Update, plain: Update, *, whole: bool) -> dict[str, float]:
    """Errors of our update against the plain one; loss and gradient only when the plain way did all draws.

    Raises:
        AssertionError: when one is beyond the tolerance.
    """
    errors = {"logp_error": max(float((mine.logp[at] - logp).abs().max()) for at, logp in plain.logp.items())}
    assert errors["logp_error"] <= LOGP_TOLERANCE, f"log-probs of learner and plain way differ: {errors}"
    if whole:
        errors["loss_error"] = abs(mine.loss - plain.loss) / abs(plain.loss)
        squares = sum(float((mine.gradient[n] - g).square().sum()) for n, g in plain.gradient.items())
        errors["gradient_error"] = (squares / sum(float(g.square().sum()) for g in plain.gradient.values())) ** 0.5
        assert max(errors["loss_error"], errors["gradient_error"]) <= RELATIVE_TOLERANCE, f"updates differ: {errors}"
    return errors


def gradient_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}


def by_view(scored: list[tuple[Any, torch.Tensor]]) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (view.row, view.step): logp_N[torch.from_numpy(batch.view_of_score == z)]
        for batch, logp_N in scored
        for z, view in enumerate(batch.views)
    }
