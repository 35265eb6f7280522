"""The largest forward of a rank, as the plan has it, against real plans of updates of every method."""

import dataclasses
from typing import get_args

import numpy as np
import pytest

from learner.bench.model_free import prebuilt_group
from learner.likelihood.views import Law
from learner.objectives import make_objective
from learner.planning.memory import scored_rows
from learner.planning.scored import LargestForward, largest_forward
from learner.ranks.plan import plan_update
from learner.settings.objective import ObjectiveSection
from learner.settings.objectives import ObjectiveConfig
from learner.settings.run import RunConfig, load_config
from rollout.sampling.branches import drawn_step
from rollout.trajectory import DrawnBranches, TrajectoryGroup

VARIANTS: dict[str, type[ObjectiveSection]] = {
    v.model_fields["type"].default: v for v in get_args(get_args(ObjectiveConfig)[0])
}
C, BLOCK, STEPS, SIZE, GROUPS = 64, 32, 16, 8, 4
ITERATIONS = 10
FORMS: dict[str, tuple[str, ...]] = {
    **{method: (f"objective.type={method}",) for method in VARIANTS},
    "just_grpo": (
        "objective.type=just_grpo",
        "rollout.sampler.position_rule=left_to_right",
        "rollout.sampler.steps=64",
    ),
    "dtm of all": ("objective.type=dtm", "objective.scored=all"),
    "dmpo of independent masks": ("objective.type=dmpo", "objective.antithetic=false"),
    "espo of plain masks": ("objective.type=espo", "objective.estimator=plain"),
    "spg of the text": ("objective.type=spg", "objective.masking=random"),
    "spg of whole blocks": ("objective.type=spg", "objective.masking=block_all"),
    "profiled trafl": ("objective.type=trafl", "objective.normaliser=profiled"),
    "dispo of masks": ("objective.type=dispo", "objective.base.type=espo"),
}
ABOVE_THE_MEAN = ("dispo", "bgpo", "rspo", "dtm", "dmpo of independent masks", "spg of the text")


def config_of(form: str, views: int) -> RunConfig:
    return load_config(
        [
            "recipe=sudoku", f"run.iterations={ITERATIONS}", "rollout.groups_per_lease=1",
            f"rollout.prompts_per_iteration={GROUPS}",
            f"rollout.group_size={SIZE}", f"rollout.sampler.completion_length={C}",
            f"rollout.sampler.block_length={BLOCK}", f"rollout.sampler.steps={STEPS}",
            f"learner.views_per_forward={views}", *FORMS[form],
        ]
    )  # fmt: skip


def drawn_groups(config: RunConfig, version: int) -> list[TrajectoryGroup]:
    """Of one iteration, with branches where the method asks for them."""
    sampler = config.rollout.sampler.spec()
    sizes = {"size": SIZE, "prompt": 20, "completion": C, "block": BLOCK, "steps": sampler.steps}
    group = dataclasses.replace(prebuilt_group(**sizes, kept=4, vocabulary=500), sampler=sampler)
    if (branches := config.objective.branches(sampler)) is None:
        return [dataclasses.replace(group, group_id=index, policy_version=version) for index in range(GROUPS)]
    shape = (SIZE, branches.states, branches.fills)
    groups = []
    for index in range(GROUPS):
        keys = [1000 * version + 100 * index + row for row in range(SIZE)]
        steps = (
            [[drawn_step(key, sampler.steps, branches.degree)] for key in keys]
            if isinstance(branches, DrawnBranches)
            else [np.random.default_rng(key).permutation(sampler.steps)[: branches.states] for key in keys]
        )
        found = {
            "branch_step": np.array(steps, dtype=np.int16),
            "branch_ids": np.repeat(group.completion_ids, shape[1] * shape[2], axis=0).reshape(*shape, C),
            "branch_rewards": np.random.default_rng(version).random((*shape, 1), dtype=np.float32),
            "branch_correct": np.zeros(shape, dtype=bool),
        }
        groups.append(dataclasses.replace(group, group_id=index, policy_version=version, **found))
    return groups


def planned_and_real(form: str, views: int) -> tuple[LargestForward, int, int]:
    """The plan's largest forward, and the most views and positions of a pass of all updates of a run."""
    config = config_of(form, views)
    objective, most_views, most_positions = make_objective(config.objective), 0, 0
    for version in range(config.run.iterations):
        plan = plan_update(
            drawn_groups(config, version),
            objective=objective,
            run_seed=0,
            update_index=0,
            eos_ids=(499,),
            ranks=1,
            views_per_forward=views,
        )
        for forward in plan.forwards[0]:
            of_views = [
                view.scored_n.size * (1 if view.fills is None else len(view.fills.ids_Fn)) for view in forward.views
            ]
            bounds = [len(of_views) * part // forward.passes for part in range(forward.passes + 1)]
            passes = [of_views[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
            most_views = max(most_views, *map(len, passes))
            most_positions = max(most_positions, *map(sum, passes))
    return largest_forward(config), most_views, most_positions


@pytest.mark.parametrize("views", [2, 8, 12, 16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_the_largest_forward_of_a_run(form: str, views: int) -> None:
    planned, most_views, most_positions = planned_and_real(form, views)
    print(f"{form}, {views}: views {planned.views} {most_views}, positions {planned.positions} {most_positions}")
    assert most_views <= planned.views <= most_views + 2
    assert planned.positions == pytest.approx(most_positions, rel=0.15)
    if form in ABOVE_THE_MEAN and views == 8:  # the control
        assert scored_rows(config_of(form, views), views)[0] < 0.85 * most_positions


@pytest.mark.parametrize("method", VARIANTS)
def test_costs_say_which_law_is_scored(method: str) -> None:
    config = config_of(method, 8).objective
    assert config.cost(config_of(method, 8).rollout.sampler.spec()).recorded == (
        make_objective(config).needs.law is Law.DRAWN
    )
