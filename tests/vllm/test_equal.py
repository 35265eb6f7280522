"""vLLM's engine draws what the torch engine draws: the same tokens in the same order, by the same laws."""

from typing import Any

import numpy as np
import pytest

from rewards.errors import ConfigError
from rollout.sampling.denoise import POSITION_RULES
from rollout.spans import Gap
from rollout.trajectory import BranchSpec, DrawnBranches, GreedyBranches
from tests.vllm.conftest import PROMPTS, Pair, draw, same, sampler

pytestmark = pytest.mark.vllm

LAWS: dict[str, dict[str, Any]] = {
    "whole": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "both": {"top_k": 9, "top_p": 0.9, "temperature": 0.6},
    "threshold": {"threshold": 0.2},
    "greedy": {"temperature": 0.0},
}


@pytest.fixture(params=["base", "adapter"], scope="module")
def held(request: pytest.FixtureRequest, pair: Pair) -> Pair:
    """Both engines, bare or with an adapter whose alpha is no multiple of its rank's power of two."""
    if request.param == "base":
        pair.torch.without_adapter()
        pair.vllm.without_adapter()
    else:
        pair.load(3, pair.adapter(1))
    return pair


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rule", POSITION_RULES)
def test_whole_rollouts_are_equal(held: Pair, rule: Any, law: str) -> None:
    """Prompts of three lengths, nine completions through six rows here and four there."""
    spec = sampler(position_rule=rule, **LAWS[law])
    ours, theirs = draw(held.torch, spec), draw(held.vllm, spec)
    assert same(ours, theirs) < 1e-3
    assert len({ids.tobytes() for group in theirs for ids in group.completion_ids}) > 1, "control: there are several"
    if spec.temperature:
        other = draw(held.vllm, spec, seed=8)
        assert any((a.completion_ids != b.completion_ids).any() for a, b in zip(theirs, other, strict=True))


@pytest.mark.parametrize("branches", [GreedyBranches(3), DrawnBranches(2, 4.0)])
@pytest.mark.parametrize("law", ["whole", "both"])
def test_branches_are_equal(held: Pair, law: str, branches: BranchSpec) -> None:
    spec = sampler(**LAWS[law])
    theirs = draw(held.vllm, spec, branches=branches)
    assert same(draw(held.torch, spec, branches=branches), theirs) < 1e-3
    assert theirs[0].branch_ids is not None
    same([*draw(held.vllm, spec)], [_without_branches(group) for group in theirs])


@pytest.mark.parametrize("law", ["both", "threshold"])
def test_texts_with_gaps_are_equal(held: Pair, law: str) -> None:
    gaps = [(Gap(1, (3, 5)), Gap(len(prompt), (4,))) for prompt in PROMPTS]
    branches = None if law == "threshold" else DrawnBranches(2, 4.0)
    theirs = draw(held.vllm, sampler(**LAWS[law]), branches=branches, gaps=gaps)
    assert same(draw(held.torch, sampler(**LAWS[law]), branches=branches, gaps=gaps), theirs) < 1e-3
    assert all(group.places is not None for group in theirs)


def test_rows_that_leave_early_are_equal(held: Pair) -> None:
    """An end at every place of the first block in some rows: they leave, and waiting ones take their places."""
    eos = held.torch.family.eos_token_id
    spec = sampler(completion_length=16, block_length=1, steps=16, position_rule="left_to_right")
    for seed in range(40):
        theirs = draw(held.vllm, spec, seed=1000 * seed)
        if any((~group.drawn).any() for group in theirs):
            break
    else:
        pytest.fail(f"no completion drew {eos} in time")
    same(draw(held.torch, spec, seed=1000 * seed), theirs)


def test_a_rows_draws_depend_on_no_other_row(held: Pair) -> None:
    spec = sampler(**LAWS["both"])
    together = draw(held.vllm, spec)
    before, held.vllm.max_rows = held.vllm.max_rows, 1
    alone = draw(held.vllm, spec)
    held.vllm.max_rows = before
    same(together, alone)


def test_a_sequence_that_is_too_long_is_refused(held: Pair) -> None:
    with pytest.raises(ConfigError, match="have 103 tokens, and vLLM was started for 96"):
        draw(held.vllm, sampler(completion_length=96))


def _without_branches(group: Any) -> Any:
    import dataclasses

    names = [field.name for field in dataclasses.fields(group) if field.name.startswith("branch_")]
    return dataclasses.replace(group, **dict.fromkeys(names))


def test_control_a_difference_is_noticed(held: Pair) -> None:
    theirs = draw(held.vllm, sampler())
    theirs[0].logp[0, 0] *= 1.01
    with pytest.raises(AssertionError, match="logp"):
        same(draw(held.torch, sampler()), theirs)
    ours = draw(held.torch, sampler())
    assert not np.array_equal(theirs[0].logp, ours[0].logp)
