"""One DeepSpeed rank of the learner group; ``learner.ranks.group`` runs it as a Ray actor.

``Rank`` is what all methods share: the model with its adapter, the group, exactly one optimizer step per update.
``learner.ranks.trajectories`` learns from groups of trajectories; ``learner.finetuning.rank`` from demonstrations.
"""

import functools
import itertools
import math
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
import ray
import torch
from peft import PeftModel
from safetensors.torch import save as save_safetensors

from learner.objectives.statistics import Statistics
from learner.ranks.build_ops import prepare_environment
from learner.ranks.optim import (
    FiniteAdamW,
    deepspeed_config,
    export_state,
    import_state,
    inner_optimizer,
    updates_applied,
)
from learner.ranks.rendezvous import meet, open_meeting_place
from learner.ranks.scored import ScoredView
from learner.settings.sections import (
    GroupSection,
    LoraSection,
    ModelSection,
    ResourcesSection,
    RunPlace,
    TimeoutsSection,
)
from rollout.adapters import AdapterState, PackedTensor, adapter_parameters, digest, load_state, pack
from rollout.gpu import GpuManners, told_when_full
from rollout.malloc import keep_freed_memory
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model, recompute_activations
from rollout.models.lora import LoraSpec, attach_lora
from rollout.seeds import derive_seed
from rollout.usage import process_usage

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")
_AnyRank = TypeVar("_AnyRank", bound="Rank")


@dataclass(frozen=True)
class UpdateReport:
    """What one rank did in one update."""

    statistics: Statistics
    """Figures of this rank's forwards; they add up over ranks."""
    plan_statistics: dict[str, float]
    """Figures of the whole update, the same on every rank."""
    loss: float
    """This rank's share of the loss."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping; nan or inf when it isn't finite."""
    applied: bool
    """False when the step was skipped because the gradient wasn't finite."""
    learning_rate: float
    forwards: int
    seconds: float
    credit: tuple[np.ndarray, ...] = ()
    """[group], what each completion was credited with, as ``Objective.credit`` gives it, the same on every rank; empty
    where nothing is."""
    scored: tuple[ScoredView, ...] = ()
    """What this rank scored of the groups that are kept for playback, in the order of the plan."""
    usage: dict[str, Any] = field(default_factory=dict)
    """What this rank's process uses, see ``rollout.usage``."""


@dataclass(frozen=True)
class PublishedAdapter:
    """The adapter as the learner's forward uses it."""

    state: AdapterState
    digest: str
    peft_config: dict[str, Any]


@dataclass(frozen=True)
class RankState:
    """What one rank gives of the group's state, see ``learner.ranks.group.GroupState``."""

    adapter: PublishedAdapter | None
    """From rank 0."""
    shard: bytes | None
    """None from a rank whose optimizer holds what rank 0's does."""
    phase: Mapping[str, AdapterState]


class GroupConfig(Protocol):
    """What a rank reads of a run's settings, whatever the run learns from."""

    @property
    def run(self) -> RunPlace: ...
    @property
    def model(self) -> ModelSection: ...
    @property
    def lora(self) -> LoraSection: ...
    @property
    def learner(self) -> GroupSection: ...
    @property
    def resources(self) -> ResourcesSection: ...
    @property
    def timeouts(self) -> TimeoutsSection: ...


class Plan(Protocol):
    """The work of one optimizer step, the same on every rank."""

    @property
    def forwards(self) -> Sequence[Sequence[Any]]:
        """[rank][forward]; every rank has the same number of forwards, at least one."""

    @property
    def normaliser(self) -> float:
        """What the summed loss of all ranks and forwards is divided by."""

    @property
    def statistics(self) -> dict[str, float]:
        """Figures of the whole update."""

    @property
    def credit(self) -> tuple[np.ndarray, ...]:
        """[group], what each completion is credited with, as ``Objective.credit`` gives it; empty where nothing is."""


def lora_spec(config: GroupConfig) -> LoraSpec:
    """The shape of this run's adapter, the same in learner and actors."""
    lora = config.lora
    targets = None if lora.target_modules is None else tuple(lora.target_modules)
    seed = derive_seed(config.run.seed, "lora")
    return LoraSpec(lora.r, lora.alpha, lora.include_head, init_seed=seed, target_modules=targets)


def rank_manners(config: GroupConfig) -> GpuManners:
    """Of each rank on its GPU, if it has one."""
    learner = config.learner
    return GpuManners(config.resources.of("rank")[1], learner.ranks > 1, learner.deterministic)


