"""Forward-equivalents are what the models in fact do: rows through real engines and ranks, counted by hooks."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from learner.comparison.budget import planned_cost
from learner.ranks.rank import UpdateReport, lora_spec
from learner.settings.forwards import forward_equivalents
from learner.settings.run import RunConfig, load_config
from rewards.task import Problem
from rollout.adapters import AdapterState
from rollout.engines.torch import TorchEngine
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.learner_ranks import ProbedGroup, importing_ray, put, random_adapter, settings

METHODS = {
    "agrpo": 1,  # later updates of its batch draw other numbers of different steps
    "diffu_grpo": 2,  # old and reference
    "wd1": 2,  # neither
    "espo": 3,  # old and reference
    "dmpo": 2,  # measures once a batch
    "dmpo_unbiased": 2,  # and the policy alone before each update
    "rspo": 2,  # measures before each update
    "trafl": 2,  # reference, and a head that reads the prompts before each update
}
"""Updates per batch."""
ROUGHLY = ("espo", "dmpo", "dmpo_unbiased")
"""A drawn mask of everything has no complement to score, so that copies differ by a few views."""


def config_of(method: str) -> RunConfig:
    form = {"objective__type": method}
    if method == "dmpo_unbiased":
        form = {"objective__type": "dmpo", "objective__centering": "unbiased"}
    return settings(**form, learner__updates_per_batch=METHODS[method], **BATCH)


BATCH = {"rollout__prompts_per_iteration": 4, "rollout__group_size": 4, "rollout__groups_per_lease": 4}


def counted(config: RunConfig, groups: Sequence[TrajectoryGroup], reports: Sequence[UpdateReport]) -> float:
    """As the controller counts it."""
    return forward_equivalents(
        config,
        steps=sum(int(group.nfe.sum()) for group in groups),
        completions=reports[0].plan_statistics["completions"],
        views=[report.plan_statistics["views"] for report in reports],
    )


def drawn(model: str, sampler: SamplerSpec) -> tuple[list[TrajectoryGroup], int]:
    """4 groups of 4, of which one has no signal; and the rows that went through the engine's model."""
    engine = TorchEngine(model_path=model, lora=lora_spec(settings()), max_rows=6, threads=1)
    rows: Counter[str] = Counter()

    def called(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows["rows"] += len(kwargs["input_ids"])

    engine.model.register_forward_pre_hook(called, with_kwargs=True)
    specs = [GroupSpec(i, Problem(f"p{i}", {}), 4, 31 + i) for i in range(4)]
    groups = engine.generate(specs, [list(range(10, 28 + i % 2)) for i in range(4)], sampler)
    rewards = np.random.default_rng(2).random((4, 4, 1)).astype(np.float32)
    rewards[1] = 0.25
    return [
        dataclasses.replace(group, rewards=rewards_GR, reward_names=("shape",))
        for group, rewards_GR in zip(groups, rewards, strict=True)
    ], rows["rows"]


@pytest.fixture(scope="module")
def batch(tiny_model: str) -> tuple[list[TrajectoryGroup], int]:
    return drawn(tiny_model, load_config(["recipe=sudoku"]).rollout.sampler.spec())


def test_rollouts_cost_the_rows_that_went_through_the_model(batch: tuple[list[TrajectoryGroup], int]) -> None:
    groups, rows = batch
    assert rows == 16 * 8 == sum(int(group.nfe.sum()) for group in groups)
    assert forward_equivalents(config_of("wd1"), steps=rows, completions=0.0, views=[0.0, 0.0]) == rows


@pytest.fixture(scope="module")
def ranks(tiny_model: str) -> Iterator[ProbedGroup]:
    with importing_ray(cpus=2):
        group = ProbedGroup(settings(), tiny_model)
        yield group
        group.close()


@pytest.fixture(scope="module")
def adapter(tiny_model: str) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_costs_what_its_model_does(
    method: str,
    ranks: ProbedGroup,
    adapter: AdapterState,
    batch: tuple[list[TrajectoryGroup], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, (groups, rows) = config_of(method), batch
    ranks.restart(config, adapter)
    ranks.ask("counted")
    refs = put(groups)
    reports = [ranks.update(refs, index, 1e-4) for index in range(METHODS[method])]
    (counts,) = ranks.ask("counted")
    worked = rows + 3 * counts["policy_rows"] + counts.get("reference_rows", 0)
    found = counted(config, groups, reports)
    assert found == (pytest.approx(worked, rel=0.02) if method in ROUGHLY else worked)
    assert worked <= planned_cost(config), "what is planned is the most that it can be"
    # The control: a cost that leaves out what is scored without gradient is another one, where there is some.
    cost = config.objective.cost(config.rollout.sampler.spec())
    for field in ("old", "reference", "measured", "remeasured", "prompts"):
        if getattr(cost, field):
            less = dataclasses.replace(cost, **{field: 0})
            monkeypatch.setattr(type(config.objective), "cost", lambda self, sampler, less=less: less)
            assert counted(config, groups, reports) < worked
            monkeypatch.undo()
    assert method == "wd1" or method == "agrpo" or counts["reference_rows"] > 0


@pytest.mark.parametrize(("limit", "learned"), [(100, 32), (20, 20)])
def test_no_more_is_learned_from_than_a_buffer_holds(limit: int, learned: int) -> None:
    changes = {"objective__buffer_prompts": 8, "objective__phase_iterations": 2, "objective__completions": limit}
    config = settings(objective__type="dtm", **changes, **BATCH)
    steps = config.rollout.sampler.steps
    assert planned_cost(config) == 6 * 4 * steps + 4 * learned, "8 groups, then 4; forward, backward, teacher"
