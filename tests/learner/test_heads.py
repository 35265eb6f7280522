"""Heads: values of prompts and tokens, learned beside the policy, on ranks of any layout, and through a checkpoint."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from learner.objectives.base import HeadSpec
from learner.ranks.heads import PromptHead, TokenHead
from rewards.errors import CheckpointError
from rollout.adapters import AdapterState, digest, unpack
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.prompt_head import last_block
from rollout.trajectory import TrajectoryGroup
from tests.support.learner_ranks import (
    ProbedGroup,
    draw_batch,
    importing_ray,
    probed_groups,
    put,
    random_adapter,
    relative,
    settings,
)
from tests.support.published import write_published
from tests.support.small_masked_lms import write_masked_lm

HEAD_LR = 0.02


def config_of(ranks: int = 1, stage: int = 0, views: int = 16, **changes):
    layout = {"learner__ranks": ranks, "learner__zero_stage": stage, "learner__views_per_forward": views}
    defaults = {"objective__type": "trafl", "objective__head_lr": HEAD_LR, "learner__updates_per_batch": 2}
    return settings(**{**defaults, **layout, **changes})


def policy_of(path: Path):
    family = policy_adapter(path)
    return attach_lora(load_model(str(path), "float32"), family, LoraSpec(2, 2.0)), family


# ---- alone


@pytest.mark.parametrize("name", ["llada", "llada_moe", "dream", "modernbert", "bert", "distilbert"])
def test_every_family_has_a_last_block_whose_output_is_what_a_head_reads(tmp_path, name):
    """At all positions where no logits are asked for, as heads of prompts read it; of tokens, at those at least."""
    if name in ("llada", "llada_moe", "dream"):
        write_published(tmp_path / "model", name)
    else:
        write_masked_lm(tmp_path / "model", name)
    model, family = policy_of(tmp_path / "model")
    seen = []
    last_block(model, family).register_forward_hook(lambda module, args, out: seen.append(out))
    ids = torch.arange(3, 15).view(2, 6)
    for rows in ([], [4, 9]):
        model(input_ids=ids, attention_mask=None, logit_rows=torch.tensor(rows).long())
    hidden, asked = (found[0] if isinstance(found, tuple) else found for found in seen)
    assert hidden.shape == (2, 6, model.config.hidden_size)
    head = TokenHead(model, family, HeadSpec(8, 0.1), seed=1)
    torch.nn.init.normal_(head.net[3].weight)
    everywhere, alone = (head.values(found, np.array([4, 9])) for found in (hidden, asked))
    torch.testing.assert_close(alone, everywhere, atol=1e-5, rtol=1e-5)
    assert (head.values(hidden, np.array([4, 10])) - alone).abs().max() > 1e-3, "control"
    blocks = [module for name, module in model.named_modules() if type(module) is type(last_block(model, family))]
    assert blocks[-1] is last_block(model, family)


def test_a_head_says_0_at_first_is_seeded_and_is_restored_with_its_optimizers_state(tiny_model):
    model, family = policy_of(tiny_model)
    features = torch.randn(3, model.config.hidden_size)

    def head_of(width: int = 8, seed: int = 1) -> PromptHead:
        return PromptHead(model, family, HeadSpec(width, 0.1), seed=seed)

    head = head_of()
    assert not head.net(features).any()
    before = torch.random.get_rng_state()
    assert all(map(torch.equal, head.net.state_dict().values(), head_of().net.state_dict().values()))
    assert (head.net[1].weight != head_of(seed=2).net[1].weight).any()
    assert torch.equal(before, torch.random.get_rng_state())

    def learn(head: PromptHead) -> torch.Tensor:
        head.zero_grad()
        (head.net(features) - torch.tensor([[1.0], [2.0], [3.0]])).square().sum().backward()
        head.step(1.0, max_grad_norm=1e9)
        return head.net(features).detach()

    learn(head)
    kept = load_safetensors(save_safetensors(head.state()))
    went_on, again, fresh = learn(head), head_of(seed=2), head_of()
    again.restore({**kept, "master.0": torch.zeros(1)})
    assert torch.equal(learn(again), went_on)
    for name, parameter in fresh.net.named_parameters():
        parameter.data.copy_(kept[f"head.{name}/weights"])
    assert not torch.equal(learn(fresh), went_on), "control: without the optimizer's state it goes elsewhere"
    for wrong, tensors in ((head_of(width=9), kept), (head_of(), {"master.0": torch.zeros(1)})):
        with pytest.raises(CheckpointError, match="holds no head of . units.*leave the settings"):
            wrong.restore(tensors)


# ---- on ranks


@pytest.fixture(scope="module")
def groups(tiny_model) -> Iterator[dict[int, ProbedGroup]]:
    with importing_ray(cpus=4), probed_groups(tiny_model) as started:
        yield started


@pytest.fixture(scope="module")
def adapter(tiny_model) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def refs(groups, tiny_model, adapter) -> list[ray.ObjectRef]:
    return put(draw_batch(tiny_model, settings(), adapter))


def learnt(groups, adapter, refs, config):
    """The head's gradient in a batch's first update, and the policy's, the head's and its values in the second one."""
    group = groups[config.learner.ranks].restart(config, adapter)
    group.gradient(refs, 0)
    first = group.ask("head_gradients")
    report = group.update(refs, 0, config.learner.lr)
    second = group.gradient(refs, 1)
    return first, second, group.ask("head_gradients"), group.ask("head_values"), report


@pytest.mark.slow
@pytest.mark.heavy
def test_a_heads_gradient_does_not_depend_on_the_layout(groups, adapter, refs):
    first, policy, second, values, report = learnt(groups, adapter, refs, config_of())
    # With z = 0 the slope by the last map's bias is the mean of twice the residual, whose rewards cancel in each group.
    slope = 2 * report.statistics.values()["log_ratio/reference"]
    assert unpack(first[0]["3.bias"]).item() == pytest.approx(slope, rel=1e-4) and abs(slope) > 1e-3
    assert np.unique(np.round(values[0], 6)).size == 2, "the batch has two prompts"
    for layout in [(1, 0, 3), (1, 0, 1), (2, 0, 16), (2, 0, 1), (2, 2, 3), (2, 3, 16)]:
        found = learnt(groups, adapter, refs, config_of(*layout))
        for ranks_own in found[0]:
            assert relative(first[0], ranks_own) <= 1e-5, layout
        assert len({digest(own) for own in found[2]}) == 1, "all ranks hold the same"
        assert relative(second[0], found[2][0]) <= 1e-5 and relative(policy, found[1]) <= 1e-5, layout
        np.testing.assert_allclose(found[3][0], values[0], rtol=1e-4)


def ended_early(group: TrajectoryGroup) -> TrajectoryGroup:
    """The same with one completion of two blocks, so that what values are to be doesn't add up to 0: AdamW would make a
    whole step of the rounding of a slope that is 0."""
    drawn_GC = group.drawn.copy()
    drawn_GC[0, -group.sampler.block_length :] = False
    return dataclasses.replace(group, drawn=drawn_GC)


def values_learnt(groups, adapter, refs, config):
    """Of values of tokens: the head's gradient in a batch's first update; and the policy's and the head's in the first
    one of the next batch, whose advantages have the head's values in them."""
    group = groups[config.learner.ranks].restart(config, adapter)
    group.gradient(refs, 0)
    first = group.ask("head_gradients")
    report = group.update(refs, 0, config.learner.lr)
    return first, group.gradient(refs, 0), group.ask("head_gradients"), report