def tells_when_full(
    method: Callable[Concatenate[_AnyRank, _Asked], _Answer],
) -> Callable[Concatenate[_AnyRank, _Asked], _Answer]:
    """A rank's method that raises OutOfMemory, with what to change, where the GPU's memory doesn't suffice."""

    @functools.wraps(method)
    def told(rank: _AnyRank, /, *args: _Asked.args, **kwargs: _Asked.kwargs) -> _Answer:
        with told_when_full(f"learner rank {rank.rank}", rank._remedy):
            return method(rank, *args, **kwargs)

    return told


class LossPart(NamedTuple):
    """What one backward is called on."""

    loss: torch.Tensor
    """Its gradient is this part of the forward's loss, summed and not yet divided by the plan's normaliser."""
    value: torch.Tensor
    """[], no gradient: what it adds to the reported loss. Read after the backward, so that a GPU has work meanwhile."""
    statistics: Statistics


class Rank(ABC):
    """Loads the model, joins the group, and turns what it is given into optimizer steps.

    Args:
        config: the run's settings.
        model_path: folder or hub name of the base.
        rank, world: this rank's number and how many there are.
    """

    def __init__(self, config: GroupConfig, model_path: str, rank: int, world: int) -> None:
        self.config, self.model_path, self.rank, self.world = config, model_path, rank, world
        self._meeting_place: socket.socket | None = None
        self._manners = rank_manners(config)
        torch.set_num_threads(config.resources.threads_per_process)
        keep_freed_memory()

    def node_address(self) -> str:
        """Network address of the node that this rank runs on."""
        return ray.util.get_node_ip_address()

    def listen(self, host: str) -> str:
        """Open the port of ``host`` at which the ranks meet, and return host:port; asked of rank 0."""
        self._meeting_place = open_meeting_place(host, self.world, self.config.learner.meeting_port)
        return f"{host}:{self._meeting_place.getsockname()[1]}"

    @tells_when_full
    def start(self, address: str, adapter: AdapterState | None, shard: bytes | None) -> dict[str, Any]:
        """Load the weights, then join the group (DeepSpeed copies weights when it is initialised, not later).

        Args:
            address: where rank 0 listens (``listen``).
            adapter: weights to start from; None for a fresh adapter.
            shard: this rank's optimizer state from a checkpoint, or None.
        """
        device = self._device()
        self._manners.begin()
        prepare_environment(device.type)
        os.environ["DS_ACCELERATOR"] = device.type
        import deepspeed  # picks its accelerator from the environment when it is imported

        meet(
            address,
            self.rank,
            self.world,
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout_s=self.config.timeouts.update,
            meeting_place=self._meeting_place,
            interface=self.config.learner.network_interface,
        )
        learner = self.config.learner
        self.family = policy_adapter(self.model_path)
        model = self._policy(device)
        if learner.activation_checkpointing:
            recompute_activations(model)
        if adapter is not None:
            load_state(model, adapter)
        self.peft_config = model.peft_config["default"].to_dict()
        parameters = list(adapter_parameters(model).values())
        optimizer = FiniteAdamW(
            parameters, lr=learner.lr, betas=learner.betas, eps=learner.adam_eps, weight_decay=learner.weight_decay
        )
        settings = deepspeed_config(
            zero_stage=learner.zero_stage,
            dtype=learner.dtype,
            max_grad_norm=learner.max_grad_norm,
            trained=sum(parameter.numel() for parameter in parameters),
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.engine.train()
        if shard is not None:
            import_state(self.engine, shard)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "trained_parameters": trained,
            "usage": process_usage(),
        }

    def _policy(self, device: torch.device) -> PeftModel:
        """The base with a fresh adapter."""
        kind = self.config.model.quantization
        base = load_model(self.model_path, self.config.learner.dtype, quantization=kind, device=device)
        return attach_lora(base, self.family, lora_spec(self.config))

    @tells_when_full
    def update(self, refs: Sequence[Any], update_index: int, lr: float) -> UpdateReport:
        """One optimizer step.

        Args:
            refs: where what it learns from lies.
            update_index: number of this update, for the draws that it makes.
            lr: learning rate of this step.
        """
        started = time.perf_counter()
        plan, data = self._work(refs, update_index)
        for group in inner_optimizer(self.engine).param_groups:
            group["lr"] = lr
        before = updates_applied(self.engine)
        statistics, loss = self._accumulate(plan, data)
        local_norm = self._stage0_grad_norm()
        if local_norm is not None and not math.isfinite(local_norm):
            # Finite gradients whose norm overflows would be clipped to a step of zeros, and counted as applied.
            inner_optimizer(self.engine).refuse_step()
        self.engine.step()
        self._stepped()
        taken = updates_applied(self.engine) - before
        assert taken in (0, 1), f"rank {self.rank} took {taken} optimizer steps in one update"
        self._manners.rest()
        return UpdateReport(
            statistics=statistics,
            plan_statistics=plan.statistics,
            loss=loss,
            grad_norm=float(self.engine.get_global_grad_norm()) if local_norm is None else local_norm,
            applied=taken == 1,
            learning_rate=lr,
            forwards=len(plan.forwards[self.rank]),
            seconds=time.perf_counter() - started,
            credit=plan.credit,
            scored=self._scored(),
            usage=process_usage(),
        )

    def gradient(self, refs: Sequence[Any], update_index: int) -> dict[str, PackedTensor]:
        """The whole gradient of this update, without taking the step (for parity checks)."""
        from deepspeed.utils import safe_get_full_grad

        self._accumulate(*self._work(refs, update_index))
        read = safe_get_full_grad if self.config.learner.zero_stage > 0 else _plain_grad
        packed = pack({name: read(p) for name, p in adapter_parameters(self.engine.module).items()})
        self.engine.optimizer.zero_grad()
        return packed

    def publish(self) -> PublishedAdapter | None:
        """The adapter, from rank 0; the others take part where weights are partitioned, and return None."""
        with self._whole_weights():
            state = pack(adapter_parameters(self.engine.module)) if self.rank == 0 else None
        return None if state is None else PublishedAdapter(state, digest(state), self.peft_config)

    def export(self) -> bytes:
        """This rank's optimizer state as safetensors."""
        return save_safetensors(export_state(self.engine))

    def commit(self) -> RankState:
        """What the group needs of this rank to go on from here, in other processes too."""
        adapter = self.publish()
        # At stage 0 each rank holds all of the optimizer's state, and takes the same steps.
        own = self.rank == 0 or self.config.learner.zero_stage > 0
        return RankState(adapter, self.export() if own else None, self.phase_state() if self.rank == 0 else {})

    def ping(self) -> None:
        """Answers, in a thread of its own (``rollout.pulse``)."""
        return

    def phase_state(self) -> dict[str, AdapterState]:
        """Weights beside the trained ones, of a method that learns in phases."""
        return {}

    def _device(self) -> torch.device:
        wanted = self.config.learner.device
        use_gpu = wanted == "cuda" or (wanted == "auto" and self.config.resources.gpus_per_rank > 0)
        return torch.device("cuda" if use_gpu else "cpu")

    @abstractmethod
    def _remedy(self) -> str:
        """What to change first when the GPU's memory didn't suffice."""

    @abstractmethod
    def _work(self, refs: Sequence[Any], update_index: int) -> tuple[Plan, Any]:
        """The update's plan, and the data that its forwards speak of."""

    @abstractmethod
    def _losses(self, forward: Any, data: Any) -> Iterator[LossPart]:
        """The loss of one forward, in as many parts as ``_backwards`` says; each is taken back before the next."""

    def _backwards(self, forward: Any) -> int:
        return 1

    def _stepped(self) -> None:
        """An optimizer step was taken, or refused."""
        return

    def _scored(self) -> tuple[ScoredView, ...]:
        """What the forwards since the newest ``_work`` scored of trajectories that are kept for playback."""
        return ()

    def _accumulate(self, plan: Plan, data: Any) -> tuple[Statistics, float]:
        """All of this rank's forwards and backwards; the last backward reduces over ranks."""
        forwards = plan.forwards[self.rank]
        left = sum(map(self._backwards, forwards))
        parts, total = [], 0.0
        for part in itertools.chain.from_iterable(self._losses(forward, data) for forward in forwards):
            left -= 1
            # DeepSpeed averages over ranks; ours is a sum over ranks with one divisor for the whole update.
            self.engine.set_gradient_accumulation_boundary(left == 0)
            self.engine.backward(part.loss * (self.world / plan.normaliser), scale_wrt_gas=False)
            total += float(part.value) / plan.normaliser
            parts.append(part.statistics)
        assert left == 0, f"rank {self.rank} was {left} backwards short of its plan"
        return Statistics.merged(parts), total

    def _stage0_grad_norm(self) -> float | None:
        """L2 norm of the reduced gradient where DeepSpeed computes none that can be read; None where it does."""
        if self.config.learner.zero_stage > 0:
            return None
        norms = [p.grad.norm() for p in adapter_parameters(self.engine.module).values() if p.grad is not None]
        return float(torch.stack(norms).norm())

    def _whole_weights(self) -> Any:
        if self.config.learner.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(adapter_parameters(self.engine.module).values()))


def _plain_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "no backward reached this parameter"
    return parameter.grad
