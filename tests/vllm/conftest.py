"""Both engines over the same small policy, one family at a time: vLLM stays in this process."""

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from rewards.task import Problem
from rollout.adapters import PackedTensor, adapter_parameters, digest, pack
from rollout.engines.torch import TorchEngine
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.settings import VllmSettings
from rollout.models.lora import LoraSpec
from rollout.spans import Gap
from rollout.trajectory import BranchSpec, GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.small_policies import FAMILIES, write_policy

LORA = LoraSpec(r=4, alpha=12.0)
SIZES = (4, 2, 3)
PROMPTS = ([10, 11, 12], [13] * 7, [14, 15])


@dataclass(frozen=True)
class Pair:
    family: str
    folder: str
    torch: TorchEngine
    vllm: VllmEngine

    def adapter(self, seed: int, std: float = 0.1) -> dict[str, PackedTensor]:
        """A random one; the torch engine holds it afterwards."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(self.torch.model).values():
                parameter.normal_(std=std, generator=generator)
        return pack(adapter_parameters(self.torch.model))

    def load(self, version: int, adapter: dict[str, PackedTensor]) -> None:
        for engine in (self.torch, self.vllm):
            engine.load_adapter(version, adapter, digest(adapter))


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    write_policy(folder, request.param)
    shape: dict[str, Any] = {"model_path": str(folder), "lora": LORA, "threads": 1}
    yield Pair(
        request.param,
        str(folder),
        TorchEngine(max_rows=6, **shape),
        VllmEngine(max_rows=4, settings=VllmSettings(), **shape),
    )
    gc.collect()


def sampler(**changes: Any) -> SamplerSpec:
    plain = SamplerSpec(16, 8, 8, "low_confidence", 0.9)
    return dataclasses.replace(plain, **changes)


def draw(
    engine: Any,
    spec: SamplerSpec,
    *,
    seed: int = 7,
    branches: BranchSpec | None = None,
    gaps: Sequence[Sequence[Gap]] | None = None,
) -> list[TrajectoryGroup]:
    groups = [GroupSpec(i, Problem(str(i), {}), size, seed + i) for i, size in enumerate(SIZES)]
    return engine.generate(groups, [list(prompt) for prompt in PROMPTS], spec, gaps=gaps, branches=branches)


def same(ours: list[TrajectoryGroup], theirs: list[TrajectoryGroup], *, relative: float = 1e-3) -> float:
    """Everything counted or chosen is equal, every real number to this relative error, or 1e-5 where it is near 0.
    Returns the largest absolute difference."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(TrajectoryGroup):
            left, right = getattr(a, field.name), getattr(b, field.name)
            if not isinstance(left, np.ndarray):
                assert left == right or field.name == "counters", field.name
            elif left.dtype.kind == "f":
                np.testing.assert_allclose(right, left, rtol=relative, atol=1e-5, err_msg=field.name)
                worst = max(worst, float(np.abs(left - right).max(initial=0.0)))
            else:
                np.testing.assert_array_equal(right, left, err_msg=field.name)
    return worst
