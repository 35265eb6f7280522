"""All methods of the settings, each with settings under which all its parts have work."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

import torch

from learner.likelihood.scorer import PolicyScores, Scores, score
from learner.likelihood.views import ViewBatch, build_batch
from learner.objectives.base import Objective
from learner.ranks.plan import Forward, UpdatePlan, plan_update
from learner.settings.objective import ObjectiveSection
from learner.settings.objectives import ObjectiveConfig
from learner.settings.run import RunConfig
from rollout.adapters import AdapterState
from rollout.models.family import PolicyAdapter
from rollout.trajectory import BranchSpec, SamplerSpec, TrajectoryGroup
from tests.support.learner_ranks import SAMPLER, draw_batch, settings

VARIANTS: dict[str, type[ObjectiveSection]] = {
    v.model_fields["type"].default: v for v in get_args(get_args(ObjectiveConfig)[0])
}
FORMS = {
    "agrpo_fills_no_kl": ("agrpo_fills", {"beta": 0}),
    "diffpo_thresholds": ("diffpo", {"threshold_lr": 0.02}),
    "diffpo_weights": ("diffpo", {"importance": "completion", "importance_cap": 1e4, "beta": 0}),
    "dmpo_unbiased": ("dmpo", {"centering": "unbiased", "alpha": 0.5}),
    "egspo_alone": ("egspo", {"lam": 0}),
    "trace_rl_values": ("trace_rl", {"value_lr": 0.02, "value_lambda": 0.5}),
    "trafl_profiled": ("trafl", {"normaliser": "profiled"}),
}
"""Methods with optional parts that ranks or forwards have other work with: the type, and what is set."""
THRESHOLDS = (0.013, 0.0145, 0.5)
METHODS = sorted([*VARIANTS, *FORMS])


def at(method: str, ranks: int = 1, stage: int = 0, views: int = 16) -> RunConfig:
    """With a strong KL term where the method has one, so that it matters in the first update too."""
    kl = {"objective__beta": 1.0} if "beta" in type(section(method)).model_fields else {}
    layout = {"learner__ranks": ranks, "learner__zero_stage": stage, "learner__views_per_forward": views}
    spec = sampler_of(method)
    sampler = {f"rollout__sampler__{key}": getattr(spec, key) for key in ("block_length", "position_rule", "steps")}
    if isinstance(spec.threshold, tuple):
        sampler["rollout__sampler__threshold"] = list(spec.threshold)
    kind, changes = FORMS.get(method, (method, {}))
    form = {**kl, "objective__type": kind, **{f"objective__{key}": value for key, value in changes.items()}}
    return settings(**form, learner__updates_per_batch=2, **sampler, **layout)


def section(method: str) -> ObjectiveSection:
    """Its settings, without the KL term."""
    kind, changes = FORMS.get(method, (method, {}))
    return VARIANTS[kind](**changes)


def sampler_of(method: str) -> SamplerSpec:
    """The one of all tests, or one token a step from left to right where the method asks for that."""
    if "threshold_lr" in FORMS.get(method, (method, {}))[1]:
        return dataclasses.replace(SAMPLER, threshold=THRESHOLDS)
    if not section(method).refuses(SAMPLER):
        return SAMPLER
    return dataclasses.replace(SAMPLER, position_rule="left_to_right", steps=SAMPLER.completion_length)


Drawing = tuple[SamplerSpec, BranchSpec | None]


def drawing_of(method: str) -> Drawing:
    return sampler_of(method), section(method).branches(sampler_of(method))


def draw_batches(model_path: str, adapter: AdapterState) -> dict[Drawing, list[TrajectoryGroup]]:
    """A batch for each way in which any of the methods draws."""
    return {how: draw_batch(model_path, settings(), adapter, *how) for how in set(map(drawing_of, METHODS))}


def update_of(objective: Objective, family: PolicyAdapter, groups: Sequence[TrajectoryGroup]) -> UpdatePlan:
    """The first update on the groups, for one rank."""
    return plan_update(
        groups,
        objective=objective,
        run_seed=1,
        update_index=0,
        eos_ids=(family.eos_token_id,),
        ranks=1,
        views_per_forward=16,
    )


def batch_of(
    forward: Forward, objective: Objective, family: PolicyAdapter, groups: Sequence[TrajectoryGroup]
) -> ViewBatch:
    """As a rank builds it."""
    return build_batch(
        forward.views,
        groups,
        mask_id=family.mask_token_id,
        pad_id=family.pad_token_id,
        law=objective.needs.law,
        unit_sizes=[len(unit) for unit in forward.units],
    )


def loss_of(model: torch.nn.Module, batch: ViewBatch, objective: Objective, family: PolicyAdapter) -> torch.Tensor:
    """Of one forward in an update that is its batch's first; a head's values are 0, as at first."""
    needs = objective.needs
    policy = score(model, batch, family=family, vocabulary=needs.vocabulary)
    if needs.head is not None:
        zeros = {"value_Z": policy.logp_N.new_zeros(len(batch.views)), "value_N": torch.zeros_like(policy.logp_N)}
        policy = dataclasses.replace(policy, **zeros)
    reference: Scores | None = None
    if needs.reference:
        with torch.no_grad(), model.disable_adapter():
            reference = score(model, batch, family=family)
    return objective.loss(PolicyScores(policy, policy.detached(), reference, policy.detached()), batch)[0]
