"""Which denoising steps of each completion are scored, and with which weight.

The exact log-likelihood of a completion is a sum over its m denoising steps. AGRPO (arXiv 2510.04019) draws k of them
and weights each so that the mean over draws estimates, without bias, the mean over steps:

    E_t[ w_t * f_t ] = (1/D) * sum over eligible t of f_t

D is m when every drawn action counts (step range ``all``), and the published T_eff = last + 1 for
``until_last_token``. All draws of a group come from one generator, before any row is sent to a rank, so that sharding
can't change them.

A step that is drawn twice costs one forward and says no more. So steps may also be taken at most once each
(``take_steps``): a step with probability p counts 1/p where it is taken (Horvitz and Thompson 1952), which leaves the
sum over all steps as expectation whatever p is, as long as it isn't 0.

Shapes: G completions of a group, C completion positions, m steps, k draws per completion. Arithmetic is float64.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rollout.trajectory import TrajectoryGroup

StepRange = Literal["all", "until_last_token"]
TimestepSampling = Literal["uniform", "entropy"]
Strata = Literal["none", "group", "row"]
"""Which draws are stratified together: all of a group, or the k of each completion."""

# Keeps a step of zero entropy drawable (published value).
ENTROPY_FLOOR = 1e-8


@dataclass(frozen=True)
class StepTable:
    """The steps of a group's completions that may be drawn."""

    eligible_Gm: np.ndarray
    """[G, m] bool: the step is in range and reveals at least one drawn token."""
    denominator_G: np.ndarray
    """[G] int64, D: a row's estimate is the sum over its eligible steps divided by this."""
    entropy_Gm: np.ndarray
    """[G, m] float64, nats: summed entropy of the tokens drawn at the step, and of the choice of their positions where
    that is an action too."""


class RowSteps(NamedTuple):
    """The steps drawn for one completion. Repeated draws are merged: a step is scored once, with its summed weight."""

    steps: np.ndarray
    """[n] int64, ascending, distinct."""
    counts: np.ndarray
    """[n] int64, how often each was drawn; they sum to k where draws repeat."""
    weights: np.ndarray
    """[n] float64, count times the importance weight of one draw. Divided by k, they add up to 1 on average where every
    step counts."""


def step_table(group: TrajectoryGroup, step_range: StepRange, eos_ids: tuple[int, ...]) -> StepTable:
    """Eligible steps of every row.

    ``all``: every step with a drawn token; D = m, whatever was filled. This one is unbiased for expected reward.
    ``until_last_token`` (published): steps up to the one that revealed the last token that is not EOS; EOS drawn at
    these steps is scored, later EOS is not, and D depends on the completion. A completion of EOS only keeps its step
    0, D = 1.
    """
    G, m = group.size, group.sampler.steps
    rows_GC, steps_GC = np.indices(group.unmask_step.shape)[0], group.unmask_step.astype(np.int64)
    entropy_Gm = np.zeros((G, m), dtype=np.float64)
    # A degenerate law's entropy may come out as -1e-9; a negative probability must not follow from it.
    entropy_GC = np.maximum(group.entropy.astype(np.float64), 0.0)
    np.add.at(entropy_Gm, (rows_GC[group.drawn], steps_GC[group.drawn]), entropy_GC[group.drawn])
    if group.position_entropy is not None:
        entropy_Gm += np.maximum(group.position_entropy.astype(np.float64), 0.0)
    eligible_Gm = np.zeros((G, m), dtype=bool)
    eligible_Gm[rows_GC[group.drawn], steps_GC[group.drawn]] = True
    denominator_G = np.full(G, m, dtype=np.int64)
    if step_range == "until_last_token":
        denominator_G = last_token_step(group, eos_ids).clip(min=0) + 1
        eligible_Gm &= np.arange(m) < denominator_G[:, None]
    assert eligible_Gm.any(axis=1).all(), f"group {group.group_id} has a completion without a drawn token in range"
    return StepTable(eligible_Gm, denominator_G, entropy_Gm)


def last_token_step(group: TrajectoryGroup, eos_ids: tuple[int, ...]) -> np.ndarray:
    """[G] int64, the largest step that revealed a token other than EOS; -1 where all tokens are EOS."""
    is_token_GC = ~np.isin(group.completion_ids, eos_ids)
    return np.where(is_token_GC, group.unmask_step, -1).max(axis=1).astype(np.int64)


def draw_uniforms(generator: np.random.Generator, completions: int, k: int, *, strata: Strata) -> np.ndarray:
    """[G, k] float64: k uniforms per completion.

    With strata over the group the S = G*k numbers fall one in each of S equal strata, in random order: each is still
    uniform on its own, which is all that unbiasedness needs. With strata over a row its k numbers fall one in each of k
    strata: the mean over the row's draws of a function of u still has the function's mean as expectation.
    """
    S = completions * k
    order_S, jitter_S = generator.permutation(S), generator.random(S)
    if strata == "row":
        return stratify(np.arange(k), jitter_S.reshape(completions, k))
    return (stratify(order_S, jitter_S) if strata == "group" else jitter_S).reshape(completions, k)


