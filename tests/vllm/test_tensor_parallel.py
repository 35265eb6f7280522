"""A model that two processes compute, each a half of every map: the same completions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.adapters import adapter_parameters, digest, pack
from rollout.engines.torch import TorchEngine
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.settings import VllmSettings
from tests.support.small_policies import write_policy
from tests.vllm.conftest import LORA, draw, same, sampler

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_two_ranks_draw_what_one_draws(tmp_path: Path) -> None:
    write_policy(tmp_path, "llada")
    options: dict[str, Any] = {"model_path": str(tmp_path), "lora": LORA, "threads": 1}
    one = TorchEngine(max_rows=6, **options)
    with torch.no_grad():
        for parameter in adapter_parameters(one.model).values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapter = pack(adapter_parameters(one.model))
    two = VllmEngine(max_rows=4, settings=VllmSettings(tensor_parallel_size=2), **options)
    for spec in (sampler(), sampler(top_p=0.8), sampler(position_rule="decoupled_confidence")):
        two.load_adapter(0, adapter, digest(adapter))
        one.load_adapter(0, adapter, digest(adapter))
        same(draw(one, spec), draw(two, spec))
        for engine in (one, two):
            engine.without_adapter()
        same(draw(one, spec), draw(two, spec))
