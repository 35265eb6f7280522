"""Groups of branched completions: made by hand, and all that a table denoiser can write.

Shapes: G completions of a group, S branched states, C completion positions, n trajectories.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import ViewBatch, build_batch
from learner.objectives.base import Objective, UpdateContext
from learner.verification.enumeration import EOS, Toy, enumerate_trajectories, independent_law, pair_up
from rollout.sampling.branches import highest_entropy_steps
from rollout.trajectory import TrajectoryGroup

CONTEXT = UpdateContext(3, 0, groups=1, eos_ids=(EOS,))


def with_branches(group: TrajectoryGroup, steps_GS: Any, rewards_GS: Any) -> TrajectoryGroup:
    """Greedy ones whose fills are the completions themselves; the rewards have one component beside zeros."""
    step_GS, reward_GS = np.asarray(steps_GS, np.int16), np.asarray(rewards_GS, np.float32)
    (G, S), R = step_GS.shape, len(group.reward_names)
    rewards = np.zeros((G, S, 1, R), np.float32)
    rewards[:, :, 0, 0] = np.where(step_GS >= 0, reward_GS, 0)
    branched = dataclasses.replace(
        group,
        branch_step=step_GS,
        branch_ids=np.repeat(group.completion_ids[:, None, None], S, axis=1),
        branch_rewards=rewards,
        branch_correct=np.zeros((G, S, 1), bool),
    )
    branched.validate()
    return branched


@cache
def by_entropy(toy: Toy) -> TrajectoryGroup:
    """All trajectories, branched before all of their steps, in the order of entropy."""
    group = _all_of(toy)
    last_n = np.full(group.size, toy.steps)
    steps_nS = highest_entropy_steps(group.unmask_step, group.drawn, group.entropy, states=toy.steps, last_G=last_n)
    return _filled(toy, group, steps_nS)


@cache
def in_order(toy: Toy, states: int) -> TrajectoryGroup:
    """All trajectories, branched before evenly spaced steps."""
    group = _all_of(toy)
    step_S = np.arange(states) * toy.steps // states
    last_n = np.where(group.drawn, group.unmask_step, -1).max(axis=1)
    return _filled(toy, group, np.where(step_S <= last_n[:, None], step_S, -1).astype(np.int16))


def _all_of(toy: Toy) -> TrajectoryGroup:
    paths = enumerate_trajectories(toy)
    return pair_up(toy, paths, list(range(len(paths.ids))))


def _filled(toy: Toy, group: TrajectoryGroup, step_nS: np.ndarray) -> TrajectoryGroup:
    """With the likeliest fills of these states, and their rewards."""
    paths = enumerate_trajectories(toy)
    rewards = dict(zip(map(tuple, paths.ids.tolist()), paths.rewards().tolist(), strict=True))
    (n, S), C = step_nS.shape, toy.length
    ids = np.zeros((n, S, 1, C), np.int32)
    reward = np.zeros((n, S, 1, 2), np.float32)
    for row, rank in zip(*np.nonzero(step_nS >= 0), strict=True):
        hidden_C = paths.unmask_step[row] >= step_nS[row, rank]
        state = toy.state(np.where(hidden_C, toy.tokens, paths.ids[row]))
        ids[row, rank, 0] = np.where(hidden_C, toy.parameters[state].argmax(-1), paths.ids[row])
        reward[row, rank, 0] = rewards.get(tuple(ids[row, rank, 0].tolist()), (0.0, 0.0))
    return dataclasses.replace(
        group,
        branch_step=step_nS,
        branch_ids=ids,
        branch_rewards=reward,
        branch_correct=np.zeros((n, S, 1), bool),
    )


def rows_of(everything: TrajectoryGroup, rows: Sequence[int]) -> TrajectoryGroup:
    """A group of these of its completions."""
    names = [field.name for field in dataclasses.fields(everything) if field.name != "prompt_ids"]
    arrays = {name: value for name in names if isinstance(value := getattr(everything, name), np.ndarray)}
    return dataclasses.replace(everything, **{name: value[list(rows)] for name, value in arrays.items()})


def mean_gradient(
    toy: Toy,
    objective: Objective,
    everything: TrajectoryGroup,
    *,
    others: Sequence[TrajectoryGroup] = (),
    size: int = 2,
    rewarded: Callable[[TrajectoryGroup], TrajectoryGroup] = lambda group: group,
) -> np.ndarray:
    """Minus the gradient of the loss, averaged over all groups of ``size`` by their probability; shape of the table.

    Args:
        everything: all trajectories of the toy.
        others: further groups of the update, which are credited with it and not learned from.
        rewarded: gives a group what its completions are rewarded for together.
    """
    law_n = independent_law(toy, toy.parameters, enumerate_trajectories(toy))
    views, groups, divisor = [], [], 0.0
    for index, rows in enumerate(itertools.product(range(len(law_n)), repeat=size)):
        group = rewarded(rows_of(everything, rows))
        credit, *_ = objective.credit([group, *others])
        wanted = objective.wanted(index, group, credit, CONTEXT)
        chance = float(law_n[list(rows)].prod())
        # A ratio of 1 makes the loss linear in the advantage, so the chance may be its factor.
        views += [view._replace(credit=view.credit * chance) for unit in wanted.units for view in unit]
        groups.append(group)
        divisor = wanted.divisor
    batch = build_batch(views, groups, mask_id=toy.tokens, pad_id=toy.tokens + 2, law=objective.needs.law)
    theta = torch.tensor(toy.parameters, requires_grad=True)
    logp_N = _table_logp(toy, theta, batch)
    batch = dataclasses.replace(batch, logp=logp_N.detach().numpy())
    loss, _ = objective.loss(PolicyScores(Scores(logp_N, torch.ones_like(logp_N))), batch)
    (loss / divisor).backward()
    assert theta.grad is not None
    return -theta.grad.numpy()


def _table_logp(toy: Toy, theta: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    states_N = toy.state(batch.input_ids[:, -toy.length :])[batch.view_of_score]
    return theta.log_softmax(dim=-1)[states_N, batch.position, batch.targets]
