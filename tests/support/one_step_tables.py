"""A denoiser of free logits for tests of methods that score a completion all masked: one table for each state of the
prompt, since nothing else differs between their views."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Law, Unit, ViewBatch, build_batch
from learner.objectives.base import Objective
from learner.objectives.statistics import Statistics
from learner.ranks.plan import plan_update
from rollout.trajectory import TrajectoryGroup
from tests.support.hand_made import make_group

EOS, MASK, V, C, P = 1, 9, 9, 4, 2


def text_group(*texts: list[int], rewards: Sequence[float] | None = None, group_id: int = 0) -> TrajectoryGroup:
    """Completions of C positions that end in EOS, sampled in one step; the prompt has P tokens."""
    ids = [text + [EOS] * (C - len(text)) for text in texts]
    rewards_GR = None if rewards is None else [[r] for r in rewards]
    return make_group(ids, np.zeros((len(ids), C)), steps=1, rewards=rewards_GR, group_id=group_id)


def table(seed: int = 0, *, gradient: bool = True) -> torch.Tensor:
    """[2^P states of the prompt, C, V] float64."""
    return torch.tensor(np.random.default_rng(seed).normal(size=(2**P, C, V)), requires_grad=gradient)


def build(units: Sequence[Unit], groups: Sequence[TrajectoryGroup], law: Law = Law.RAW) -> ViewBatch:
    views = [view for unit in units for view in unit]
    return build_batch(views, groups, mask_id=MASK, pad_id=0, law=law, unit_sizes=[len(unit) for unit in units])


def table_logp(theta: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    states_Z = (batch.input_ids[:, -C - P : -C] == MASK) @ 2 ** np.arange(P)
    return theta.log_softmax(-1)[states_Z[batch.view_of_score], batch.position, batch.targets]


class Denoiser(NamedTuple):
    """A kind of table."""

    table: Callable[..., torch.Tensor]
    """(seed, gradient=) -> the logits"""
    logp: Callable[[torch.Tensor, ViewBatch], torch.Tensor]
    """[N] of a batch's tokens"""


ONE_STEP = Denoiser(table, table_logp)


def scored(
    theta: torch.Tensor,
    batch: ViewBatch,
    *,
    old: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    denoiser: Denoiser = ONE_STEP,
) -> PolicyScores:
    """The batch under each table; without ``old`` the policy hasn't moved."""

    def scores(logits: torch.Tensor) -> Scores:
        logp_N = denoiser.logp(logits, batch)
        return Scores(logp_N, torch.ones_like(logp_N))

    policy = scores(theta)
    return PolicyScores(
        policy,
        policy.detached() if old is None else scores(old),
        None if reference is None else scores(reference),
    )


def prompt_masks(rate: float) -> Iterator[tuple[float, np.ndarray]]:
    """Every mask of the prompt, with its probability."""
    for bits in itertools.product([False, True], repeat=P):
        mask_P = np.array(bits)
        yield float(rate ** mask_P.sum() * (1 - rate) ** (~mask_P).sum()), mask_P


def planned_gradient(
    objective: Objective,
    groups: Sequence[TrajectoryGroup],
    *,
    ranks: int,
    views_per_forward: int,
    backwards: bool = False,
    per_forward: bool = False,
    denoiser: Denoiser = ONE_STEP,
) -> tuple[np.ndarray, dict[str, float]]:
    """Gradient of an update of a table that is neither the old one nor the reference, summed over all forwards of all
    ranks, and the merged figures.

    Args:
        backwards: turn the units of each forward round.
        per_forward: the mistake of dividing by what is in a forward.
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
    theta = denoiser.table(0)
    old, reference = (denoiser.table(seed, gradient=False) for seed in (1, 2))
    figures = []
    for forward in (forward for rank in plan.forwards for forward in rank):
        if forward.is_pad:
            continue
        units = list(forward.units)
        batch = build(units[::-1] if backwards else units, groups, objective.needs.law)
        scores = scored(theta, batch, old=old, reference=reference, denoiser=denoiser)
        loss, part = objective.loss(scores, batch)
        (loss / (len(units) if per_forward else plan.normaliser)).backward()
        figures.append(part)
    assert theta.grad is not None
    return theta.grad.numpy(), Statistics.merged(figures).values()


def assert_layout_changes_nothing(
    objective: Objective, groups: Sequence[TrajectoryGroup], ranks: int, views_per_forward: int, denoiser: Denoiser
) -> None:
    """Gradient and figures of an update are the same in this layout as in one forward; a divisor per forward isn't."""
    whole, figures = planned_gradient(objective, groups, ranks=1, views_per_forward=1000, denoiser=denoiser)

    def dealt(**changes: bool) -> tuple[np.ndarray, dict[str, float]]:
        layout = {"ranks": ranks, "views_per_forward": views_per_forward}
        return planned_gradient(objective, groups, **layout, **changes, denoiser=denoiser)

    ours, ours_figures = dealt(backwards=True)
    assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
    assert ours_figures == pytest.approx(figures)
    wrong, _ = dealt(per_forward=True)
    assert np.linalg.norm(wrong - whole) > 1e-2 * np.linalg.norm(whole), "control: a divisor per forward"
