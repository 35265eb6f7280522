"""All methods of the settings, each with settings under which all its parts have work."""

import dataclasses
from typing import get_args

from learner.settings.objective import ObjectiveSection
from learner.settings.objectives import ObjectiveConfig
from learner.settings.run import RunConfig
from rollout.adapters import AdapterState
from rollout.trajectory import BranchSpec, SamplerSpec, TrajectoryGroup
from tests.support.learner_ranks import SAMPLER, draw_batch, settings

VARIANTS: dict[str, type[ObjectiveSection]] = {
    v.model_fields["type"].default: v for v in get_args(get_args(ObjectiveConfig)[0])
}
FORMS = {
    "diffpo_thresholds": ("diffpo", {"threshold_lr": 0.02}),
    "diffpo_weights": ("diffpo", {"importance": "completion", "importance_cap": 1e4, "beta": 0}),
    "trace_rl_values": ("trace_rl", {"value_lr": 0.02, "value_lambda": 0.5}),
}
"""Methods with optional parts that the ranks have work with: the type, and what is set."""
THRESHOLDS = (0.013, 0.0145, 0.5)
METHODS = sorted([*VARIANTS, *FORMS])


def at(method: str, ranks: int = 1, stage: int = 0, views: int = 16) -> RunConfig:
    """With a strong KL term where the method has one, so that it matters in the first update too."""
    kl = {"objective__beta": 1.0} if "beta" in variant(method).model_fields else {}
    layout = {"learner__ranks": ranks, "learner__zero_stage": stage, "learner__views_per_forward": views}
    spec = sampler_of(method)
    sampler = {f"rollout__sampler__{key}": getattr(spec, key) for key in ("block_length", "position_rule", "steps")}
    if isinstance(spec.threshold, tuple):
        sampler["rollout__sampler__threshold"] = list(spec.threshold)
    kind, changes = FORMS.get(method, (method, {}))
    form = {**kl, "objective__type": kind, **{f"objective__{key}": value for key, value in changes.items()}}
    return settings(**form, learner__updates_per_batch=2, **sampler, **layout)


def variant(method: str) -> type[ObjectiveSection]:
    return VARIANTS[FORMS.get(method, (method, {}))[0]]


def sampler_of(method: str) -> SamplerSpec:
    """The one of all tests, or one token a step from left to right where the method asks for that."""
    if "threshold_lr" in FORMS.get(method, (method, {}))[1]:
        return dataclasses.replace(SAMPLER, threshold=THRESHOLDS)
    if not variant(method)().refuses(SAMPLER):
        return SAMPLER
    return dataclasses.replace(SAMPLER, position_rule="left_to_right", steps=SAMPLER.completion_length)


Drawing = tuple[SamplerSpec, BranchSpec | None]


def drawing_of(method: str) -> Drawing:
    return sampler_of(method), variant(method)().branches(sampler_of(method))


def draw_batches(model_path: str, adapter: AdapterState) -> dict[Drawing, list[TrajectoryGroup]]:
    """A batch for each way in which any of the methods draws."""
    return {how: draw_batch(model_path, settings(), adapter, *how) for how in set(map(drawing_of, METHODS))}
