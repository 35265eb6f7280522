"""Whether a run fits its hardware, the largest forwards that would, and what to change first when it doesn't."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from learner.planning.compute import Duration, Work, duration, too_slow, work_of
from learner.planning.hardware import CPU_FLOPS_PER_THREAD, GPUS, Hardware
from learner.planning.memory import GIB, Device, ProcessMemory, actor_memory, rank_memory
from learner.planning.scored import completions_learned
from learner.planning.shapes import ModelShape
from learner.settings.run import RunConfig, required_resources
from rewards.errors import ConfigError
from rewards.task import BUILT_IN, get_task

DEFAULT_GPU = "A100"
"""Whose speed stands in where the GPU's model isn't known."""


@dataclass(frozen=True)
class Budget:
    """What a process may use."""

    bytes: int | None
    says: str


@dataclass(frozen=True)
class Change:
    """A setting that would help, and what the process would then need."""

    settings: tuple[str, ...]
    process: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class RunPlan:
    """Everything that ``learner.plan`` prints."""

    config: RunConfig
    model: ModelShape
    hardware: Hardware
    prompt: int
    rank: ProcessMemory
    rank_other: ProcessMemory
    """The same rank with activation checkpointing the other way round."""
    actor: ProcessMemory
    rank_budget: Budget
    actor_budget: Budget
    largest_views: int | None
    """views_per_forward that fits; None where there is no budget, 0 when not even 1 does."""
    largest_rows: int | None
    sandboxed_bytes: int
    """Most that programs can hold which completions of a code task make graders run, all at once. Part of the next, but
    no run is refused for it: ordinary programs need a hundredth."""
    node_bytes: int
    """Memory of the nodes: all processes on a CPU; beside GPUs what stays in the nodes' own memory."""
    work: Work
    time: Duration
    speed: str
    """Which peak the times assume."""
    problems: tuple[str, ...]
    """What doesn't fit, one sentence each."""
    too_slow: tuple[str, ...]
    """What can't be done within its time limit, one sentence each, the remedy included."""
    changes: tuple[Change, ...]
    """The smallest set that makes everything fit, in the order in which to make them."""
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems and not self.too_slow


def plan_run(
    config: RunConfig,
    model: ModelShape,
    hardware: Hardware,
    *,
    prompt: int,
    prompt_source: str,
    utilisation: float = 0.4,
    tflops: float | None = None,
) -> RunPlan:
    """Plan a run. ``prompt``: tokens of the longest prompt. ``tflops``: peak of one device, instead of the table's.

    Raises:
        ConfigError: when utilisation is no share.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation:g} is not a share above 0 and up to 1")
    plans = _Needs(config, model, hardware, prompt)
    rank, actor = plans.rank(), plans.actor()
    rank_budget, actor_budget = plans.budgets()
    work = work_of(config, model, prompt=prompt)
    peak, speed = _peak(config, hardware, tflops)
    speeds = _speeds(config, peak)
    time = duration(config, work, **speeds, utilisation=utilisation)
    problems = tuple(plans.problems())
    checkpointing = config.learner.activation_checkpointing
    other = rank_memory(config, model, device=plans.rank_device, prompt=prompt, checkpointing=not checkpointing)
    return RunPlan(
        config=config,
        model=model,
        hardware=hardware,
        prompt=prompt,
        rank=rank,
        rank_other=other,
        actor=actor,
        rank_budget=rank_budget,
        actor_budget=actor_budget,
        largest_views=plans.largest_views(),
        largest_rows=plans.largest_rows(),
        sandboxed_bytes=plans.sandboxed_bytes(),
        node_bytes=plans.node_bytes(work),
        work=work,
        time=time,
        speed=f"{speed} at {utilisation:.0%} utilisation",
        problems=problems,
        too_slow=tuple(too_slow(config, work, **speeds, speed=f"all of {speed}")),
        changes=tuple(_changes(plans)) if problems else (),
        assumptions=_assumptions(plans, prompt, prompt_source),
    )


def _speeds(config: RunConfig, peak: float) -> dict[str, float]:
    """Of a device's speed what an actor and a rank have, FLOP/s. In a synchronous run those of one GPU take turns."""
    actor, rank = config.resources.gpus_per_actor, config.resources.gpus_per_rank
    if actor and rank and config.rollout.max_staleness == 0:
        actor = rank = actor + rank
    return {"flops_per_actor": peak * (min(1.0, actor) or 1.0), "flops_per_rank": peak * (min(1.0, rank) or 1.0)}


