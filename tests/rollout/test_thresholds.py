"""Thresholds that completions draw: the law, what is recorded of the draw, and that each completion is written by its
own; and the head that makes the law, published with an adapter.

Shapes: G completions of a group, K thresholds.
"""

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel

from rewards.errors import ConfigError, TrajectoryError, WeightMismatch
from rewards.task import Problem
from rollout.adapters import (
    HEAD,
    PackedTensor,
    adapter_parameters,
    digest,
    pack,
    read_peft_folder,
    without_head,
    write_peft_folder,
)
from rollout.engines.groups import draw_groups
from rollout.engines.torch import TorchEngine
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, spec_of_adapter
from rollout.models.prompt_head import draw_thresholds, head_net
from rollout.sampling.head import LogitsHead
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.hand_made import acting_adapter

THRESHOLDS = (0.013, 0.0145, 0.5)
"""The tiny model is sure of nothing."""
SAMPLER = SamplerSpec(12, 12, 6, "random", temperature=0.8, threshold=THRESHOLDS)
LORA = LoraSpec(r=4, alpha=8.0)
PROMPTS = [list(range(20, 27)), list(range(30, 34))]


@pytest.fixture(scope="module")
def engine(tiny_model) -> TorchEngine:
    return TorchEngine(model_path=tiny_model, lora=LORA, max_rows=16, threads=1)


@pytest.fixture
def published(engine):
    """An adapter with a head whose law depends on the prompt; afterwards the engine is the base again."""
    torch.manual_seed(0)
    net = head_net(engine.model.config.hidden_size, 8, len(THRESHOLDS))
    torch.nn.init.normal_(net[3].weight, std=0.3)
    yield {**acting_adapter(engine.model), **pack({HEAD + name: p for name, p in net.named_parameters()})}
    engine.without_adapter()


def draw(engine: TorchEngine, sampler: SamplerSpec = SAMPLER, *, size: int = 6) -> list[TrajectoryGroup]:
    specs = [GroupSpec(i, Problem(f"p{i}", {}), size, 7 + i) for i in range(len(PROMPTS))]
    groups = engine.generate(specs, PROMPTS, sampler)
    for group in groups:
        dataclasses.replace(group, rewards=np.zeros((size, 1), np.float32), reward_names=("r",)).validate()
    return groups


# ---- the draw


def test_draws_follow_the_law_and_record_its_log_prob_and_greed_takes_the_likeliest():
    law_K = torch.tensor([0.2, 0.5, 0.3]).log()
    law_NK = law_K.expand(4000, 3)
    drawn = draw_thresholds(THRESHOLDS, law_NK, range(4000), greedy=False)
    values, counts = np.unique(drawn.value_N, return_counts=True)
    np.testing.assert_array_equal(values, np.float32(THRESHOLDS))
    np.testing.assert_allclose(counts / 4000, [0.2, 0.5, 0.3], atol=0.03)
    at_N = np.searchsorted(np.float32(THRESHOLDS), drawn.value_N)
    np.testing.assert_allclose(drawn.logp_N, law_K.numpy()[at_N], rtol=1e-6)
    greedy = draw_thresholds(THRESHOLDS, law_NK[:5], range(5), greedy=True)
    assert set(greedy.value_N) == {np.float32(THRESHOLDS[1])}


# ---- completions


def test_without_a_head_the_law_is_uniform_and_each_completion_is_written_by_what_it_drew(engine, published):
    alone = without_head(published)
    engine.load_adapter(2, alone, digest(alone))
    groups = draw(engine, size=24)
    for group in groups:
        assert set(group.threshold) == set(np.float32(THRESHOLDS))
        np.testing.assert_allclose(group.threshold_logp, -np.log(3), rtol=1e-6)
    assert len({int(n) for group in groups for n in group.nfe}) > 2, "thresholds differ in steps"
    for threshold in THRESHOLDS:
        alone = draw(engine, dataclasses.replace(SAMPLER, threshold=float(np.float32(threshold))), size=24)
        for ours, theirs in zip(groups, alone, strict=True):
            rows = ours.threshold == np.float32(threshold)
            for name in ("completion_ids", "unmask_step", "unmask_rank", "nfe", "drawn"):
                np.testing.assert_array_equal(getattr(ours, name)[rows], getattr(theirs, name)[rows])
            assert (ours.unmask_step[~rows] != theirs.unmask_step[~rows]).any(), "control: of another threshold"
            assert theirs.threshold is None and theirs.threshold_logp is None