@pytest.mark.slow
def test_what_a_head_of_tokens_learns_does_not_depend_on_the_layout(groups, tiny_model, adapter):
    refs = put([ended_early(group) for group in draw_batch(tiny_model, settings(), adapter)])
    method = {"type": "trace_rl", "shrink": 4, "value_lr": HEAD_LR, "value_lambda": 0.5, "value_discount": 0.9}

    def config_of(ranks: int = 1, stage: int = 0, views: int = 16, **changes):
        layout = {"learner__ranks": ranks, "learner__zero_stage": stage, "learner__views_per_forward": views}
        return settings(**{**{f"objective__{key}": value for key, value in method.items()}, **layout, **changes})

    def found_in(*layout: int):
        return values_learnt(groups, adapter, refs, config_of(*layout))

    first, policy, second, report = found_in(1, 0, 16)
    figures = report.statistics.values()
    assert figures["value"] == 0 and figures["value/error"] == figures["value/target"] > 0
    for layout in [(1, 0, 1), (2, 0, 3), (2, 2, 3), (2, 3, 16)]:
        again = found_in(*layout)
        for ranks_own in again[0]:
            assert relative(first[0], ranks_own) <= 1e-5, layout
        assert len({digest(own) for own in again[2]}) == 1, "all ranks hold the same"
        assert relative(second[0], again[2][0]) <= 1e-5 and relative(policy, again[1]) <= 1e-5, layout
    without = groups[1].restart(config_of(objective__value_lr="null"), adapter)
    without.update(refs, 0, config_of().learner.lr)
    assert relative(policy, without.gradient(refs, 0)) > 0.01, "control: the values are in the advantages"

    still = config_of(learner__lr=1e-9)  # the policy stays as it is
    group = groups[1].restart(still, adapter)
    for _ in range(12):
        figures = group.update(refs, 0, still.learner.lr).statistics.values()
    assert figures["value/error"] < 0.95 * figures["value/target"], "it learns what its values are to be"


@pytest.mark.slow
def test_a_head_has_a_rate_of_its_own_and_takes_no_step_when_the_policy_takes_none(groups, adapter, refs):
    config = config_of()
    group = groups[1].restart(config, adapter)
    (shard,) = group.export()
    assert not load_safetensors(shard)["head.3.bias/weights"].any()
    group.update(refs, 0, config.learner.lr / 4)
    (shard,) = group.export()
    moved = load_safetensors(shard)["head.3.bias/weights"]
    assert abs(moved.item()) == pytest.approx(HEAD_LR / 4, rel=1e-4), "AdamW's first step is the rate"
    group.ask("spoil_head")
    before = group.publish().digest
    report = group.update(refs, 1, config.learner.lr)
    assert not report.applied and group.publish().digest == before
    assert torch.equal(*(load_safetensors(s)["head.1.weight/weights"] for s in (shard, group.export()[0])))


@pytest.mark.slow
def test_a_head_learns_its_normaliser_and_is_absent_where_no_method_asks_for_one(groups, adapter, refs):
    config = config_of(learner__lr=1e-9, objective__head_lr=1e-3)  # the policy stays as it is
    group = groups[1].restart(config, adapter)
    residuals = []
    for _ in range(8):
        report = group.update(refs, 0, config.learner.lr)
        figures = report.statistics.values()
        residuals.append(abs(figures["normaliser"] + figures["log_ratio/reference"]))
    assert residuals[-1] < 0.5 * residuals[0], "it goes to minus the mean log-ratio"
    assert figures["normaliser"] != 0
    group.restart(config_of(objective__normaliser="profiled"), adapter)
    group.update(refs, 0, 1e-3)
    assert not [name for name in load_safetensors(group.export()[0]) if name.startswith("head.")]
    group.restart(settings(), adapter)
    group.update(refs, 0, 1e-3)
    assert not [name for name in load_safetensors(group.export()[0]) if name.startswith("head.")]