class _Needs:
    """What the processes of one configuration need on one hardware."""

    def __init__(self, config: RunConfig, model: ModelShape, hardware: Hardware, prompt: int) -> None:
        self.config, self.model, self.hardware, self.prompt = config, model, hardware, prompt
        resources = config.resources
        self.rank_device: Device = "cuda" if resources.gpus_per_rank > 0 else "cpu"
        self.actor_device: Device = "cuda" if resources.gpus_per_actor > 0 else "cpu"

    def rank(self, views: int | None = None) -> ProcessMemory:
        return rank_memory(self.config, self.model, device=self.rank_device, prompt=self.prompt, views=views)

    def actor(self, rows: int | None = None) -> ProcessMemory:
        return actor_memory(self.config, self.model, device=self.actor_device, prompt=self.prompt, rows=rows)

    def with_config(self, changes: dict[str, Any]) -> "_Needs | None":
        """The same with other settings; None where they contradict the rest."""
        data = self.config.model_dump(mode="python")
        for key, value in changes.items():
            *path, last = key.split(".")
            section = data
            for name in path:
                section = section[name]
            section[last] = value
        try:
            return _Needs(RunConfig.model_validate(data), self.model, self.hardware, self.prompt)
        except (ConfigError, ValueError):
            return None

    def budgets(self) -> tuple[Budget, Budget]:
        """Of a rank and of an actor."""
        config, memory = self.config, self.hardware.memory
        found = []
        of_actor = config.rollout.vllm.memory_share if config.rollout.engine == "vllm" else 1.0
        for device, gpus, part in (
            (self.rank_device, config.resources.gpus_per_rank, 1.0),
            (self.actor_device, config.resources.gpus_per_actor, of_actor),
        ):
            if memory is None or (device == "cuda") != (self.hardware.device == "cuda"):
                found.append(Budget(None, "memory unknown"))
            elif device == "cuda":
                share = min(1.0, gpus) * part
                says = f"{share:g} of a GPU's {memory / GIB:.1f} GiB" if share < 1 else "one GPU"
                found.append(Budget(int(memory * share), says))
            else:
                mine = "rank" if not found else "actor"
                others = self.node_total() - self._all(mine)
                count = config.learner.ranks if mine == "rank" else config.rollout.wanted_actors
                found.append(Budget((memory - others) // count, "this machine's memory less what the others need"))
        return found[0], found[1]

    def problems(self) -> Iterator[str]:
        """What doesn't fit."""
        hardware, config = self.hardware, self.config
        _, gpus = required_resources(config)
        if hardware.device == "cuda" and hardware.gpus and gpus > hardware.gpus:
            yield (
                f"{config.learner.ranks} ranks and {config.rollout.wanted_actors} actors ask for {gpus:g} GPUs, and "
                f"there are {hardware.gpus}"
            )
        if hardware.device == "cpu":
            total = self.node_total()
            if hardware.memory is not None and total > hardware.memory:
                yield f"all processes together need {gib(total)}, and there are {gib(hardware.memory)}"
            return
        for process, budget in zip((self.rank(), self.actor()), self.budgets(), strict=True):
            if budget.bytes is not None and process.peak > budget.bytes:
                yield f"a {process.name} needs {gib(process.peak)} and has {gib(budget.bytes)} ({budget.says})"

    def excess(self) -> int:
        """Bytes beyond the budgets, of all kinds of process together."""
        if self.hardware.device == "cpu":
            return max(0, self.node_total() - (self.hardware.memory or self.node_total()))
        pairs = zip((self.rank(), self.actor()), self.budgets(), strict=True)
        return sum(max(0, process.peak - budget.bytes) for process, budget in pairs if budget.bytes is not None)

    def node_total(self) -> int:
        """Of all processes that work on CPUs."""
        return self._all("rank") + self._all("actor")

    def node_bytes(self, work: Work) -> int:
        config = self.config
        beside = config.learner.ranks * self.rank().host_bytes + config.rollout.wanted_actors * self.actor().host_bytes
        return self.node_total() + beside + work.buffered + self.sandboxed_bytes()

    def sandboxed_bytes(self) -> int:
        """0 for a user's own task: it isn't imported here."""
        name, rollout = self.config.task.name, self.config.rollout
        each = get_task(name).memory_limit_mb << 20 if name in BUILT_IN else 0
        return rollout.wanted_actors * rollout.graders_per_actor * each

    def largest_views(self) -> int | None:
        bytes_ = self.budgets()[0].bytes
        upper = completions_learned(self.config) * self.config.objective.cost(self.config.rollout.sampler.spec()).views
        return None if bytes_ is None else _largest(lambda n: self.rank(n).peak <= bytes_, upper)

    def largest_rows(self) -> int | None:
        bytes_ = self.budgets()[1].bytes
        upper = self.config.rollout.groups_per_lease * self.config.rollout.group_size
        return None if bytes_ is None else _largest(lambda n: self.actor(n).peak <= bytes_, upper)

    def _all(self, kind: str) -> int:
        if kind == "rank":
            return self.config.learner.ranks * self.rank().peak if self.rank_device == "cpu" else 0
        return self.config.rollout.wanted_actors * self.actor().peak if self.actor_device == "cpu" else 0


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"


def _changes(needs: _Needs) -> Iterator[Change]:
    """The smallest set of changes that makes everything fit; among sets of one size the one whose changes come first in
    the order in which one would try them, those that change no number of the training first. Where no set is enough,
    every change that helps, and then more hardware."""
    for size in range(1, len(_TRIED) + 1):
        for makes in itertools.combinations(_TRIED, size):
            steps = list(_applied(needs, makes))
            if steps and len(steps) == size and not any(steps[-1][1].problems()):
                yield from _told(needs, steps)
                return
    helping = list(_applied(needs, _TRIED))
    yield from _told(needs, helping)
    yield from _more_hardware(helping[-1][1] if helping else needs)


def _applied(needs: _Needs, makes: tuple["_Make", ...]) -> Iterator[tuple[dict[str, Any], _Needs]]:
    """These changes on top of each other, without those that don't help. The sizes of forwards come last: how small
    they must be depends on the others."""
    for make in sorted(makes, key=lambda make: make in (_views, _rows)):
        changes = make(needs)
        changed = needs.with_config(changes) if changes else None
        if changed is not None and changed.excess() < needs.excess():
            yield changes, changed
            needs = changed


def _told(needs: _Needs, steps: list[tuple[dict[str, Any], _Needs]]) -> Iterator[Change]:
    for changes, changed in steps:
        ranks = changed.rank().peak != needs.rank().peak
        process = changed.rank() if ranks else changed.actor()
        settings = tuple(f"{key}={str(value).lower()}" for key, value in changes.items())
        yield Change(settings, process.name, process.peak, not any(changed.problems()))
        needs = changed


def _checkpointing(needs: _Needs) -> dict[str, Any]:
    return {} if needs.config.learner.activation_checkpointing else {"learner.activation_checkpointing": True}


def _views(needs: _Needs) -> dict[str, Any]:
    largest, now = needs.largest_views(), needs.config.learner.views_per_forward
    return {"learner.views_per_forward": max(1, largest)} if largest is not None and largest < now else {}


def _rows(needs: _Needs) -> dict[str, Any]:
    largest, now = needs.largest_rows(), needs.config.rollout.max_rows
    return {"rollout.max_rows": max(1, largest)} if largest is not None and largest < now else {}


def _zero(needs: _Needs) -> dict[str, Any]:
    """The lowest stage that is enough, or the highest."""
    learner = needs.config.learner
    if learner.ranks == 1 or learner.zero_stage == 3 or needs.config.model.quantization:
        return {}
    for stage in range(learner.zero_stage + 1, 4):
        changed = needs.with_config({"learner.zero_stage": stage})
        if changed is not None and changed.excess() == 0:
            return {"learner.zero_stage": stage}
    return {"learner.zero_stage": 3}


def _bfloat16(needs: _Needs) -> dict[str, Any]:
    if needs.config.learner.dtype == "bfloat16":
        return {}
    stage = max(1, needs.config.learner.zero_stage)
    return {"learner.dtype": "bfloat16", "learner.zero_stage": stage}


def _quantized(needs: _Needs) -> dict[str, Any]:
    if needs.config.model.quantization is not None:
        return {}
    return {"model.quantization": "nf4"} | ({"learner.zero_stage": 2} if needs.config.learner.zero_stage == 3 else {})


_Make = Callable[[_Needs], dict[str, Any]]
_TRIED: tuple[_Make, ...] = (_checkpointing, _views, _rows, _zero, _bfloat16, _quantized)


def _more_hardware(needs: _Needs) -> Iterator[Change]:
    """A whole GPU for every process; then larger ones, or more."""
    resources = needs.config.resources
    shared = [key for key in ("gpus_per_rank", "gpus_per_actor") if 0 < getattr(resources, key) < 1]
    if shared and (whole := needs.with_config({f"resources.{key}": 1.0 for key in shared})) is not None:
        largest = max(whole.rank(), whole.actor(), key=lambda process: process.peak)
        _, gpus = required_resources(whole.config)
        if not whole.excess():
            settings = tuple(f"resources.{key}=1" for key in shared)
            fits = not any(whole.problems())
            yield Change(settings if fits else (*settings, f"on {gpus:g} GPUs"), largest.name, largest.peak, True)
            return
    largest = max(needs.rank(), needs.actor(), key=lambda process: process.peak)
    _, gpus = required_resources(needs.config)
    if needs.hardware.device == "cpu":
        total = needs.node_total()
        yield Change((f"a machine with {gib(total)}, or fewer actors and ranks",), "all processes", total, True)
    elif needs.excess():
        yield Change((f"GPUs whose share for it is {gib(largest.peak)}",), largest.name, largest.peak, True)
    elif needs.hardware.gpus and gpus > needs.hardware.gpus:
        text = f"{gpus:g} GPUs, or fewer ranks and actors, or smaller resources.gpus_per_*"
        yield Change((text,), largest.name, largest.peak, True)


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest n from 0 to ``upper`` that fits; needs grow with n."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _peak(config: RunConfig, hardware: Hardware, tflops: float | None) -> tuple[float, str]:
    """Operations per second of one device, and what that is."""
    if tflops is not None:
        return tflops * 1e12, f"{tflops:g} TFLOP/s a device (given)"
    if hardware.device == "cpu":
        threads = config.resources.threads_per_process
        peak = CPU_FLOPS_PER_THREAD * threads
        return peak, f"{peak / 1e12:g} TFLOP/s a process ({threads} CPU threads; assumed, --tflops says better)"
    name = hardware.gpu or DEFAULT_GPU
    gpu = GPUS[name]
    rate = gpu.bf16_tflops if config.learner.dtype == "bfloat16" else gpu.fp32_tflops
    assumed = "" if hardware.gpu else "; GPU not named, so this one's speed is assumed"
    return rate * 1e12, f"{rate:g} TFLOP/s a GPU ({name}, {config.learner.dtype}{assumed})"


def _assumptions(needs: _Needs, prompt: int, prompt_source: str) -> tuple[str, ...]:
    config = needs.config
    said = [
        f"prompts of {prompt} tokens ({prompt_source}); completions of "
        f"{config.rollout.sampler.completion_length}, none of which ends early; every group has a signal",
    ]
    if "cuda" in (needs.rank_device, needs.actor_device):
        said += [
            "fused attention (FlashAttention or torch's): no [L, L] scores are kept",
            "0.75 GiB per process for CUDA and its libraries, 0.5 GiB per rank for NCCL, 5 % of what is allocated and "
            "freed lost to fragmentation; none of the three was measured",
        ]
    said.append("no evaluation, grading, publishing or start-up in the times; evaluation's memory is in the actor's")
    if needs.model.kind == "experts":
        said.append("adapters on the attention maps only; the router spreads tokens evenly over the experts")
    return tuple(said)