def test_draws_are_repeated_whatever_is_written_together(engine, tiny_model, published):
    engine.load_adapter(3, published, digest(published))
    one_by_one = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=1, threads=1)
    one_by_one.load_adapter(3, published, digest(published))
    for ours, again, theirs in zip(draw(engine), draw(engine), draw(one_by_one), strict=True):
        for name in ("threshold", "threshold_logp", "completion_ids", "unmask_step"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(again, name))
        np.testing.assert_array_equal(ours.threshold, theirs.threshold)
        np.testing.assert_allclose(ours.threshold_logp, theirs.threshold_logp, atol=1e-5)


def test_the_law_is_the_heads_of_each_prompt_and_greedy_completions_take_its_likeliest(engine, published):
    engine.load_adapter(3, published, digest(published))
    first, second = (np.exp(group.threshold_logp) for group in draw(engine, size=24))
    assert max(first.max(), second.max()) > 0.4 and abs(first.max() - second.max()) > 1e-3, "another law each"
    for group in draw(engine, size=24):
        chances = {float(t): float(np.exp(p)) for t, p in zip(group.threshold, group.threshold_logp, strict=True)}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5) or len(chances) < 3
    for group in draw(engine, dataclasses.replace(SAMPLER, temperature=0.0), size=2):
        assert np.exp(group.threshold_logp[0]) > 1 / 3 and len(set(group.threshold)) == 1
    engine.without_adapter()
    np.testing.assert_allclose(draw(engine)[0].threshold_logp, -np.log(3), rtol=1e-6)


def test_what_is_recorded_is_kept_on_disk_and_required(engine, tmp_path):
    group = dataclasses.replace(draw(engine)[0], rewards=np.zeros((6, 1), np.float32), reward_names=("r",))
    group.save(tmp_path / "group")
    loaded = TrajectoryGroup.load(tmp_path / "group")
    assert loaded.sampler == group.sampler and hash(loaded.sampler) == hash(group.sampler)
    np.testing.assert_array_equal(loaded.threshold, group.threshold)
    np.testing.assert_array_equal(loaded.threshold_logp, group.threshold_logp)
    with pytest.raises(TrajectoryError, match="no threshold"):
        dataclasses.replace(group, threshold_logp=None).validate()
    with pytest.raises(TrajectoryError, match="threshold has shape"):
        dataclasses.replace(group, threshold=group.threshold[:2]).validate()


# ---- the head, published


def test_the_digest_covers_the_head(engine, published):
    engine.load_adapter(3, published, digest(published))
    assert engine.adapter_digest == digest(published)
    name = HEAD + "3.bias"
    spoilt = PackedTensor(published[name].dtype, published[name].shape, published[name].data ^ 1)
    with pytest.raises(WeightMismatch, match="published with digest"):
        engine.load_adapter(4, {**published, name: spoilt}, digest(published))
    assert engine.policy_version == -1


def test_a_head_for_another_number_of_thresholds_and_an_engine_without_laws_are_refused(engine, published):
    engine.load_adapter(3, published, digest(published))
    with pytest.raises(ConfigError, match="law of 3 thresholds, and rollout.sampler.threshold has 2"):
        draw(engine, dataclasses.replace(SAMPLER, threshold=(0.1, 0.2)))
    with pytest.raises(ConfigError, match="draws with one threshold"):
        head = LogitsHead(lambda rows, asked: torch.zeros(0), 2)
        spec = GroupSpec(0, Problem("p", {}), 1, 1)
        draw_groups(head, engine.family, [spec], PROMPTS[:1], SAMPLER, held=(0, ""), max_rows=1)


def test_on_disk_the_head_lies_beside_an_adapter_that_peft_reads(engine, tiny_model, published, tmp_path):
    config = engine.model.peft_config["default"].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_peft_folder(tmp_path, published, plain)
    state, read_config = read_peft_folder(tmp_path)
    assert digest(state) == digest(published)
    spec = spec_of_adapter(state, read_config, engine.family, tmp_path)
    assert (spec.r, spec.alpha, spec.include_head, spec.target_modules) == (4, 8.0, False, None)
    adapted = PeftModel.from_pretrained(load_model(tiny_model, "float32"), str(tmp_path))
    engine.load_adapter(0, state, digest(state))
    assert digest(pack(adapter_parameters(adapted))) == digest(pack(adapter_parameters(engine.model)))
    without = without_head(published)
    (tmp_path / "plain").mkdir()
    write_peft_folder(tmp_path / "plain", without, plain)
    assert digest(read_peft_folder(tmp_path / "plain")[0]) == digest(without)
