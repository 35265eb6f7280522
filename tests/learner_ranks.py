"""Real learner ranks for tests: DeepSpeed in Ray actors, with counters and controls; and batches drawn by the engine."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from learner import group as learner_group
from learner.config import RunConfig, load_config
from learner.group import LearnerGroup
from learner.objectives import make_objective
from learner.rank import LearnerRank, UpdateReport, lora_spec
from rewards.task import Problem
from rollout.adapters import AdapterState, adapter_parameters, digest, pack, unpack
from rollout.engines.torch import TorchEngine
from rollout.models import load_model, policy_adapter
from rollout.models.lora import attach_lora
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.hand_made import acting_adapter

SAMPLER = SamplerSpec(24, 12, 8, "random", temperature=0.8, top_k=20, top_p=0.95)


def settings(**changes: Any) -> RunConfig:
    """The default recipe with a small adapter; sections' keys are written ``learner__zero_stage=2``."""
    arguments = [f"{key.replace('__', '.')}={value}" for key, value in {"lora__r": 4, **changes}.items()]
    return load_config(["recipe=sudoku", *arguments])


def fresh_adapter(model_path: str, config: RunConfig) -> AdapterState:
    """What the ranks start from when they are given no adapter."""
    return pack(adapter_parameters(_policy(model_path, config)))


def random_adapter(model_path: str, config: RunConfig) -> AdapterState:
    """An adapter in the learner's dtype whose A and B matrices all have a gradient."""
    return acting_adapter(_policy(model_path, config))


def draw_batch(
    model_path: str,
    config: RunConfig,
    adapter: AdapterState,
    *,
    groups: int = 4,
    size: int = 4,
    sampler: SamplerSpec = SAMPLER,
) -> list[TrajectoryGroup]:
    """Groups drawn by an engine that holds ``adapter`` as version 0, with prompts of two lengths and random rewards;
    the second group is without signal."""
    engine = TorchEngine(model_path=model_path, lora=lora_spec(config), max_rows=16, threads=1)
    engine.load_adapter(0, adapter, digest(adapter))
    specs = [GroupSpec(i, Problem(f"p{i}", {}), size, 77 + i) for i in range(groups)]
    rng = np.random.default_rng(0)
    drawn = engine.generate(specs, [list(range(10, 28 + i % 2)) for i in range(groups)], sampler)
    rewards = rng.random((groups, size, 2)).astype(np.float32)
    rewards[1] = 0.25
    return [
        dataclasses.replace(group, rewards=reward, reward_names=("shape", "verdict"))
        for group, reward in zip(drawn, rewards, strict=True)
    ]


def flat(state: AdapterState) -> torch.Tensor:
    """All of an adapter's (or a gradient's) numbers as one float64 vector."""
    return torch.cat([unpack(state[name]).flatten().double() for name in sorted(state)])


def relative(a: AdapterState, b: AdapterState) -> float:
    """L2 norm of the difference over the norm of ``a``."""
    return float((flat(a) - flat(b)).norm() / flat(a).norm())


class ProbedRank(LearnerRank):
    """A rank that counts what its model does, can be started again in the same process, and has a control."""

    def start(self, address: str, adapter: AdapterState | None, shard: bytes | None) -> dict[str, Any]:
        described = super().start(address, adapter, shard)
        self.counts: Counter[str] = Counter()

        def model_called(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            kind = "policy" if torch.is_grad_enabled() else "reference"
            self.counts.update({f"{kind}_forwards": 1, f"{kind}_rows": len(kwargs["input_ids"])})

        def block_called(module: torch.nn.Module, args: Any) -> None:
            self.counts["block_runs"] += 1

        self.engine.module.register_forward_pre_hook(model_called, with_kwargs=True)
        first_block = next(m for n, m in self.engine.module.named_modules() if n.endswith("blocks.0.attn_norm"))
        first_block.register_forward_pre_hook(block_called)
        return described

    def reconfigure(self, config: RunConfig) -> None:
        """Work with other settings from now on; what is built at the start needs another ``start``."""
        self.config, self.objective = config, make_objective(config.objective)

    def counted(self) -> dict[str, int]:
        """What was counted since the last call."""
        counts, self.counts = self.counts, Counter()
        return dict(counts)

    def update_as_published(self, refs: Sequence[Any], update_index: int, lr: float) -> UpdateReport:
        """Control: as the reference runs under DeepSpeed, every backward is a boundary and is followed by a step."""
        backward = self.engine.backward

        def backward_and_step(*args: Any, **kwargs: Any) -> None:
            self.engine.set_gradient_accumulation_boundary(True)
            backward(*args, **kwargs)
            self.engine.step()

        self.engine.backward = backward_and_step
        try:
            return self.update(refs, update_index, lr)
        finally:
            self.engine.backward = backward


class ProbedGroup(LearnerGroup):
    """A learner group of probed ranks, which can be started again without new processes."""

    def __init__(self, config: RunConfig, model_path: str, *, adapter: AdapterState | None = None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner_group, "LearnerRank", ProbedRank)
            super().__init__(config, model_path, adapter=adapter, shards=None)

    def restart(
        self, config: RunConfig, adapter: AdapterState | None = None, shards: Sequence[bytes] | None = None
    ) -> "ProbedGroup":
        """New model, engine and optimizer in the same processes: what a new group is, without the seconds of imports."""
        self.reconfigure(config)
        self._start(adapter, shards)
        return self

    def reconfigure(self, config: RunConfig) -> None:
        self.config = config
        self.ask("reconfigure", config)

    def ask(self, method: str, *args: Any) -> list[Any]:
        """All ranks' answers."""
        return self._all(method, *args, limit=120.0)


def _policy(model_path: str, config: RunConfig) -> torch.nn.Module:
    return attach_lora(load_model(model_path, config.learner.dtype), policy_adapter(model_path), lora_spec(config))
