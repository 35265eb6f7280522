"""Versions of the adapter in vLLM: each is the live PEFT model's, and none is served for another."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from rewards.errors import ConfigError, WeightMismatch
from rollout.adapters import PackedTensor, digest
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.settings import MERGED, VllmSettings
from rollout.engines.vllm.weights import Slots
from rollout.engines.vllm.wire import KEY, RowAnswer, RowAsked
from rollout.models.lora import LoraSpec
from rollout.sampling.head import draw as draw_at
from tests.vllm.conftest import LORA, Pair, draw, same, sampler

pytestmark = pytest.mark.vllm


def test_each_version_is_the_live_models(pair: Pair) -> None:
    """Five versions, more than vLLM has room for, back to an earlier one, and to the base."""
    adapters = [pair.adapter(seed) for seed in range(5)]
    before, first = None, None
    for version in (0, 1, 2, 3, 4, 0):
        pair.load(version, adapters[version])
        theirs = draw(pair.vllm, sampler())
        error = same(draw(pair.torch, sampler()), theirs, relative=1e-4)
        assert (theirs[0].policy_version, theirs[0].adapter_digest) == (version, digest(adapters[version]))
        if before is not None:
            change = np.abs(theirs[0].logp - before[0].logp).max()
            assert change > 100 * max(error, 1e-6), "control: a version's log-probs are its own"
        first, before = first or theirs, theirs
    same(first, theirs, relative=1e-4)
    for engine in (pair.torch, pair.vllm):
        engine.without_adapter()
    bare = draw(pair.vllm, sampler())
    same(draw(pair.torch, sampler()), bare, relative=1e-4)
    assert bare[0].policy_version == -1 and np.abs(bare[0].logp - theirs[0].logp).max() > 1e-2


def test_an_old_adapter_served_for_a_new_one_is_found_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: under a number that vLLM knows it goes on with what it has, and so it does without a reload."""
    pair.load(1, pair.adapter(1))
    new = pair.adapter(2)
    if pair.family in MERGED:
        monkeypatch.setattr(pair.vllm._llm, "collective_rpc", lambda *args, **kwargs: [None])
        why = "log-probs with the reloaded weights"
    else:
        monkeypatch.setattr(pair.vllm._weights, "_loads", pair.vllm._weights._loads - 1)
        why = "what was loaded has"
    with pytest.raises(WeightMismatch, match=why):
        pair.vllm.load_adapter(2, new, digest(new))
    assert (pair.vllm.policy_version, pair.vllm.adapter_digest) == (-1, "")
    monkeypatch.undo()
    pair.load(2, new)
    same(draw(pair.torch, sampler()), draw(pair.vllm, sampler()))


def test_rows_of_another_adapter_are_found_out(pair: Pair) -> None:
    if pair.family in MERGED:
        pytest.skip("has one set of weights")
    pair.load(1, pair.adapter(1))
    slots = pair.vllm._weights
    assert isinstance(slots, Slots)
    old = slots.request
    pair.load(2, pair.adapter(2))
    slots.request, wanted = old, slots.request
    pair.vllm._head._adapter = lambda: wanted.lora_int_id
    with pytest.raises(AssertionError, match="computed rows with the adapters"):
        draw(pair.vllm, sampler())
    slots.request = wanted
    pair.vllm._head._adapter = lambda: slots.number
    same(draw(pair.torch, sampler()), draw(pair.vllm, sampler()))


def test_weights_that_are_not_the_published_ones_are_refused(pair: Pair) -> None:
    adapter = pair.adapter(1)
    pair.load(1, adapter)
    name = next(iter(adapter))
    fewer = {other: tensor for other, tensor in adapter.items() if other != name}
    longer = PackedTensor("float32", (*adapter[name].shape, 1), adapter[name].data)
    for state, expected, why in (
        (pair.adapter(2), digest(adapter), "digest"),
        (fewer, digest(fewer), "disagree about parameters"),
        ({**adapter, name: longer}, digest({**adapter, name: longer}), name),
    ):
        with pytest.raises(WeightMismatch, match=why):
            pair.vllm.load_adapter(2, state, expected)
        assert pair.vllm.policy_version == -1
    pair.load(1, adapter)
    same(draw(pair.torch, sampler()), draw(pair.vllm, sampler()))


