"""Real updates and rollouts of small random models in this process, for measuring what they hold in memory.

A learner step is a rank of one: DeepSpeed, the method and the plan as in a run, all of it but Ray. Its second update is
taken too, when AdamW has its moments.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from learner.bench.measure import peak_above
from learner.bench.model_free import prebuilt_group
from learner.bench.planned_cases import Case
from learner.bench.policy import BenchEngine, llada_config, warm_up
from learner.ranks.rank import lora_spec
from learner.ranks.trajectories import LearnerRank
from learner.runs.local_ray import LOOPBACK
from learner.settings.run import RunConfig
from rewards.task import Problem
from rollout.malloc import give_back_freed_memory
from rollout.messages import GroupRef
from rollout.models.family import policy_adapter
from rollout.models.llada import LLaDAModelLM
from rollout.models.loading import load_model
from rollout.models.lora import attach_lora
from rollout.seeds import numpy_generator
from rollout.trajectory import GroupSpec, TrajectoryGroup, outline

UPDATES = 2


class _Rank(LearnerRank):
    """A rank that is handed its groups themselves, in the place of references to them."""

    def _fetched(self, refs: Sequence[Any], what: str) -> list[TrajectoryGroup]:
        return list(refs)


def update_peak(case: Case, folder: str) -> int:
    """Bytes that a batch's two updates need above the rank's own, at their peak."""
    config = case.config(folder)
    pairs: list[tuple[Any, Any]] = [(group, outline(group)) for group in _groups(case, config, folder)]
    groups = [GroupRef(*pair) for pair in pairs]
    rank = _Rank(config, folder, 0, 1)
    rank.start(rank.listen(LOOPBACK), None, None)
    give_back_freed_memory()
    if config.objective.phases() is not None:
        rank.enter_phase(0, None)
    warm_up(rank.engine.module, train=True)

    def updates() -> None:
        for index in range(UPDATES):
            report = rank.update(groups, index, config.learner.lr)
            assert report.applied

    return peak_above(updates)


def rollout_peak(case: Case, folder: str) -> int:
    """Bytes that drawing a group needs above the engine's own, at its peak."""
    config = case.config(folder)
    engine = _engine(config, folder)
    warm_up(engine.model, train=False)
    return peak_above(lambda: _drawn(engine, case, config))


def save_model(case: Case, folder: str) -> None:
    """Write a LLaDA of the case's sizes with random weights."""
    torch.manual_seed(0)
    LLaDAModelLM(llada_config(case.shape)).to(getattr(torch, case.dtype)).save_pretrained(folder)


def _groups(case: Case, config: RunConfig, folder: str) -> list[TrajectoryGroup]:
    """What the updates learn from: drawn by the engine where a method needs what only that records."""
    sampler, shape = config.rollout.sampler.spec(), case.shape
    if sampler.scores_positions or config.objective.branches(sampler) is not None:
        return _drawn(_engine(config, folder), case, config)
    group = prebuilt_group(**shape.group)
    return [dataclasses.replace(group, group_id=index) for index in range(case.groups)]


def _engine(config: RunConfig, folder: str) -> BenchEngine:
    family = policy_adapter(folder)
    model = attach_lora(load_model(folder, config.learner.dtype), family, lora_spec(config))
    return BenchEngine(model, family, max_rows=config.rollout.max_rows)


def _drawn(engine: BenchEngine, case: Case, config: RunConfig) -> list[TrajectoryGroup]:
    """The case's groups from the engine, each completion and branch with a reward of its own."""
    shape, sampler = case.shape, config.rollout.sampler.spec()
    prompt = numpy_generator("bench prompt").integers(0, shape.vocabulary - 2, shape.prompt).tolist()
    specs = [GroupSpec(index, Problem("bench", {}), shape.rows, index) for index in range(case.groups)]
    branches = config.objective.branches(sampler)
    groups = engine.generate(specs, [prompt] * case.groups, sampler, branches=branches)
    rewards = np.linspace(0.0, 1.0, shape.rows, dtype=np.float32)[:, None]
    graded = [dataclasses.replace(group, rewards=rewards, reward_names=("reward",)) for group in groups]
    if branches is None:
        return graded
    of_branches = np.linspace(0.0, 1.0, shape.rows * branches.states * branches.fills, dtype=np.float32)
    shaped = of_branches.reshape(shape.rows, branches.states, branches.fills, 1)
    return [dataclasses.replace(group, branch_rewards=shaped) for group in graded]
