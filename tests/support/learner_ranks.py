"""Real learner ranks for tests: DeepSpeed in Ray actors, with counters and controls; batches drawn by the engine."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.likelihood.scorer import PolicyScores, Scores, score
from learner.likelihood.views import Unit, View, ViewBatch, build_batch
from learner.objectives import make_objective
from learner.objectives.base import Objective, Remeasured, RowSums, UpdateContext, Wanted, Weighed
from learner.objectives.statistics import Statistics
from learner.ranks import group as learner_group
from learner.ranks import rank as learner_rank
from learner.ranks.group import LearnerGroup
from learner.ranks.heads import PromptHead
from learner.ranks.optim import deepspeed_config, inner_optimizer
from learner.ranks.rank import lora_spec
from learner.ranks.trajectories import LearnerRank
from learner.runs.local_ray import local_ray
from learner.settings.run import RunConfig, load_config
from rewards.task import Problem
from rollout.adapters import AdapterState, adapter_parameters, digest, load_state, pack, unpack
from rollout.engines.torch import TorchEngine
from rollout.messages import GroupRef, put_group
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import attach_lora
from rollout.spans import Gap
from rollout.trajectory import BranchSpec, GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.hand_made import acting_adapter

SAMPLER = SamplerSpec(24, 12, 8, "random", temperature=0.8, top_k=20, top_p=0.95)


@contextlib.contextmanager
def importing_ray(cpus: int) -> Iterator[None]:
    """A Ray of our own, whose workers can import the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        with local_ray(num_cpus=cpus, logging_level="ERROR"):
            yield


def settings(**changes: Any) -> RunConfig:
    """The default recipe with a small adapter; ``learner__zero_stage=2`` is the key learner.zero_stage."""
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
    sampler: SamplerSpec = SAMPLER,
    branches: BranchSpec | None = None,
    gaps: Sequence[Sequence[Gap]] | None = None,
) -> list[TrajectoryGroup]:
    """4 groups of 4, drawn by an engine that holds ``adapter`` as version 0, with prompts of two lengths and random
    rewards, of branches too; the second group is without signal."""
    engine = TorchEngine(
        model_path=model_path, lora=lora_spec(config), max_rows=16, threads=1, dtype=config.learner.dtype
    )
    engine.load_adapter(0, adapter, digest(adapter))
    specs = [GroupSpec(i, Problem(f"p{i}", {}), 4, 277 + i) for i in range(4)]
    prompts = [list(range(10, 28 + i % 2)) for i in range(4)]
    drawn = engine.generate(specs, prompts, sampler, gaps=gaps, branches=branches)
    rewards = np.random.default_rng(2).random((4, 4, 2)).astype(np.float32)
    rewards[1] = 0.25
    graded = [
        dataclasses.replace(group, rewards=rewards_GR, reward_names=("shape", "verdict"))
        for group, rewards_GR in zip(drawn, rewards, strict=True)
    ]
    if branches is None:
        return graded
    shape = (4, 4, branches.states, branches.fills, 2)
    of_branches = np.random.default_rng(3).random(shape).astype(np.float32)
    of_branches[1] = 0.25
    return [dataclasses.replace(group, branch_rewards=of_branches[i]) for i, group in enumerate(graded)]


def put(groups: Sequence[TrajectoryGroup]) -> list[GroupRef]:
    return [put_group(group) for group in groups]


def flat(state: AdapterState) -> torch.Tensor:
    """All of an adapter's (or a gradient's) numbers as one float64 vector."""
    return torch.cat([unpack(state[name]).flatten().double() for name in sorted(state)])


def relative(expected: AdapterState, state: AdapterState) -> float:
    """L2 norm of the difference over the norm of what was expected."""
    assert set(expected) == set(state)
    return float((flat(expected) - flat(state)).norm() / flat(expected).norm())


def adamw_steps(group: LearnerGroup) -> set[int]:
    """Optimizer steps that AdamW has counted in its own state, over all ranks and parameters; 0 without a state."""
    steps = set()
    for shard in group.commit().shards:
        tensors = load_safetensors(shard)
        counted = {int(value) for name, value in tensors.items() if name.startswith("step.")}
        steps |= counted or {0}
    return steps