def test_a_version_is_loaded_while_rows_of_the_one_before_are_on_their_way(pair: Pair) -> None:
    """Six rows of the old one, of which four fit into a pass; two wait when the new one comes, and share a pass with
    its own."""
    if pair.family in MERGED:
        pytest.skip("replaces its weights, so a step's rows must be done")
    from vllm import PoolingParams

    spec, prompt = sampler(top_p=0.9), [10, 11, 12, 13]
    engine = pair.vllm._llm.llm_engine
    positions = np.arange(8)
    answers: dict[str, RowAnswer] = {}

    def question(key: int) -> RowAsked:
        first = len(prompt) - pair.vllm.family.logit_shift
        return RowAsked(spec, key, 0, positions, first + positions)

    def ask(name: str, key: int) -> None:
        ids = prompt + [pair.vllm.family.mask_token_id] * 16
        params = PoolingParams(task="token_classify", extra_kwargs={KEY: question(key).plain()})
        engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=pair.vllm._weights.request)

    def step() -> int:
        done = [output for output in engine.step() if output.finished]
        for output in done:
            answers[output.request_id] = RowAnswer.unpack(output.outputs.data, question(int(output.request_id[1:])))
        return len(done)

    numbers, expected = {}, {}
    for version, keys in (("a", range(6)), ("b", range(6, 8))):
        pair.load(1, pair.adapter({"a": 1, "b": 2}[version]))
        numbers[version] = pair.vllm._weights.number
        for key in keys:
            expected[f"{version}{key}"] = _first_step(pair, prompt, key, spec)
            ask(f"{version}{key}", key)
        if version == "a":
            assert step() == 4
    assert step() == 4 and answers.keys() == expected.keys()
    for name, answer in answers.items():
        assert answer.adapter == numbers[name[0]]
        np.testing.assert_array_equal(answer.drawn.token, expected[name].token)
        np.testing.assert_allclose(answer.drawn.logp, expected[name].logp, rtol=1e-3, atol=1e-5)
    assert np.abs(expected["a5"].logp_raw - expected["b6"].logp_raw).max() > 1e-2, "control: the versions differ"


def _first_step(pair: Pair, prompt: list[int], key: int, spec: Any) -> Any:
    ids = torch.tensor([prompt + [pair.torch.family.mask_token_id] * 16])
    with torch.inference_mode():
        logits = pair.torch._forward(ids, None, len(prompt) + torch.arange(8))
    keys_N, steps_N = np.full(8, key), np.zeros(8, np.int64)
    return draw_at(logits, keys_N, steps_N, np.arange(8), spec, pair.torch.family.mask_token_id)[0]


@pytest.mark.parametrize("change", [{"include_head": True}, {"target_modules": ("lm_head", "ff_out")}])
def test_maps_that_vllm_cannot_adapt_are_refused(pair: Pair, change: dict[str, Any]) -> None:
    if pair.family in MERGED:
        pytest.skip("merges whatever there is")
    head = "ff_out" if pair.family == "llada" else "lm_head"
    lora: LoraSpec = dataclasses.replace(LORA, **change)
    if lora.target_modules is not None:
        lora = dataclasses.replace(lora, target_modules=(pair.vllm.family.head_name,))
    with pytest.raises(ConfigError, match=f"LM head|can't adapt .*{head}"):
        if lora.include_head:
            VllmEngine(model_path=pair.folder, lora=lora, max_rows=1, settings=VllmSettings())
        Slots(None, pair.folder, pair.vllm.family, lora)