def stratify(order_S: np.ndarray, jitter_S: np.ndarray) -> np.ndarray:
    """u = (order + jitter) / S. May round to exactly 1.0 in the last stratum."""
    return (order_S + jitter_S) / order_S.shape[-1]


def step_probabilities(table: StepTable, sampling: TimestepSampling, weight_floor: float = 0.0) -> np.ndarray:
    """[G, m] float64: the probability that one draw picks the step; 0 where it isn't eligible.

    ``uniform``: equal. ``entropy``: proportional to the step's entropy, so that steps with something to decide are
    scored more often. ``weight_floor`` a mixes in the uniform law, (1-a) p + a/T for T eligible steps: still unbiased,
    and no importance weight exceeds 1/a.
    """
    uniform_Gm = table.eligible_Gm / table.eligible_Gm.sum(axis=1, keepdims=True)
    if sampling == "uniform":
        return uniform_Gm
    mass_Gm = np.where(table.eligible_Gm, table.entropy_Gm + ENTROPY_FLOOR, 0.0)
    entropy_Gm = mass_Gm / mass_Gm.sum(axis=1, keepdims=True)
    return (1.0 - weight_floor) * entropy_Gm + weight_floor * uniform_Gm


def draw_timesteps(
    table: StepTable, u_Gk: np.ndarray, sampling: TimestepSampling, weight_floor: float = 0.0
) -> list[RowSteps]:
    """Turn each completion's uniforms into steps and weights w = (1/D) / p."""
    p_Gm = step_probabilities(table, sampling, weight_floor)
    rows = []
    for eligible_m, p_m, u_k, denominator in zip(table.eligible_Gm, p_Gm, u_Gk, table.denominator_G, strict=True):
        eligible_T = np.flatnonzero(eligible_m)
        if sampling == "uniform":
            index_k = np.floor(u_k * len(eligible_T)).astype(np.int64)
        else:
            index_k = np.searchsorted(np.cumsum(p_m[eligible_T]), u_k, side="left")
        # u may round to 1.0 and the cumulative sum may end just below it.
        drawn_k = eligible_T[np.minimum(index_k, len(eligible_T) - 1)]
        steps, counts = np.unique(drawn_k, return_counts=True)
        rows.append(RowSteps(steps, counts, counts / (denominator * p_m[steps])))
    return rows


def once_probabilities(
    table: StepTable, size_Gm: np.ndarray, k: int, sampling: TimestepSampling, weight_floor: float = 0.0
) -> np.ndarray:
    """[G, m] float64: the probability that each step is taken where none is taken twice: in proportion to its law and
    its size, k for each completion that has a size above 0."""
    law_Gm = step_probabilities(table, sampling, weight_floor)
    return inclusion_probabilities(size_Gm * law_Gm, k * float((size_Gm > 0).any(axis=1).sum()))


def inclusion_probabilities(size_Gm: np.ndarray, taken: float) -> np.ndarray:
    """[G, m] float64: probabilities in proportion to ``size_Gm`` but at most 1, which add up to ``taken``, or are 1
    wherever there is a size when there are no more such steps."""
    p_Gm = (size_Gm > 0).astype(np.float64)
    if p_Gm.sum() <= taken:
        return p_Gm
    settled_Gm = size_Gm <= 0
    while True:
        # What the steps of probability 1 leave is shared among the others, which may bring more of them to 1.
        left = taken - p_Gm[settled_Gm].sum()
        p_Gm[~settled_Gm] = size_Gm[~settled_Gm] * (left / size_Gm[~settled_Gm].sum())
        beyond_Gm = ~settled_Gm & (p_Gm > 1.0)
        if not beyond_Gm.any():
            return p_Gm
        p_Gm[beyond_Gm], settled_Gm = 1.0, settled_Gm | beyond_Gm


def take_steps(
    table: StepTable, p_Gm: np.ndarray, k: int, generator: np.random.Generator, *, together: bool
) -> list[RowSteps]:
    """Take each step with its probability, at most once, with weight w = (k/D) / p.

    Args:
        p_Gm: [G, m] float64, 0 where a step is never taken.
        together: with one uniform number for the whole group, so that as many are taken as the probabilities add up to,
            to the next whole number, and evenly over it (systematic sampling); otherwise one by one.
    """
    if together:
        # A step is taken where a whole number lies in its part of the line of all probabilities, moved by u.
        ends = np.concatenate([[0.0], np.cumsum(p_Gm)]) + generator.random()
        taken_Gm = np.diff(np.floor(ends)).reshape(p_Gm.shape) > 0
    else:
        taken_Gm = generator.random(p_Gm.shape) < p_Gm
    rows = []
    for taken_m, p_m, denominator in zip(taken_Gm & (p_Gm > 0), p_Gm, table.denominator_G, strict=True):
        steps = np.flatnonzero(taken_m)
        rows.append(RowSteps(steps, np.ones(len(steps), np.int64), k / (denominator * p_m[steps])))
    return rows
