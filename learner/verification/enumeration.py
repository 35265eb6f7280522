"""The expected AGRPO gradient and the gradient of expected reward, both by enumeration.

A table denoiser (one free logit per state, position and token, EOS among the tokens) is small enough to list every
trajectory that the sampler can write, hence every group of them. Rewards, advantages, step tables, draws, views and
loss are the learner's own code; only the sum over trajectories and the integral over the uniforms are this module's.
With the normaliser G k and the step range ``all``, minus the gradient of the loss must be (G-1)/G * 1/m times the
finite-difference gradient of expected reward. ``learner.verify`` and the tests both ask.

Shapes: n trajectories, C completion positions, m steps, k draws, G completions of a group, S = G k, Q cases of the
uniforms. A table ``theta`` is [states, C, tokens] float64, the logits of each state and position.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.timesteps import StepTable, draw_timesteps, step_probabilities, step_table, stratify
from learner.likelihood.views import build_batch, step_view
from learner.objectives.advantages import group_advantages
from learner.objectives.agrpo import Agrpo
from learner.settings.methods.states import AgrpoConfig
from rollout.trajectory import SamplerSpec, TrajectoryGroup

EOS = 0
G = 2
K = 2


@dataclass(frozen=True)
class Toy:
    """A sampler of ``length`` positions in blocks, over ``tokens`` tokens, EOS = 0 among them; mask id = tokens."""

    length: int
    tokens: int
    block: int
    per_step: int

    @property
    def steps(self) -> int:
        return self.length // self.per_step

    @property
    def parameters(self) -> np.ndarray:
        """The table of logits, [states, C, tokens] float64; the same each time."""
        shape = ((self.tokens + 1) ** self.length, self.length, self.tokens)
        return np.random.default_rng(1).normal(size=shape) * 0.7

    def state(self, ids: np.ndarray) -> np.ndarray:
        """Table row of a partly masked completion, [..., C] -> [...]."""
        return ids @ (self.tokens + 1) ** np.arange(self.length)


@dataclass(frozen=True)
class Trajectories:
    """All that a sampler can write, as [n, C] arrays, and the [n] probability of each order, free of the model."""

    ids: np.ndarray
    unmask_step: np.ndarray
    drawn: np.ndarray
    order: np.ndarray

    def states(self, toy: Toy) -> np.ndarray:
        """[n, C], the state in which each position was revealed."""
        masked = self.unmask_step[:, None, :] >= self.unmask_step[:, :, None]
        return toy.state(np.where(masked, toy.tokens, self.ids[:, None, :]))

    def rewards(self) -> np.ndarray:
        """[n, 2] in eighths, so that float32 holds them exactly; a function of the final tokens."""
        rng = np.random.default_rng(7)
        table = {ids: rng.integers(0, 9, 2) / 8 for ids in sorted({tuple(row) for row in self.ids.tolist()})}
        return np.array([table[tuple(row)] for row in self.ids.tolist()])


Law = Callable[[Toy, np.ndarray, Trajectories], np.ndarray]
"""(toy, table, trajectories) -> [n] float64, the probability of each trajectory."""

SMALLEST = Toy(length=2, tokens=2, block=2, per_step=1)
RANDOM_ORDER = Toy(length=2, tokens=3, block=2, per_step=1)
THREE_POSITIONS = Toy(length=3, tokens=2, block=3, per_step=1)
RETIRING = Toy(length=2, tokens=3, block=1, per_step=1)
BLOCKS = Toy(length=4, tokens=2, block=2, per_step=1)
TWO_TOKENS_A_STEP = Toy(length=4, tokens=2, block=2, per_step=2)


@cache
def enumerate_trajectories(toy: Toy) -> Trajectories:
    """Every completion in every order of its positions, those included that end early after a block of EOS."""
    found = []

    def extend(ids: tuple[int, ...], unmask: tuple[int, ...], drawn: tuple[bool, ...], order: float) -> None:
        done = len(ids)
        if done == toy.length:
            found.append((ids, unmask, drawn, order))
            return
        first_step = done // toy.per_step
        if done and all(token == EOS for token in ids[-toy.block :]):
            rest = toy.length - done
            extend(ids + (EOS,) * rest, unmask + (first_step,) * rest, drawn + (False,) * rest, order)
            return
        orders = {tuple(p // toy.per_step for p in perm) for perm in itertools.permutations(range(toy.block))}
        for steps in orders:
            for tokens in itertools.product(range(toy.tokens), repeat=toy.block):
                later = tuple(first_step + s for s in steps)
                extend(ids + tokens, unmask + later, drawn + (True,) * toy.block, order / len(orders))

    extend((), (), (), 1.0)
    ids, unmask, drawn, order = (np.array(column) for column in zip(*found, strict=True))
    return Trajectories(ids, unmask, drawn, order)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def token_logp(toy: Toy, theta: np.ndarray, paths: Trajectories) -> np.ndarray:
    """[n, C], log-prob of each drawn token in its state, 0 where filled."""
    logp = log_softmax(theta)[paths.states(toy), np.arange(toy.length), paths.ids]
    return np.where(paths.drawn, logp, 0.0)


def independent_law(toy: Toy, theta: np.ndarray, paths: Trajectories) -> np.ndarray:
    """[n] probability of each trajectory when positions are chosen without looking at the model."""
    return paths.order * np.exp(token_logp(toy, theta, paths).sum(axis=1))


def low_confidence_law(toy: Toy, theta: np.ndarray, paths: Trajectories) -> np.ndarray:
    """[n]: every masked position proposes a token, the most probable proposal is kept (one block, one token a step)."""
    q = np.exp(log_softmax(theta))
    law = np.ones(len(paths.ids))
    for n, (ids, unmask, states) in enumerate(zip(paths.ids, paths.unmask_step, paths.states(toy), strict=True)):
        for i in range(toy.length):
            chosen = q[states[i], i, ids[i]]
            others = [q[states[i], j] for j in range(toy.length) if unmask[j] > unmask[i]]
            law[n] *= chosen * math.prod(other[other < chosen].sum() for other in others)
    return law


def reward_gradient(toy: Toy, law: Law, paths: Trajectories) -> np.ndarray:
    """Gradient of expected reward by the table, central differences, float64; shape of the table."""
    theta, reward, eps = toy.parameters, paths.rewards().sum(axis=1), 1e-5
    gradient = np.zeros_like(theta)
    for index in np.ndindex(theta.shape):
        values = []
        for step in (eps, -eps):
            moved = theta.copy()
            moved[index] += step
            values.append(law(toy, moved, paths) @ reward)
        gradient[index] = (values[0] - values[1]) / (2 * eps)
    return gradient


@cache
def exact_gradient(toy: Toy, law: Law = independent_law, size: int = G) -> np.ndarray:
    """What the expected estimate of groups of ``size`` must be: (G-1)/G * 1/m times the reward gradient."""
    return reward_gradient(toy, law, enumerate_trajectories(toy)) * (size - 1) / size / toy.steps


def pair_up(toy: Toy, paths: Trajectories, rows: list[int], group_id: int = 0) -> TrajectoryGroup:
    """These trajectories as one group, as a rollout of the table model would have recorded it."""
    theta = toy.parameters
    logits = log_softmax(theta)[paths.states(toy)[rows], np.arange(toy.length)]
    drawn, unmask = paths.drawn[rows], paths.unmask_step[rows].astype(np.int16)
    earlier = np.arange(toy.length)[None, :] < np.arange(toy.length)[:, None]
    logp = token_logp(toy, theta, paths)[rows].astype(np.float32)
    return TrajectoryGroup(
        group_id=group_id,
        problem_id="enumerated",
        prompt_ids=np.array([toy.tokens + 1], dtype=np.int32),
        completion_ids=paths.ids[rows].astype(np.int32),
        unmask_step=unmask,
        unmask_rank=((unmask[:, :, None] == unmask[:, None, :]) & earlier).sum(axis=2).astype(np.int16),
        drawn=drawn,
        logp=logp,
        logp_raw=logp,
        entropy=np.where(drawn, -(np.exp(logits) * logits).sum(axis=-1), 0.0).astype(np.float32),
        support_indptr=None,
        support_ids=None,
        rewards=paths.rewards()[rows].astype(np.float32),
        reward_names=("first", "second"),
        correct=np.zeros(len(rows), dtype=bool),
        policy_version=0,
        adapter_digest="",
        sampler=SamplerSpec(toy.length, toy.block, toy.steps, "random", 1.0),
        seed=0,
        nfe=np.full(len(rows), toy.steps, dtype=np.int32),
    )


@lru_cache(maxsize=4)
def all_groups(toy: Toy, size: int = G) -> list[TrajectoryGroup]:
    """Every group of ``size`` trajectories, the last one running fastest."""
    paths = enumerate_trajectories(toy)
    return [pair_up(toy, paths, list(rows)) for rows in itertools.product(range(len(paths.ids)), repeat=size)]


def expected_weights(table: StepTable, slot: int, config: AgrpoConfig, size: int = G) -> np.ndarray:
    """[n, m]: E_u[weight of step] of the row in this slot of a group, summed over its k draws; exact.

    All orders of the strata are listed; between the edges of the law the draw is constant in the jitter.
    """
    S = size * config.k
    strata = config.strata_of_draws
    orders = list(itertools.permutations(range(S))) if strata == "group" else [tuple(range(S))]
    p_nm = step_probabilities(table, config.timestep_sampling, config.weight_floor)
    total_nm = np.zeros_like(p_nm)
    for row, p_m in enumerate(p_nm):
        scale = {"none": 1, "row": config.k, "group": S}[strata]
        edges = np.unique(np.concatenate([[0.0, 1.0], (scale * np.cumsum(p_m)) % 1.0]))
        jitter, length = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
        cases = list(itertools.product(orders, range(len(jitter))))
        if strata == "row":  # strata of a row are independent: each by itself, at the same jitter, is all it takes
            u_Qk = np.array([stratify(np.arange(config.k), jitter[c]) for _, c in cases])
        else:
            u = [stratify(np.array(o), jitter[c]) if strata == "group" else np.full(S, jitter[c]) for o, c in cases]
            u_Qk = np.array(u)[:, slot * config.k : (slot + 1) * config.k]
        again = [array[[row] * len(cases)] for array in (table.eligible_Gm, table.denominator_G, table.entropy_Gm)]
        drawn = draw_timesteps(StepTable(*again), u_Qk, config.timestep_sampling, config.weight_floor)
        for (_, cell), steps in zip(cases, drawn, strict=True):
            total_nm[row, steps.steps] += length[cell] / len(orders) * steps.weights
    return total_nm


def expected_estimate(toy: Toy, law_n: np.ndarray, config: AgrpoConfig, size: int = G) -> np.ndarray:
    """Minus the gradient of the loss, averaged over all groups of ``size`` and all u; shape of the table."""
    paths = enumerate_trajectories(toy)
    everything = pair_up(toy, paths, list(range(len(paths.ids))))
    table = step_table(everything, config.step_range, (EOS,))
    weights = [expected_weights(table, slot, config, size) for slot in range(size)]
    groups, views = all_groups(toy, size), []
    members = itertools.product(range(len(law_n)), repeat=size)
    for index, (group, rows) in enumerate(zip(groups, members, strict=True)):
        advantages_G = group_advantages(group.rewards)
        for slot, n in enumerate(rows):
            for step in np.flatnonzero(weights[slot][n]):
                weight = float(law_n[list(rows)].prod() * weights[slot][n, step])
                views.append(step_view(group, index, slot, int(step), float(advantages_G[slot]), weight))
    batch = build_batch(views, groups, mask_id=toy.tokens, pad_id=toy.tokens + 2)
    theta = torch.tensor(toy.parameters, requires_grad=True)
    states_N = toy.state(batch.input_ids[:, -toy.length :])[batch.view_of_score]
    logp_N = theta.log_softmax(dim=-1)[states_N, batch.position, batch.targets]
    loss, _ = Agrpo(config).loss(PolicyScores(Scores(logp_N, torch.ones_like(logp_N))), batch)
    (loss / (size * config.k)).backward()
    assert theta.grad is not None
    return -theta.grad.numpy()


def relative_error(ours: np.ndarray, exact: np.ndarray) -> float:
    """L2 norm of the difference over that of ``exact``."""
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def cosine(ours: np.ndarray, exact: np.ndarray) -> float:
    """Of the angle between the two gradients."""
    return float((ours * exact).sum() / np.linalg.norm(ours) / np.linalg.norm(exact))
