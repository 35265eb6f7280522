"""Scores of units of views without a model: by tables of log-probs that stand in for it."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, Unit, ViewBatch, build_batch
from learner.objectives.base import Objective, RowSums, UpdateContext, Weighed
from learner.objectives.statistics import Statistics
from learner.ranks.plan import plan_update
from rollout.trajectory import TrajectoryGroup

EOS, MASK = 1, 9


def context(update_index: int = 0, run_seed: int = 3) -> UpdateContext:
    return UpdateContext(run_seed, update_index, groups=1, eos_ids=(EOS,))


def build(units: Sequence[Unit], groups: Sequence[TrajectoryGroup]) -> ViewBatch:
    views = [view for unit in units for view in unit]
    return build_batch(views, groups, mask_id=MASK, pad_id=0, law=Law.RAW, unit_sizes=[len(unit) for unit in units])


def scored(
    logp_N: torch.Tensor, old_N: torch.Tensor | None = None, reference_N: torch.Tensor | None = None
) -> PolicyScores:
    """Without ``old_N``: the policy's own, as in a batch's first update."""
    policy, old = (Scores(x, torch.ones_like(x)) for x in (logp_N, logp_N.detach() if old_N is None else old_N))
    return PolicyScores(policy, old, None if reference_N is None else Scores(reference_N, torch.ones_like(reference_N)))


def state_table(length: int, seed: int = 0) -> torch.Tensor:
    """Free logits of every set of masked positions, position and token: [2^C, C, 9] float64. (The states of one
    completion differ in what is masked only.)"""
    logits = np.random.default_rng(seed).normal(size=(2**length, length, MASK))
    return torch.tensor(logits, requires_grad=True)


def table_logp(theta: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    """[N], from a ``state_table``."""
    C = theta.shape[1]
    state_Z = (batch.input_ids[:, -C:] == MASK) @ 2 ** np.arange(C)
    return theta.log_softmax(-1)[state_Z[batch.view_of_score], batch.position, batch.targets]


def measured_sums(
    objective: Weighed, groups: Sequence[TrajectoryGroup], policy: torch.Tensor, reference: torch.Tensor
) -> RowSums:
    """What ranks would measure, from two ``state_table``s."""
    sums = RowSums(*(tuple(np.zeros(group.size) for group in groups) for _ in range(2)))
    for index, group in enumerate(groups):
        batch = build(objective.measured(index, group, context()), groups)
        row_N = np.array([view.row for view in batch.views])[batch.view_of_score]
        for found, theta in zip(sums[:2], (policy, reference), strict=True):
            np.add.at(found[index], row_N, batch.weight * table_logp(theta, batch).detach().numpy())
    return sums


def subsets(length: int, count: int) -> Iterator[np.ndarray]:
    """All sets of ``count`` positions, each [length] bool."""
    for chosen in itertools.combinations(range(length), count):
        yield np.isin(np.arange(length), chosen)


def exact_bound(theta: torch.Tensor, ids_C: np.ndarray) -> torch.Tensor:
    """The evidence lower bound of a completion by its definition: the mean over n = 1..C, and over sets of n masked
    positions, of C / n times the sum of the masked tokens' log-probs."""
    C, logp, total = len(ids_C), theta.log_softmax(-1), torch.zeros((), dtype=torch.float64)
    for n in range(1, C + 1):
        masks = list(subsets(C, n))
        for mask_C in masks:
            at_n = np.flatnonzero(mask_C)
            total = total + logp[int((2**at_n).sum()), at_n, ids_C[at_n]].sum() / n / len(masks)
    return total


def plan_gradient(
    objective: Objective,
    groups: Sequence[TrajectoryGroup],
    *,
    ranks: int,
    views_per_forward: int,
    reverse: bool = False,
    cut: bool = False,
) -> tuple[np.ndarray, dict[str, float]]:
    """The gradient of a table that stands in for the model, summed over ranks, and the merged figures. Old log-probs
    and reference are tables too.

    Args:
        reverse: the units of each forward the other way round.
        cut: a control, each view as a unit of its own.
    """
    plan = plan_update(
        groups,
        objective=objective,
        run_seed=1,
        update_index=1,
        eos_ids=(EOS,),
        ranks=ranks,
        views_per_forward=views_per_forward,
    )
    C, rng = groups[0].completion_ids.shape[1], np.random.default_rng(0)
    theta, old, reference = (torch.tensor(rng.normal(size=(C + 1, C, 10)), requires_grad=i == 0) for i in range(3))
    figures = []
    for forward in (forward for rank in plan.forwards for forward in rank):
        if forward.is_pad:
            continue
        units = list(forward.units)[::-1] if reverse else list(forward.units)
        batch = build([(view,) for view in forward.views] if cut else units, groups)
        masked_N = (batch.input_ids[:, -C:] == MASK).sum(axis=1)[batch.view_of_score]
        logp_N, old_N, reference_N = (
            0.1 * table.log_softmax(-1)[masked_N, batch.position, batch.targets] for table in (theta, old, reference)
        )
        loss, part = objective.loss(scored(logp_N, old_N, reference_N if objective.needs.reference else None), batch)
        (loss / plan.normaliser).backward()
        figures.append(part)
    assert theta.grad is not None
    return theta.grad.numpy(), Statistics.merged(figures).values()