def plain_gradient(
    model_path: str,
    config: RunConfig,
    adapter: AdapterState,
    groups: Sequence[TrajectoryGroup],
    *,
    normaliser: float,
    update_index: int = 0,
) -> AdapterState:
    """The gradient of a batch's first update by plain autograd: one unit at a time, no plan, no DeepSpeed."""
    family, objective = policy_adapter(model_path), make_objective(config.objective)
    model = _policy(model_path, config).train()
    load_state(model, adapter)
    context = UpdateContext(config.run.seed, update_index, len(groups), (family.eos_token_id,))

    def built(unit: Unit) -> ViewBatch:
        ids = {"mask_id": family.mask_token_id, "pad_id": family.pad_token_id}
        return build_batch(unit, groups, **ids, law=objective.needs.law, unit_sizes=[len(unit)])

    def with_adapter(batch: ViewBatch) -> Scores:
        with torch.no_grad():
            return score(model, batch, family=family)

    def without_adapter(batch: ViewBatch) -> Scores:
        with model.disable_adapter():
            return with_adapter(batch)

    def sums_of(wanted: list[Sequence[Unit]], scored: Callable[[ViewBatch], Scores]) -> tuple[np.ndarray, ...]:
        sums = tuple(np.zeros(group.size) for group in groups)
        for sums_G, units in zip(sums, wanted, strict=True):
            for batch in map(built, units):
                rows_N = np.array([view.row for view in batch.views])[batch.view_of_score]
                np.add.at(sums_G, rows_N, batch.weight * scored(batch).logp_N.double().numpy())
        return sums

    credit = objective.credit(groups)
    if isinstance(objective, Weighed):
        units = [objective.measured(index, group, context) for index, group in enumerate(groups)]
        sums = RowSums(sums_of(units, with_adapter), sums_of(units, without_adapter))
        if isinstance(objective, Remeasured):
            again = [objective.remeasured(index, group, context) for index, group in enumerate(groups)]
            sums = sums._replace(present=sums_of(again, with_adapter) if any(again) else ())
        credit = objective.weigh(groups, credit, sums).by_group
    credited = enumerate(zip(groups, credit, strict=True))
    wanted = [objective.wanted(index, group, credit_G, context) for index, (group, credit_G) in credited]
    added = [each.added for each in wanted if each.added is not None]
    parts = [(each, normaliser) for each in wanted] + [(each, sum(a.divisor for a in added)) for each in added]
    for batch, divisor in ((built(unit), divisor) for each, divisor in parts for unit in each.units):
        policy = score(model, batch, family=family, vocabulary=objective.needs.vocabulary)
        if objective.needs.head is not None:  # a head's values are 0 at first
            zeros = {"value_Z": torch.zeros(len(batch.views)), "value_N": torch.zeros(len(batch.targets))}
            policy = dataclasses.replace(policy, **zeros)
        reference = without_adapter(batch) if objective.needs.reference else None
        loss, _ = objective.loss(PolicyScores(policy, policy.detached(), reference, policy.detached()), batch)
        (loss / divisor).backward()
    return pack({name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None})


