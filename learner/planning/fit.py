"""Whether a run fits its hardware, the largest forwards that would, and what to change first when it doesn't."""

from dataclasses import dataclass

from learner.planning.changes import Change, changes_of
from learner.planning.compute import Duration, Work, duration, too_slow, work_of
from learner.planning.hardware import CPU_FLOPS_PER_THREAD, GPUS, Hardware
from learner.planning.memory import ProcessMemory
from learner.planning.needs import Budget, Needs
from learner.planning.shapes import ModelShape
from learner.settings.run import RunConfig
from rewards.errors import ConfigError

DEFAULT_GPU = "A100"
"""Whose speed stands in where the GPU's model isn't known."""


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
    cpu_bytes: int
    """Of it the processes' that work on CPUs."""
    mapped_bytes: int
    """Of it the checkpoint's file, once for all processes of a node."""
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
    plans = Needs(config, model, hardware, prompt)
    rank, actor = plans.rank(), plans.actor()
    rank_budget, actor_budget = plans.budgets()
    work = work_of(config, model, prompt=prompt)
    peak, speed = _peak(config, hardware, tflops)
    speeds = _speeds(config, peak)
    time = duration(config, work, **speeds, utilisation=utilisation)
    problems = tuple(plans.problems())
    checkpointing = config.learner.activation_checkpointing
    other = plans.rank(checkpointing=not checkpointing)
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
        cpu_bytes=plans.node_total(),
        mapped_bytes=plans.mapped(),
        work=work,
        time=time,
        speed=f"{speed} at {utilisation:.0%} utilisation",
        problems=problems,
        too_slow=tuple(too_slow(config, work, **speeds, speed=f"all of {speed}")),
        changes=tuple(changes_of(plans)) if problems else (),
        assumptions=_assumptions(plans, prompt, prompt_source),
    )


def _speeds(config: RunConfig, peak: float) -> dict[str, float]:
    """Of a device's speed what an actor and a rank have, FLOP/s. In a synchronous run those of one GPU take turns."""
    actor, rank = config.resources.gpus_per_actor, config.resources.gpus_per_rank
    if actor and rank and config.rollout.max_staleness == 0:
        actor = rank = actor + rank
    return {"flops_per_actor": peak * (min(1.0, actor) or 1.0), "flops_per_rank": peak * (min(1.0, rank) or 1.0)}


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


def _assumptions(needs: Needs, prompt: int, prompt_source: str) -> tuple[str, ...]:
    config = needs.config
    said = [
        f"prompts of {prompt} tokens ({prompt_source}); completions of "
        f"{config.rollout.sampler.completion_length}, none of which ends early; every group has a signal",
    ]
    if "cuda" in (needs.rank_device, needs.actor_device):
        said += [
            "plain attention (learner.deterministic), whose [L, L] scores are kept"
            if config.learner.deterministic
            else "fused attention (FlashAttention or torch's): no [L, L] scores are kept",
            "0.75 GiB per process for CUDA and its libraries, 0.5 GiB per rank for NCCL, 5 % of what is allocated and "
            "freed lost to fragmentation; none of the three was measured",
        ]
    said.append("no evaluation, grading, publishing or start-up in the times; evaluation's memory is in the actor's")
    if needs.model.kind == "experts":
        said.append("adapters on the attention maps only; the router spreads tokens evenly over the experts")
    return tuple(said)
