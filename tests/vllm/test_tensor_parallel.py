"""A model that two processes compute, each a half of every map: the same completions, and no process left behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
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


STARTED = """
import sys, time
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.settings import VllmSettings
if __name__ == "__main__":
    engine = VllmEngine(model_path=sys.argv[1], lora=None, max_rows=4, threads=1,
                        settings=VllmSettings(tensor_parallel_size=2))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_ranks_of_a_killed_engine_end(tmp_path: Path) -> None:
    write_policy(tmp_path, "llada")
    (tmp_path / "started.py").write_text(STARTED)
    command = [sys.executable, str(tmp_path / "started.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and any(line == "ready\n" for line in process.stdout)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 2
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        for rank in alive:
            rank.kill()
    assert not alive
