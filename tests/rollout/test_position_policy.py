"""Positions as part of the policy: decoupled confidence is a law that is sampled, recorded, scored and differentiated
exactly.

The enumeration is that of ``learner.verification.enumeration`` with another law of trajectories. Groups of everything,
views, scorer and loss are the learner's own code on a table model; the law of positions is written a second time here,
in numpy.

Shapes: n trajectories, C completion positions, m steps, S steps scored together, K candidates, q positions a step.
"""

import dataclasses
import itertools
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, score
from learner.likelihood.timesteps import step_table
from learner.likelihood.views import build_batch, step_view
from learner.objectives.agrpo import Agrpo
from learner.settings.methods.states import AgrpoConfig
from learner.verification.enumeration import (
    BLOCKS,
    EOS,
    THREE_POSITIONS,
    Toy,
    Trajectories,
    cosine,
    enumerate_trajectories,
    expected_weights,
    independent_law,
    log_softmax,
    pair_up,
    relative_error,
)
from rewards.errors import ConfigError
from rollout.models.family import PolicyAdapter
from rollout.models.llada import LLaDAModelLM
from rollout.sampling import positions
from rollout.sampling.denoise import Request, Tokens, denoise
from rollout.sampling.head import LogitsHead, padded
from rollout.trajectory import SamplerSpec, TrajectoryGroup

TWO_OF_FOUR = Toy(length=4, tokens=2, block=4, per_step=2)
TOYS = {"one of three": THREE_POSITIONS, "blocks that may retire": BLOCKS, "two of four": TWO_OF_FOUR}


@dataclasses.dataclass(frozen=True)
class Rule:
    """tau, and the temperatures of confidence and tokens."""

    tau: float = 0.5
    confidence: float = 1.0
    tokens: float = 1.0

    def sampler(self, toy: Toy) -> SamplerSpec:
        return SamplerSpec(
            toy.length,
            toy.block,
            toy.steps,
            "decoupled_confidence",
            self.tokens,
            position_temperature=self.tau,
            confidence_temperature=self.confidence,
        )


PLAIN, TEMPERED = Rule(), Rule(tau=0.3, confidence=0.8, tokens=0.7)


@dataclasses.dataclass(frozen=True)
class Paths:
    """Trajectories with the order of choice within each step, [n, C], and whether that order is part of the action."""

    tokens: Trajectories
    rank: np.ndarray
    ordered: bool


@cache
def paths_of(toy: Toy, ordered: bool) -> Paths:
    """All trajectories; each in every order of its first step's positions where the order counts."""
    sets = enumerate_trajectories(toy)
    earlier = np.arange(toy.length)[None, :] < np.arange(toy.length)[:, None]
    rank = ((sets.unmask_step[:, :, None] == sets.unmask_step[:, None, :]) & earlier).sum(axis=2)
    if not ordered:
        return Paths(sets, rank, False)
    assert toy == TWO_OF_FOUR
    swapped = np.where(sets.unmask_step == 0, 1 - rank, rank)
    twice = [np.concatenate([array, array]) for array in (sets.ids, sets.unmask_step, sets.drawn, sets.order)]
    return Paths(Trajectories(*twice), np.concatenate([rank, swapped]), True)