class ProbedRank(LearnerRank):
    """A rank that counts what its model does, can be started again in the same process, and has controls."""

    def start(self, address: str, adapter: AdapterState | None, shard: bytes | None) -> dict[str, Any]:
        described = super().start(address, adapter, shard)
        self._phase_weights = None  # of the engine before
        self.counts: Counter[str] = Counter()

        def model_called(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            kind = "policy" if torch.is_grad_enabled() else "reference"
            self.counts.update({f"{kind}_forwards": 1, f"{kind}_rows": len(kwargs["input_ids"])})

        def block_ran(module: torch.nn.Module, args: Any) -> None:
            self.counts["block_runs"] += 1

        self.engine.module.register_forward_pre_hook(model_called, with_kwargs=True)
        norm = next(module for name, module in self.engine.module.named_modules() if name.endswith("0.attn_norm"))
        norm.register_forward_pre_hook(block_ran)
        return described

    def _complete(self, groups: list[TrajectoryGroup], views: Sequence[View]) -> None:
        outlines = sum(group.is_outline for group in groups)
        super()._complete(groups, views)
        self.counts["whole_groups"] += outlines - sum(group.is_outline for group in groups)

    def reconfigure(self, config: RunConfig) -> None:
        """Work with other settings from now on; what is built at the start needs another ``start``."""
        self.config, self.objective = config, make_objective(config.objective)

    def cut_units(self) -> None:
        """Control: from now on each view is a unit of its own."""
        self.objective = _CutUnits(self.objective)

    def head_values(self) -> list[float]:
        """Of each prompt of the newest update."""
        assert isinstance(self._head, PromptHead)
        values: list[float] = self._head.net(self._head.features_QD).squeeze(1).tolist()
        return values

    def head_gradients(self) -> AdapterState:
        """Of the newest update, averaged over ranks; empty without a head."""
        if self._head is None:
            return {}
        return pack({name: p.grad for name, p in self._head.net.named_parameters() if p.grad is not None})

    def spoil_head(self) -> None:
        """From now on the head's values are infinite."""
        assert self._head is not None
        with torch.no_grad():
            list(self._head.net.parameters())[-1].fill_(torch.inf)

    def counted(self) -> dict[str, int]:
        """What was counted since the last call."""
        counts, self.counts = self.counts, Counter()
        return dict(counts)

    def tell_deepspeed(self, changes: Mapping[str, Any]) -> None:
        """Settings of its own at the next starts, over those that a rank gives it."""
        vars(learner_rank)["deepspeed_config"] = lambda **given: {**deepspeed_config(**given), **changes}

    def reduced_in_an_update(self, refs: Sequence[Any], lr: float) -> dict[tuple[str, str], int]:
        """How often whole gradients crossed ranks, by collective and dtype."""
        with _Reductions() as seen:
            self.update(refs, 0, lr)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in adapter_parameters(self.engine.module).values())
        return dict(Counter((name, dtype) for name, dtype, size in seen.found if size >= trained // 2))

    def step_after_every_backward(self, refs: Sequence[Any], lr: float) -> int:
        """Control: an update as the reference runs under DeepSpeed, where every backward is followed by a step.
        Returns the number of backwards."""
        plan, groups = self._work(refs, 0)
        for group in inner_optimizer(self.engine).param_groups:
            group["lr"] = lr
        backward = self.engine.backward

        def backward_and_step(*args: Any, **kwargs: Any) -> None:
            self.engine.set_gradient_accumulation_boundary(True)
            backward(*args, **kwargs)
            self.engine.step()

        self.engine.backward = backward_and_step
        try:
            self._accumulate(plan, groups)
        finally:
            self.engine.backward = backward
        return len(plan.forwards[self.rank])

    def gradient_as_published(self, refs: Sequence[Any]) -> AdapterState:
        """Control: every micro-batch divides by its own completions, and micro-batches and ranks are averaged."""
        ours = self.objective
        forwards = len(self._work(refs, 0)[0].forwards[self.rank])
        self.objective = _DividedPerMicroBatch(ours, forwards)
        try:
            return self.gradient(refs, 0)
        finally:
            self.objective = ours


class _Reductions(TorchDispatchMode):
    """Sums over ranks, as torch hands them to the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, int]] = []
        """collective, dtype, numbers in it"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.name():
            given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            dtype = str(given[0].dtype).removeprefix("torch.")
            self.found.append((func.name(), dtype, max(tensor.numel() for tensor in given)))
        return func(*args, **(kwargs or {}))


class _DividedPerMicroBatch:
    """An objective whose loss is a mean over the micro-batch; what the plan will divide by is multiplied back in."""

    def __init__(self, inner: Objective, micro_batches: int) -> None:
        self.inner, self.micro_batches = inner, micro_batches
        self.config, self.needs, self.credit = inner.config, inner.needs, inner.credit
        self.completions = 0

    def wanted(self, index: int, group: TrajectoryGroup, *args: Any, **kwargs: Any) -> Wanted:
        self.completions += group.size
        return self.inner.wanted(index, group, *args, **kwargs)

    def loss(self, scores: PolicyScores, batch: ViewBatch) -> tuple[Any, Statistics]:
        loss, statistics = self.inner.loss(scores, batch)
        own = len({(view.group, view.row) for view in batch.views})
        return loss * (self.completions / (own * self.micro_batches)), statistics


class _CutUnits:
    """An objective whose units are cut into their views."""

    def __init__(self, inner: Objective) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def wanted(self, *args: Any, **kwargs: Any) -> Wanted:
        wanted = self.inner.wanted(*args, **kwargs)
        return dataclasses.replace(wanted, units=[(view,) for unit in wanted.units for view in unit])


class ProbedGroup(LearnerGroup):
    """A learner group of probed ranks, which can be started again without new processes."""

    def __init__(self, config: RunConfig, model_path: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner_group, "LearnerRank", ProbedRank)
            super().__init__(config, model_path, adapter=None, shards=None)

    def restart(
        self, config: RunConfig, adapter: AdapterState | None = None, shards: Sequence[bytes] | None = None
    ) -> "ProbedGroup":
        """New model, engine and optimizer in the same processes: a new group without its seconds of imports."""
        assert config.learner.ranks == self.config.learner.ranks
        self.reconfigure(config)
        self._start(adapter, shards)
        if config.objective.phases() is not None:
            self.enter_phase(0)
        return self

    def reconfigure(self, config: RunConfig) -> None:
        """Other settings for the model and optimizer that are there."""
        self.config = config
        self.ask("reconfigure", config)

    def export(self) -> list[bytes]:
        """Every rank's own optimizer state, in rank order, whatever the stage."""
        return self.ask("export")

    def phase_state(self) -> dict[str, AdapterState]:
        """As rank 0 holds it."""
        state: dict[str, AdapterState] = self.ask("phase_state")[0]
        return state

    def ask(self, method: str, *args: Any) -> list[Any]:
        """All ranks' answers."""
        return self._all(method, *args, limit=120.0)


def _policy(model_path: str, config: RunConfig) -> torch.nn.Module:
    return attach_lora(load_model(model_path, config.learner.dtype), policy_adapter(model_path), lora_spec(config))


@contextlib.contextmanager
def probed_groups(model_path: str) -> Iterator[dict[int, ProbedGroup]]:
    """Groups of one and of two ranks, by number of ranks, on a Ray that is there."""
    started: dict[int, ProbedGroup] = {}
    try:
        for ranks in (1, 2):
            started[ranks] = ProbedGroup(settings(learner__ranks=ranks), model_path)
        yield started
    finally:
        for group in started.values():
            group.close()
