"""Texts with gaps in the learner: the gradient by enumeration, with text on the right of the gaps, and every method.

Shapes: n trajectories, G completions, C completion positions, L tokens of a text, V vocabulary, Z views, N scores.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, score
from learner.likelihood.timesteps import step_table
from learner.likelihood.views import View, ViewBatch, build_batch, step_view
from learner.objectives import make_objective
from learner.objectives.advantages import group_advantages
from learner.objectives.agrpo import Agrpo
from learner.ranks.rank import lora_spec
from learner.settings.methods.states import AgrpoConfig
from learner.verification.enumeration import expected_weights, relative_error
from rollout.adapters import AdapterState, adapter_parameters, load_state
from rollout.models.family import PolicyAdapter, policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import attach_lora
from rollout.spans import Gap
from rollout.spans import places as where
from rollout.trajectory import SamplerSpec, TrajectoryGroup
from tests.support.every_method import METHODS, Drawing, at, batch_of, drawing_of, loss_of, update_of
from tests.support.learner_ranks import SAMPLER as SHAPE
from tests.support.learner_ranks import draw_batch, random_adapter, settings

G, K = 2, 2
TOKENS, MASK, LEFT, BETWEEN, RIGHT, PAD = (0, 1), 2, 3, 4, 5, 6
EOS = 7
FAMILY: PolicyAdapter = SimpleNamespace(logit_shift=0, mask_token_id=MASK)  # type: ignore[assignment]
PROMPT = (LEFT, BETWEEN, RIGHT)


@dataclass(frozen=True)
class Case:
    """Prompts with two gaps, the first between LEFT and BETWEEN, the second of one token between BETWEEN and RIGHT."""

    sampler: SamplerSpec
    places: dict[int, tuple[int, ...]]
    """Where the positions stand in the text, by the length of the first gap."""


ONE_BLOCK = Case(SamplerSpec(3, 3, 3, "random", 1.0), {2: (1, 2, 4), 1: (1, 3, -1)})
BLOCKS_OF_TWO = Case(SamplerSpec(6, 2, 6, "random", 1.0), {3: (1, 2, 3, -1, 5, -1), 2: (1, 2, 4, -1, -1, -1)})
"""The first gap's second block has one position, and another that doesn't exist; the second gap begins a new one."""
CASES = pytest.mark.parametrize("case", [ONE_BLOCK, BLOCKS_OF_TWO], ids=["one block", "blocks of two"])


class Toy(torch.nn.Module):
    """Logits of a position from all tokens of the text by their distance, what stands on the right included."""

    def __init__(self, *, sees_right: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight_WVV = torch.nn.Parameter(torch.randn(13, 8, 2, generator=generator, dtype=torch.float64) * 0.5)
        self.sees_right = sees_right

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, logit_rows: torch.Tensor
    ) -> SimpleNamespace:
        Z, L = input_ids.shape
        distance_LL = torch.arange(L)[None, :] - torch.arange(L)[:, None]
        real_ZLL = torch.ones(Z, L, L, dtype=torch.bool) if attention_mask is None else attention_mask[:, None, :]
        seen_ZLL = real_ZLL & ((distance_LL <= 0) | self.sees_right)
        of_token_ZLLV = self.weight_WVV[distance_LL[None] + 6, input_ids[:, None, :].expand(Z, L, L)]
        logits_ZLV = (of_token_ZLLV * seen_ZLL[..., None]).sum(2)
        blank = torch.full((Z, L, 6), -torch.inf, dtype=torch.float64)  # mask, context and pad are never drawn
        return SimpleNamespace(logits=torch.cat([logits_ZLV, blank], -1).reshape(Z * L, 8)[logit_rows])


@dataclass(frozen=True)
class Path:
    """One completion, the steps at which its positions were revealed, and how likely length and order are."""

    length: int
    ids: tuple[int, ...]
    steps: tuple[int, ...]
    chance: float


def paths(case: Case) -> list[Path]:
    found = []
    for length, places in case.places.items():
        there = [position for position, place in enumerate(places) if place >= 0]
        orders = list(ways_to_reveal(case.sampler, there))
        for tokens, steps in itertools.product(itertools.product(TOKENS, repeat=len(there)), orders):
            ids = [PAD] * len(places)
            for position, token in zip(there, tokens, strict=True):
                ids[position] = token
            found.append(Path(length, tuple(ids), steps, 1 / len(case.places) / len(orders)))
    return found


def ways_to_reveal(sampler: SamplerSpec, there: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The step of each position, -1 where there is none: a position a step, block after block, in any order of a
    block's."""
    blocks = [list(block) for _, block in itertools.groupby(there, lambda position: position // sampler.block_length)]
    for orders in itertools.product(*map(itertools.permutations, blocks)):
        steps = [-1] * sampler.completion_length
        for order in orders:
            for rank, position in enumerate(order):
                steps[position] = position // sampler.block_length * sampler.block_length + rank
        yield tuple(steps)


def reward(path: Path) -> float:
    """In eighths, of the text and how long it is."""
    numbers = np.random.default_rng(5).integers(0, 9, (4, *(2,) * 6))
    tokens = [token if token != PAD else 0 for token in path.ids]
    return float(numbers[(path.length, *tokens, *(0,) * (6 - len(tokens)))]) / 8


def text(path: Path, step: int, places: tuple[int, ...]) -> list[int]:
    """The text before a step."""
    written = {
        place: token if at < step else MASK
        for token, at, place in zip(path.ids, path.steps, places, strict=True)
        if place >= 0
    }
    context = iter(PROMPT)
    return [written[place] if place in written else next(context) for place in range(len(written) + len(PROMPT))]


def log_probs(model: Toy, every: list[Path], case: Case) -> torch.Tensor:
    """[n], log-prob of all tokens of each path, one state at a time."""
    total = []
    for path in every:
        logp = torch.zeros((), dtype=torch.float64)
        for position, step in enumerate(path.steps):
            if step >= 0:
                places = case.places[path.length]
                ids = torch.tensor([text(path, step, places)])
                row = torch.tensor([places[position]])
                logp = logp + model(ids, None, row).logits[0, :2].log_softmax(-1)[path.ids[position]]
        total.append(logp)
    return torch.stack(total)


def group_of(rows: list[Path], model: Toy, case: Case) -> TrajectoryGroup:
    """As a rollout would have recorded them; the log-probs are filled in where a test needs them."""
    steps = np.array([path.steps for path in rows], np.int16)
    drawn, zeros = steps >= 0, np.zeros(steps.shape, np.float32)
    group = TrajectoryGroup(
        group_id=0,
        problem_id="enumerated",
        prompt_ids=np.array(PROMPT, np.int32),
        completion_ids=np.array([path.ids for path in rows], np.int32),
        unmask_step=steps,
        unmask_rank=np.zeros(steps.shape, np.int16),
        drawn=drawn,
        logp=zeros,
        logp_raw=zeros,
        entropy=np.where(drawn, np.float32(0.5), 0).astype(np.float32),
        support_indptr=None,
        support_ids=None,
        rewards=np.array([[reward(path)] for path in rows], np.float32),
        reward_names=("reward",),
        correct=np.zeros(len(rows), bool),
        policy_version=0,
        adapter_digest="",
        sampler=case.sampler,
        seed=0,
        nfe=drawn.sum(axis=1).astype(np.int32),
        places=np.array([case.places[path.length] for path in rows], np.int32),
    )
    group.validate()
    states = [(row, step) for row, path in enumerate(rows) for step in path.steps if step >= 0]
    views = [step_view(group, 0, row, step, 0.0, 1.0) for row, step in states]
    batch = build_batch(views, [group], mask_id=MASK, pad_id=PAD)
    logp = np.zeros(steps.shape, np.float32)
    with torch.no_grad():
        told_N = score(model, batch, family=FAMILY).logp_N.numpy()
    for view, position, value in zip(batch.view_of_score, batch.position, told_N, strict=True):
        logp[views[view].row, position] = min(value, 0)
    return replace(group, logp=logp, logp_raw=logp)


def exact(case: Case) -> np.ndarray:
    """(G-1)/G * 1/m times the gradient of expected reward, by one sum over all that can be written."""
    model, every = Toy(), paths(case)
    chance = torch.tensor([path.chance for path in every]).double()
    rewards = torch.tensor([reward(path) for path in every]).double()
    expected = (chance * log_probs(model, every, case).exp() * rewards).sum()
    assert (chance * log_probs(model, every, case).exp()).sum().item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(expected, model.weight_WVV)
    return gradient.numpy() * (G - 1) / G / case.sampler.steps


def estimate(scorer: Toy, case: Case) -> np.ndarray:
    """Minus the gradient of the loss, averaged over all groups that the toy draws and over all draws of steps."""
    config, model, every = AgrpoConfig(k=K), Toy(), paths(case)
    with torch.no_grad():
        law = log_probs(model, every, case).exp().numpy() * np.array([path.chance for path in every])
    everything = group_of(every, model, case)
    table = step_table(everything, config.step_range, (EOS,))
    weights = [expected_weights(table, slot, config, G) for slot in range(G)]
    rewards = everything.rewards[:, 0]
    views: list[View] = []
    for pair in itertools.product(range(len(every)), repeat=G):
        advantages = group_advantages(rewards[list(pair), None])
        for slot, n in enumerate(pair):
            if not advantages[slot]:
                continue
            views += [
                step_view(everything, 0, n, int(step), float(advantages[slot]), float(law[list(pair)].prod() * weight))
                for step, weight in enumerate(weights[slot][n])
                if weight
            ]
    loss = torch.zeros(())
    for start in range(0, len(views), 4000):
        batch = build_batch(views[start : start + 4000], [everything], mask_id=MASK, pad_id=PAD)
        scores = PolicyScores(score(scorer, batch, family=FAMILY))
        loss = loss + Agrpo(config).loss(scores, batch)[0]
    (loss / (G * config.k)).backward()
    assert scorer.weight_WVV.grad is not None
    return -scorer.weight_WVV.grad.numpy()


@CASES
def test_the_expected_gradient_is_that_of_the_reward_with_text_on_both_sides(case: Case) -> None:
    assert relative_error(estimate(Toy(), case), exact(case)) < 1e-6


@CASES
def test_a_scorer_that_does_not_see_the_right_side_is_found_out(case: Case) -> None:
    assert relative_error(estimate(Toy(sees_right=False), case), exact(case)) > 0.05


@CASES
def test_the_cases_are_what_prompts_with_gaps_make(case: Case) -> None:
    sampler = case.sampler
    for length, places in case.places.items():
        gaps = (Gap(1, (length,)), Gap(2, (1,)))
        found = where(gaps, sampler.block_length, sampler.completion_length, key=0)
        assert tuple(found.tolist()) == places


# ---- every method

GAPS = ((), (Gap(2, (3, 9)), Gap(7, (6,))), (Gap(5, (11,)),), (Gap(1, (2, 4)), Gap(9, (5, 12))))
"""Of the four groups: none, several, one, and some whose completions have lengths of their own."""


@pytest.fixture(scope="module")
def adapter(tiny_model: str) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def drawn(tiny_model: str, adapter: AdapterState) -> dict[Drawing, list[TrajectoryGroup]]:
    """A batch for each way in which methods draw; prompts without gaps have a law of thresholds."""
    ways = {drawing_of(method) for method in METHODS if method != "diffpo_thresholds"}
    return {way: draw_batch(tiny_model, settings(), adapter, *way, gaps=GAPS) for way in ways}


@pytest.mark.slow  # in all
@pytest.mark.parametrize("method", [method for method in METHODS if method != "diffpo_thresholds"])
def test_every_method_learns_from_gaps_and_scores_nothing_else(
    tiny_model: str, adapter: AdapterState, drawn: dict[Drawing, list[TrajectoryGroup]], method: str
) -> None:
    groups = drawn[drawing_of(method)]
    assert not all(group.there.all() for group in groups), "some completions have fewer positions than others"
    found, batches = gradient(tiny_model, adapter, method, groups)
    assert found.isfinite().all() and found.abs().sum() > 0
    for batch, views in batches:
        for row, position, view in zip(batch.score_rows, batch.position, batch.view_of_score, strict=True):
            group, completion = groups[views[view].group], views[view].row
            assert group.there[completion, position]
            start = batch.input_ids.shape[1] - group.text_length(completion)
            place_C = group.place(completion)
            place = group.prompt_ids.size + position if place_C is None else place_C[position]
            assert row == view * batch.input_ids.shape[1] + start + place
    # Control: one group's tokens behind its prompt, where they were not drawn, make another update.
    behind = groups[2].prompt_ids.size + np.arange(SHAPE.completion_length, dtype=np.int32)
    moved = [*groups[:2], replace(groups[2], places=np.where(groups[2].there, behind, np.int32(-1))), groups[3]]
    assert not torch.equal(gradient(tiny_model, adapter, method, moved)[0], found)


def gradient(
    path: str, adapter: AdapterState, method: str, groups: list[TrajectoryGroup]
) -> tuple[torch.Tensor, list[tuple[ViewBatch, Sequence[View]]]]:
    """Of an update, and its batches."""
    config = at(method)
    family, objective = policy_adapter(path), make_objective(config.objective)
    model = attach_lora(load_model(path), family, lora_spec(config))
    load_state(model, adapter)
    plan = update_of(objective, family, groups)
    batches = []
    for forward in plan.forwards[0]:
        batch = batch_of(forward, objective, family, groups)
        loss = loss_of(model, batch, objective, family)
        (loss / plan.normaliser).backward()
        batches.append((batch, batch.views))
    grads = [p.grad.flatten() for p in adapter_parameters(model).values() if p.grad is not None]
    return torch.cat(grads), batches