def choice_law(toy: Toy, theta: np.ndarray, paths: Paths, rule: Rule) -> np.ndarray:
    """[n, m], probability of each step's choice of positions; the law spelled out as products of shares."""
    t = paths.tokens
    confidence = np.exp(log_softmax(theta / rule.confidence)).max(axis=-1)
    law_nm = np.ones((len(t.ids), toy.steps))
    rows = np.arange(len(t.ids))
    for step in range(toy.steps):
        state_n = toy.state(np.where(t.unmask_step >= step, toy.tokens, t.ids))
        block = np.arange(toy.length) // toy.block == step * toy.per_step // toy.block
        candidate_nC = block & (t.unmask_step >= step) & t.drawn
        weight_nC = np.where(candidate_nC, confidence[state_n] ** (1 / rule.tau), 0.0)
        chosen_nC = candidate_nC & (t.unmask_step == step)
        alive = chosen_nC.any(axis=1)  # the others had retired
        order_nq = np.where(chosen_nC, t.unmask_step * toy.length + paths.rank, 10**6).argsort(axis=1)
        order_nq = order_nq[:, : toy.per_step]
        orders = [range(toy.per_step)] if paths.ordered else itertools.permutations(range(toy.per_step))
        total_n = np.zeros(len(rows))
        for order in orders:
            left_n, product_n = weight_nC.sum(axis=1), np.ones(len(rows))
            for pick in order:
                share_n = weight_nC[rows, order_nq[:, pick]]
                product_n = product_n * share_n / np.where(alive, left_n, 1.0)
                left_n = left_n - share_n
            total_n += product_n
        law_nm[alive, step] = total_n[alive]
        forced = candidate_nC.sum(axis=1) == toy.per_step
        law_nm[forced, step] = 1.0  # whatever the order, which is then no choice
    return law_nm


def decoupled_law(toy: Toy, theta: np.ndarray, paths: Paths, rule: Rule) -> np.ndarray:
    """[n], probability of each trajectory."""
    t = paths.tokens
    logp = log_softmax(theta / rule.tokens)[t.states(toy), np.arange(toy.length), t.ids]
    return np.exp(np.where(t.drawn, logp, 0.0).sum(axis=1)) * choice_law(toy, theta, paths, rule).prod(axis=1)


@cache
def exact_gradient(toy: Toy, rule: Rule, ordered: bool) -> np.ndarray:
    """(G-1)/G * 1/m times the gradient of expected reward for G = 2, by central differences."""
    paths = paths_of(toy, ordered)
    theta, reward, eps = toy.parameters, paths.tokens.rewards().sum(axis=1), 1e-5
    gradient = np.zeros_like(theta)
    for index in np.ndindex(theta.shape):
        values = []
        for step in (eps, -eps):
            moved = theta.copy()
            moved[index] += step
            values.append(decoupled_law(toy, moved, paths, rule) @ reward)
        gradient[index] = (values[0] - values[1]) / (2 * eps)
    return gradient / 2 / toy.steps


