"""Branches of recorded states: which states, how they are filled, and that nothing else changes.

Shapes: G rows, S branched states, Z fills, C completion positions, m steps, V vocabulary.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.errors import TrajectoryError
from rewards.task import Problem
from rollout.engines.torch import TorchEngine
from rollout.models.lora import LoraSpec
from rollout.sampling.branches import drawn_step, even_steps, highest_entropy_steps, last_branch_step
from rollout.sampling.denoise import POSITION_RULES, Completion, Request, Tokens, denoise
from rollout.sampling.head import LogitsHead, padded
from rollout.trajectory import BranchSpec, DrawnBranches, GreedyBranches, GroupSpec, SamplerSpec, TrajectoryGroup

MASK, EOS, PAD, V, C, STEPS = 5, 4, 3, 12, 8, 4
TOKENS = Tokens(mask=MASK, eos=(EOS,), pad=PAD)
PROMPT = [7, 7, 7]
CPU = torch.device("cpu")


class Table:
    """A denoiser whose logits depend on position and the row's tokens; it would like to say the mask token."""

    def __init__(self, eos_bias: float = 0.0) -> None:
        self.table = torch.randn(64, V, V, generator=torch.Generator().manual_seed(0))
        self.table[:, 0, MASK] += 9.0
        self.table[:, 0, EOS] += eos_bias
        self.asked: list[int] = []

    def __call__(self, ids_RL: torch.Tensor, mask_RL: Any, rows_N: torch.Tensor) -> torch.Tensor:
        assert mask_RL is None
        self.asked.append(rows_N.numel())
        L = ids_RL.shape[1]
        mixed_RV = self.table[torch.arange(L), ids_RL].sum(1)
        return 0.3 * mixed_RV[rows_N // L] + self.table[rows_N % L, 0]

    def law(self, completion: Completion, step: int, temperature: float) -> tuple[np.ndarray, torch.Tensor]:
        """The masked positions of the state before a step, and their log-probs [B, V]."""
        hidden_C = completion.unmask_step >= step
        ids = torch.tensor([PROMPT + np.where(hidden_C, MASK, completion.ids).tolist()])
        at = np.flatnonzero(hidden_C)
        logits_BV = self(ids, None, torch.from_numpy(len(PROMPT) + at))
        logits_BV[:, MASK] = -torch.inf
        return at, torch.log_softmax(logits_BV / temperature, dim=-1)


def write(model: Table, branches: BranchSpec | None, *, n: int = 6, first_key: int = 100, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(completion_length=C, block_length=4, steps=STEPS, position_rule="random")
    sampler = SamplerSpec(**{**settings, "temperature": 0.8, **changes})
    requests = [Request(PROMPT, key=first_key + i) for i in range(n)]
    return denoise(LogitsHead(padded(model, CPU), MASK), requests, sampler, TOKENS, max_rows=4, branches=branches)


def bits(completion: Completion) -> list[bytes]:
    values = (getattr(completion, field.name) for field in dataclasses.fields(completion))
    return [value.tobytes() for value in values if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("branches", [GreedyBranches(3), GreedyBranches(3, evenly=True), DrawnBranches(2, 4.0)])
def test_draws_are_the_same_with_and_without_branches(rule: Any, branches: BranchSpec) -> None:
    plain, branched = Table(), Table()
    without, having = write(plain, None, position_rule=rule), write(branched, branches, position_rule=rule)
    assert [bits(completion) for completion in without] == [bits(completion) for completion in having]
    assert all(completion.branches is None for completion in without)
    assert len(plain.asked) == len(branched.asked), "no forward of their own"
    assert sum(plain.asked) < sum(branched.asked)


@pytest.mark.parametrize("rule", ["random", "low_confidence", "decoupled_confidence"])
def test_greedy_branches_are_the_likeliest_fill_at_the_steps_of_largest_entropy(rule: Any) -> None:
    model = Table()
    for completion in write(model, GreedyBranches(3), position_rule=rule):
        entropy_m = [completion.entropy[completion.unmask_step == step].mean() for step in range(STEPS)]
        assert completion.branches.step.tolist() == np.argsort(entropy_m)[::-1][:3].tolist()
        assert completion.branches.logp is None
        for step, (ids_C,) in zip(completion.branches.step, completion.branches.ids, strict=True):
            at, logp_BV = model.law(completion, int(step), 1.0)
            expected_C = completion.ids.copy()
            expected_C[at] = logp_BV.argmax(-1)
            assert ids_C.tolist() == expected_C.tolist() and MASK not in ids_C


@pytest.mark.parametrize(("states", "steps"), [(4, [0, 1, 2, 3]), (3, [0, 1, 2]), (2, [0, 2]), (1, [0])])
def test_evenly_spaced_branches_are_known_beforehand(states: int, steps: list[int]) -> None:
    assert even_steps(STEPS, states).tolist() == steps
    model = Table()
    for completion in write(model, GreedyBranches(states, evenly=True)):
        assert completion.branches.step.tolist() == steps
        for step, (ids_C,) in zip(steps, completion.branches.ids, strict=True):
            at, logp_BV = model.law(completion, step, temperature=1.0)
            assert (ids_C[at] == logp_BV.argmax(-1).numpy()).all()


def test_evenly_spaced_branches_of_a_completion_that_ends_early() -> None:
    early = [c for c in write(Table(eos_bias=6.0), GreedyBranches(4, evenly=True), n=20) if not c.drawn.all()]
    assert early and all(c.branches.step.tolist() == [0, 1, -1, -1] for c in early)


def test_drawn_branches_have_the_law_of_the_rollout() -> None:
    """At the state before any step but the first, and with noise that the rollout's own draws don't share."""
    model, Z, temperature = Table(), 3000, 0.7
    (completion,) = write(model, DrawnBranches(Z, 4.0), n=1, temperature=temperature, first_key=7)
    step = int(completion.branches.step[0])
    assert step == drawn_step(7, STEPS, 4.0) and step > 0
    at, logp_BV = model.law(completion, step, temperature)
    (ids_ZC,), (logp_ZC,) = completion.branches.ids, completion.branches.logp
    shown = np.setdiff1d(np.arange(C), at)
    assert (ids_ZC[:, shown] == completion.ids[shown]).all() and (logp_ZC[:, shown] == 0).all()
    for b, position in enumerate(at):
        expected_V = logp_BV[b].exp().numpy()
        share_V = np.bincount(ids_ZC[:, position], minlength=V) / Z
        assert (abs(share_V - expected_V) < 4.5 * np.sqrt(expected_V * (1 - expected_V) / Z) + 1e-9).all()
        np.testing.assert_allclose(logp_ZC[:, position], logp_BV[b].numpy()[ids_ZC[:, position]], atol=1e-5)
    raw_V = model.law(completion, step, 1.0)[1][0].exp().numpy()
    share_V = np.bincount(ids_ZC[:, at[0]], minlength=V) / Z
    assert abs(share_V - raw_V).max() > 0.02, "control: at temperature 1 it would be another law"
    firsts, seconds = ids_ZC[:, at[0]], ids_ZC[:, at[1]]
    joint_VV = np.histogram2d(firsts, seconds, bins=(np.arange(V + 1), np.arange(V + 1)))[0] / Z
    product_VV = np.outer(*(np.bincount(each, minlength=V) / Z for each in (firsts, seconds)))
    assert abs(joint_VV - product_VV).max() < 0.025, "positions are filled one by one"


def test_fills_repeat_and_are_truncated_as_the_rollout_is() -> None:
    spec, model = DrawnBranches(4, 0.0), Table()
    completions = write(model, spec, top_k=2)
    again = write(model, spec, top_k=2)
    for ours, theirs in zip(completions, again, strict=True):
        assert (ours.branches.ids == theirs.branches.ids).all()
        step = int(ours.branches.step[0])
        at, logp_BV = model.law(ours, step, 0.8)
        best_B2 = logp_BV.topk(2, dim=-1).indices.numpy()
        assert (ours.branches.ids[0][:, at, None] == best_B2).any(-1).all()
    fills = {tuple(fill) for completion in completions for fill in completion.branches.ids[0].tolist()}
    assert len(fills) > 6, "fills of one state differ"


def test_the_density_of_the_drawn_step_rises_with_progress() -> None:
    steps = np.array([drawn_step(key, 5, 4.0) for key in range(4000)])
    edges = np.linspace(0, 1, 6) ** 5
    expected = np.diff(edges)
    share = np.bincount(steps, minlength=5) / steps.size
    assert (abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / steps.size) + 1e-9).all()
    uniform = np.bincount([drawn_step(key, 5, 0.0) for key in range(4000)], minlength=5) / 4000
    assert abs(uniform - 0.2).max() < 0.03


def test_a_completion_that_ends_early_has_fewer_branches() -> None:
    model = Table(eos_bias=6.0)
    early = [c for c in write(model, GreedyBranches(3), n=20) if not c.drawn.all()]
    assert early
    for completion in early:
        step_S = completion.branches.step
        assert (step_S[:2] >= 0).all() and step_S[2] == -1, "two of four steps were taken"
        assert completion.branches.found_ids.shape == (2, C) and (completion.branches.ids[2] == 0).all()
    drawn = [c.branches for c in write(Table(eos_bias=6.0), DrawnBranches(2, 4.0), n=20) if not c.drawn.all()]
    missed = [branches for branches in drawn if branches.step[0] < 0]
    assert missed and all(branches.found_ids.size == 0 for branches in missed)


def test_steps_are_ranked_by_the_mean_over_their_tokens() -> None:
    steps_GC = np.array([[0, 0, 1, 2, 2, 3]], np.int16)
    entropy_GC = np.array([[1.0, 2.0, 1.6, 0.1, 3.5, 1.8]], np.float32)
    drawn_GC = np.ones((1, 6), bool)

    def ranked(states: int, drawn_GC: np.ndarray = drawn_GC, last: int = 3) -> list[int]:
        found = highest_entropy_steps(steps_GC, drawn_GC, entropy_GC, states=states, last_G=np.array([last]))
        return found[0].tolist()

    assert ranked(3) == [2, 3, 1], "by the sum it would be 2, 0, 3"
    assert ranked(6) == [2, 3, 1, 0, -1, -1]
    assert ranked(3, last=1) == [1, 0, -1]
    assert ranked(2, drawn_GC=steps_GC < 3) == [2, 1], "fillers are no actions"


def test_steps_end_at_the_last_token_where_this_is_wanted() -> None:
    ids_GC = np.array([[7, EOS, 7, EOS], [EOS] * 4])
    steps_GC = np.array([[0, 1, 2, 3], [1, 0, 3, 2]])
    assert last_branch_step(ids_GC, steps_GC, (EOS,), until_last_token=True).tolist() == [2, 3]
    assert last_branch_step(ids_GC, steps_GC, (EOS,), until_last_token=False).tolist() == [3, 3]
    limited = write(Table(eos_bias=1.5), GreedyBranches(4, until_last_token=True), n=20, block_length=8)
    ends = [int(c.unmask_step[c.ids != EOS].max(initial=-1)) for c in limited]
    assert all(c.branches.step.max() <= end for c, end in zip(limited, ends, strict=True) if end >= 0)
    assert any(end < STEPS - 1 for end in ends)


@pytest.fixture(scope="module")
def branched(tiny_model: str) -> list[TrajectoryGroup]:
    """Greedy ones, then drawn ones, of the real engine."""
    engine = TorchEngine(model_path=tiny_model, lora=LoraSpec(r=2, alpha=4.0), max_rows=4, threads=1)
    sampler = SamplerSpec(8, 4, 4, "random", 0.9)
    specs: list[BranchSpec] = [GreedyBranches(2), DrawnBranches(2, 4.0)]
    return [
        engine.generate([GroupSpec(i, Problem("p", {}), 5, 3)], [[20, 21, 22]], sampler, branches=spec)[0]
        for i, spec in enumerate(specs)
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_a_group_with_branches_is_saved_and_read(branched: list[TrajectoryGroup], index: int, tmp_path: Path) -> None:
    group = branched[index]
    group.validate()
    bare = dataclasses.replace(group, **{f"branch_{n}": None for n in ("step", "ids", "logp", "rewards", "correct")})
    bare.validate()
    assert group.nbytes > bare.nbytes
    group.save(tmp_path / "group")
    read = TrajectoryGroup.load(tmp_path / "group")
    read.validate()
    for field in dataclasses.fields(group):
        ours, theirs = getattr(group, field.name), getattr(read, field.name)
        assert (ours is None) == (theirs is None), field.name
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes() and ours.shape == theirs.shape
    assert (group.branch_logp is None) == (index == 0)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"branch_step": None}, "some arrays of its branches are missing"),
        (0, {"branch_step": np.full((5, 2), 4, np.int16)}, "branch_step outside -1..3"),
        (0, {"branch_step": np.full((5, 3), 0, np.int16)}, "branch_step has shape"),
        (0, {"branch_correct": np.zeros((5, 2, 1), np.int8)}, "branch_correct has dtype"),
        (0, {"branch_ids": np.full((5, 2, 1, 8), 9, np.int32)}, "differs from its completion"),
        (1, {"branch_logp": np.full((5, 1, 2, 8), -1, np.float32)}, "branch_logp is"),
        (1, {"branch_logp": np.full((5, 1, 2, 8), np.nan, np.float32)}, "branch_logp is"),
    ],
)
def test_broken_branches_are_named(
    branched: list[TrajectoryGroup], index: int, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrajectoryError, match=message):
        dataclasses.replace(branched[index], **change).validate()