class TableModel(torch.nn.Module):
    """A denoiser with a free logit per state, position and token; its mask token would be drawn first, if it could."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy, self.theta = toy, torch.nn.Parameter(torch.tensor(toy.parameters))

    def forward(self, input_ids, attention_mask, logit_rows):
        L, toy = input_ids.shape[1], self.toy
        states = toy.state(input_ids[:, -toy.length :].numpy())[logit_rows // L]
        logits = self.theta[states, logit_rows % L - (L - toy.length)]
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 1), value=5.0))

    def family(self) -> PolicyAdapter:
        return PolicyAdapter("table", LLaDAModelLM, self.toy.tokens, EOS, self.toy.tokens + 2, 0, "", "")


def recorded(toy: Toy, paths: Paths, rule: Rule) -> TrajectoryGroup:
    """All trajectories as one group, as a rollout of the table model would have recorded it."""
    t, theta = paths.tokens, toy.parameters
    group = pair_up(toy, t, list(range(len(t.ids))))
    logp_nCV = log_softmax(theta / rule.tokens)[t.states(toy), np.arange(toy.length)]
    logp = np.take_along_axis(logp_nCV, t.ids[:, :, None], axis=2)[:, :, 0]
    choice_nm = choice_law(toy, theta, paths, rule)
    group = dataclasses.replace(
        group,
        unmask_rank=paths.rank.astype(np.int16),
        logp=np.where(t.drawn, logp, 0.0).astype(np.float32),
        entropy=np.where(t.drawn, -(np.exp(logp_nCV) * logp_nCV).sum(axis=-1), 0.0).astype(np.float32),
        position_logp=np.minimum(np.log(choice_nm), 0).astype(np.float32),
        position_entropy=-np.log(choice_nm).astype(np.float32),  # any positive figure may propose steps
        sampler=rule.sampler(toy),
    )
    group.validate()
    return group


def expected_estimate(
    toy: Toy, rule: Rule, config: AgrpoConfig, *, ordered: bool = False, positions_scored: bool = True
) -> np.ndarray:
    """Minus the gradient of the loss, averaged over all groups of two and all u; shape of the table.

    At ratio 1 the gradient is linear in the advantage, whose mean over the other member of the group is half of what
    the trajectory's reward has above the expected one.
    """
    paths = paths_of(toy, ordered)
    group, law_n = recorded(toy, paths, rule), decoupled_law(toy, toy.parameters, paths, rule)
    reward_n = paths.tokens.rewards().sum(axis=1)
    advantage_n = (reward_n - law_n @ reward_n) / 2
    weight_nm = law_n[:, None] * expected_weights(step_table(group, config.step_range, (EOS,)), 0, config)
    views = [
        step_view(group, 0, int(n), int(t), float(advantage_n[n]), float(weight_nm[n, t]))
        for n, t in np.argwhere(weight_nm)
    ]
    model = TableModel(toy)
    batch = build_batch(views, [group], mask_id=toy.tokens, pad_id=toy.tokens + 2)
    if not positions_scored:
        batch = dataclasses.replace(batch, choices=None)
    scores = score(model, batch, family=model.family())
    if positions_scored:
        assert (scores.choice_logp_Z - torch.from_numpy(batch.choices.logp)).abs().max() < 1e-5
    loss, _ = Agrpo(config).loss(PolicyScores(scores), batch)
    (loss / config.k).backward()
    assert model.theta.grad is not None
    return -model.theta.grad.numpy()


SAMPLINGS = {
    "uniform": AgrpoConfig(k=1, timestep_sampling="uniform"),
    "entropy": AgrpoConfig(k=1, timestep_sampling="entropy", weight_floor=0.2),
}


# ---- exactness


@pytest.mark.parametrize("rule", [PLAIN, TEMPERED], ids=["plain", "tempered"])
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_enumeration_is_a_probability(toy, rule):
    for ordered in (False, True) if toy == TWO_OF_FOUR else (False,):
        assert decoupled_law(toy, toy.parameters, paths_of(toy, ordered), rule).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rule", [PLAIN, TEMPERED], ids=["plain", "tempered"])
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_expected_gradient_is_the_reward_gradient(toy, rule, sampling):
    ours, exact = expected_estimate(toy, rule, SAMPLINGS[sampling]), exact_gradient(toy, rule, False)
    error = relative_error(ours, exact)
    print(f"relative error {error:.1e}")
    assert error < 2e-6


def test_expected_gradient_with_the_order_as_part_of_the_action(monkeypatch):
    """What is done above 4 positions a step, on 2."""
    monkeypatch.setattr(positions, "SET_UP_TO", 1)
    ours = expected_estimate(TWO_OF_FOUR, PLAIN, SAMPLINGS["uniform"], ordered=True)
    assert relative_error(ours, exact_gradient(TWO_OF_FOUR, PLAIN, False)) < 2e-6


@pytest.mark.parametrize("rule", [PLAIN, TEMPERED], ids=["plain", "tempered"])
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_control_token_terms_alone_are_biased(toy, rule):
    ours = expected_estimate(toy, rule, SAMPLINGS["uniform"], positions_scored=False)
    exact = exact_gradient(toy, rule, False)
    print(f"cosine {cosine(ours, exact):.3f}, relative error {relative_error(ours, exact):.3f}")
    assert relative_error(ours, exact) > 0.1
    assert cosine(ours, exact) < 0.99, "nor is it a multiple of the gradient"


# ---- sampling


def sampled(toy: Toy, sampler: SamplerSpec, rows: int, key: int = 0):
    """Completions of the table model. A prompt of one token; the model's columns are tokens, then mask."""
    model = TableModel(toy)
    requests = [Request([toy.tokens + 1], key=key + i) for i in range(rows)]
    tokens = Tokens(mask=toy.tokens, eos=(EOS,), pad=toy.tokens + 2)
    head = LogitsHead(padded(lambda i, a, r: model(i, a, r).logits, torch.device("cpu")), tokens.mask)
    with torch.inference_mode():
        return denoise(head, requests, sampler, tokens, max_rows=rows)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations above its mean."""
    likely = expected > 1
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_whole_trajectories_come_as_often_as_the_law_says(toy):
    n, paths = 4000, paths_of(toy, False)
    done = sampled(toy, TEMPERED.sampler(toy), n, key=10**6)
    index = {
        (*ids, *steps): i
        for i, (ids, steps) in enumerate(zip(paths.tokens.ids.tolist(), paths.tokens.unmask_step.tolist(), strict=True))
    }
    seen = [index[(*c.ids.tolist(), *c.unmask_step.tolist())] for c in done]
    counts = np.bincount(seen, minlength=len(index))
    law_n = decoupled_law(toy, toy.parameters, paths, TEMPERED)
    assert abs(chi_square(counts, n * law_n)) < 4
    untilted = independent_law(toy, toy.parameters, paths.tokens)
    assert chi_square(counts, n * untilted) > 10, "control: random order is another law"
    choice_nm = choice_law(toy, toy.parameters, paths, TEMPERED)[seen]
    np.testing.assert_allclose(np.stack([c.position_logp for c in done]), np.log(choice_nm), atol=1e-5)
    forced = choice_nm == 1
    assert (np.stack([c.position_entropy for c in done])[forced] == 0).all()
    assert (np.stack([c.position_entropy for c in done])[~forced] > 0).all()


def test_a_large_tau_is_random_order():
    toy = TWO_OF_FOUR
    random = sampled(toy, dataclasses.replace(PLAIN.sampler(toy), position_rule="random"), 300)
    for tau, bound in ((math.inf, 1e-12), (1e3, 3e-3)):
        flat = sampled(toy, Rule(tau=tau).sampler(toy), 300)
        assert all(
            (a.unmask_step == b.unmask_step).all() and (a.ids == b.ids).all() for a, b in zip(flat, random, strict=True)
        )
        first = np.array([c.position_logp[0] for c in flat])
        assert np.abs(first - math.log(1 / 6)).max() < bound + 1e-6
    tilted = sampled(toy, PLAIN.sampler(toy), 300)
    assert any((a.unmask_step != b.unmask_step).any() for a, b in zip(tilted, random, strict=True)), "control"


def test_tau_zero_takes_the_surest_positions_and_scores_nothing():
    toy = TWO_OF_FOUR
    confidence = log_softmax(toy.parameters).max(axis=-1)[toy.state(np.full(4, toy.tokens))]
    surest = set(np.argsort(-confidence)[:2].tolist())
    for completion in sampled(toy, Rule(tau=0.0).sampler(toy), 20):
        assert set(np.flatnonzero(completion.unmask_step == 0).tolist()) == surest
        assert completion.position_logp is None and completion.position_entropy is None
    nearly = sampled(toy, Rule(tau=1e-3).sampler(toy), 20)
    assert all(set(np.flatnonzero(c.unmask_step == 0).tolist()) == surest for c in nearly)
    greedy = [
        dataclasses.replace(Rule(tokens=0.0).sampler(toy), position_rule=rule)
        for rule in ("decoupled_confidence", "low_confidence")
    ]
    ours, theirs = (sampled(toy, spec, 1)[0] for spec in greedy)
    assert (ours.ids == theirs.ids).all() and (ours.unmask_rank == theirs.unmask_rank).all()
    assert ours.position_logp is None, "greedy decoding chooses nothing by chance"


@pytest.mark.parametrize(
    "change", [{"position_temperature": -1.0}, {"position_temperature": math.nan}, {"confidence_temperature": 0.0}]
)
def test_temperatures_that_make_no_law_are_refused(change):
    with pytest.raises(ConfigError, match="_temperature"):
        sampled(THREE_POSITIONS, dataclasses.replace(PLAIN.sampler(THREE_POSITIONS), **change), 1)
