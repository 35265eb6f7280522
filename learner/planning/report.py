"""A plan as text for people and as JSON for programs."""

import dataclasses
import json
from typing import Any

from learner.planning.fit import RunPlan
from learner.planning.memory import Item, ProcessMemory
from learner.planning.needs import Budget, gib

_NAME, _SIZE = 34, 12


def render(plan: RunPlan) -> str:
    """The whole plan, its verdict first."""
    return "\n".join([*_verdict(plan), "", *_head(plan), "", *_memory(plan), "", *_work(plan), "", *_assumed(plan)])


def render_refusal(plan: RunPlan) -> str:
    """What ``learner.main`` says when a run can't fit: the memory table, what is wrong, and what to change."""
    return "\n".join(
        [
            "this run does not fit",
            "",
            *_memory(plan),
            "",
            *_verdict(plan),
            "",
            "python -m learner.plan with the same arguments prints the whole plan; resources.check_memory=false starts "
            "the run all the same",
        ]
    )


def as_json(plan: RunPlan) -> str:
    """The same, all amounts in bytes, operations and seconds."""
    shape = dataclasses.asdict(plan.model)
    model = {key: shape[key] for key in ("family", "layers", "width", "heads", "kv_heads", "mlp", "vocabulary", "tied")}
    work = dataclasses.asdict(plan.work)
    data = {
        "fits": plan.fits,
        "problems": plan.problems,
        "too_slow": plan.too_slow,
        "changes": [dataclasses.asdict(change) for change in plan.changes],
        "hardware": dataclasses.asdict(plan.hardware),
        "model": {**model, "parameters": plan.model.parameters, "prompt_tokens": plan.prompt},
        "memory": {
            "rank": _process_json(plan.rank, plan.rank_budget),
            "rank_with_checkpointing_the_other_way": _process_json(plan.rank_other, plan.rank_budget),
            "actor": _process_json(plan.actor, plan.actor_budget),
            "nodes": plan.node_bytes,
            "sandboxed": plan.sandboxed_bytes,
        },
        "largest": {"learner.views_per_forward": plan.largest_views, "rollout.max_rows": plan.largest_rows},
        "work": work,
        "seconds": dataclasses.asdict(plan.time) | {"assumes": plan.speed},
        "assumptions": plan.assumptions,
    }
    return json.dumps(data, indent=2) + "\n"


def _process_json(process: ProcessMemory, budget: Budget) -> dict[str, Any]:
    return dataclasses.asdict(process) | {"peak": process.peak, "budget": budget.bytes}


def _head(plan: RunPlan) -> list[str]:
    config, model, hardware = plan.config, plan.model, plan.hardware
    memory = "memory unknown" if hardware.memory is None else gib(hardware.memory)
    there = f"{hardware.gpus} GPUs, {memory} each" if hardware.device == "cuda" else memory
    experts = f", {model.active_experts} of {model.experts} experts a token" if model.experts else ""
    parameters = f"{model.parameters / 1e6:,.1f} M parameters"
    return [
        f"model     {config.model.path or 'the small base'}: {model.family}, {parameters}, {model.layers} layers, "
        f"width {model.width}, vocabulary {model.vocabulary:,}{experts}",
        f"hardware  {there} ({hardware.source})",
        f"run       {config.learner.ranks} learner ranks (ZeRO-{config.learner.zero_stage}, {config.learner.dtype}), "
        f"{config.rollout.wanted_actors} actors; {plan.work.completions} completions an iteration "
        f"({plan.work.completions // config.rollout.group_size} prompts x {config.rollout.group_size}), "
        f"{config.objective.type} with {config.objective.cost(config.rollout.sampler.spec()).views} views of each"
        + (f" of {plan.work.learned}" if plan.work.learned != plan.work.completions else ""),
    ]


def _memory(plan: RunPlan) -> list[str]:
    config = plan.config
    learner = config.learner
    told = "with" if learner.activation_checkpointing else "without"
    views = f"views_per_forward {learner.views_per_forward}, {told} activation checkpointing"
    if config.resources.one_process:
        views += f", max_rows {config.rollout.max_rows}"
    lines = _process(plan.rank, plan.rank_budget, views)
    other = "without" if learner.activation_checkpointing else "with"
    lines += [_row(f"  {other} checkpointing: peak", plan.rank_other.peak, _activations(plan.rank_other))]
    if not config.resources.one_process:
        engine = "" if config.rollout.engine == "torch" else f"{config.rollout.engine}, "
        lines += ["", *_process(plan.actor, plan.actor_budget, f"{engine}max_rows {config.rollout.max_rows}")]
    lines.append("")
    if plan.rank.device == plan.actor.device == "cpu":
        many = f"{learner.ranks} ranks and {config.rollout.wanted_actors} actors"
        lines.append(_row("all processes", plan.cpu_bytes, many))
    else:
        lines.append(
            _row("memory of the nodes", plan.node_bytes, "all processes' own, the checkpoint's file, the object store")
        )
        for item in plan.rank.host or plan.actor.host:
            lines.append(_row(f"  each process: {item.name}", item.bytes, item.note))
    if plan.mapped_bytes:
        lines.append(
            _row("  the checkpoint's file", plan.mapped_bytes, "once a node: its processes map the same pages")
        )
    lines.append(_row("  object store: a full buffer", plan.work.buffered, f"{plan.work.held} groups"))
    lines.append(_row("  arrays of one learner forward", plan.work.batch_arrays))
    if plan.sandboxed_bytes:
        graders = f"{config.rollout.wanted_actors} actors x {config.rollout.graders_per_actor} graders"
        lines.append(_row("  programs in the sandbox, at most", plan.sandboxed_bytes, f"{graders}; rarely a hundredth"))
    if plan.largest_views is not None:
        lines.append(f"largest learner.views_per_forward that fits: {plan.largest_views or 'none'}")
    if plan.largest_rows is not None:
        lines.append(f"largest rollout.max_rows that fits: {plan.largest_rows or 'none'}")
    return lines


def _process(process: ProcessMemory, budget: Budget, says: str) -> list[str]:
    lines = [f"{process.name} ({says})"]
    lines += [_item(item) for item in (*process.resident, *process.kept)]
    largest = process.largest_moment
    lines.append(_item(largest))
    lines += [
        f"    (not at the same time: {item.name} {gib(item.bytes)})"
        for item in (*process.moments, *process.after)
        if item is not largest and item.bytes > 0.01 * process.peak
    ]
    if process.allocator:
        lines.append(_row("  allocator's fragmentation", process.allocator, "assumed"))
    limit = "" if budget.bytes is None else f"of {gib(budget.bytes)} ({budget.says})"
    return [*lines, _row("  peak", process.peak, limit)]


def _activations(process: ProcessMemory) -> str:
    kept = sum(item.bytes for item in process.kept if item.name == "activations")
    return f"activations {gib(kept)}, {process.largest_moment.name} {gib(process.largest_moment.bytes)}"


def _item(item: Item) -> str:
    return _row(f"  {item.name}", item.bytes, item.note)


def _row(name: str, size: int, note: str = "") -> str:
    return f"{name:<{_NAME}}{_amount(size):>{_SIZE}}   {note}".rstrip()


def _amount(size: int) -> str:
    return gib(size) if size >= 10 << 20 else f"{size / 1e6:.2f} MB"


def _work(plan: RunPlan) -> list[str]:
    work, time = plan.work, plan.time
    learner = work.learner
    reference = f", reference {_flops(work.reference.forward)}" if work.reference.forward else ""
    adapter, by_all = f"{work.published / 1e6:,.1f} MB", f"{work.published_by_all / 1e6:,.1f} MB"
    order = "one after the other" if plan.config.rollout.max_staleness == 0 else "at the same time"
    return [
        "one iteration, at most",
        f"  rollout   {work.engine_forwards:,} forwards on the busiest actor; {_flops(work.engine.total)} in all",
        f"  learner   {work.views:,} views, {work.learner_forwards:,} forwards a rank; "
        f"forward {_flops(learner.forward)}, backward {_flops(learner.backward)}, "
        f"recomputed {_flops(learner.recompute)}{reference}",
        f"  moves     {adapter} of adapter to each actor ({by_all} in all), "
        f"{work.trajectories / 1e6:,.1f} MB of trajectories",
        f"  time      {_seconds(time.iteration)}: rollout {_seconds(time.rollout)}, learning {_seconds(time.learn)}, "
        f"{order}",
        f"the run's {plan.config.run.iterations} iterations: {_seconds(time.run)}, at {plan.speed}",
    ]


def _verdict(plan: RunPlan) -> list[str]:
    if plan.fits:
        unknown = plan.rank_budget.bytes is None and plan.actor_budget.bytes is None
        return ["whether it fits is unknown: how much memory there is isn't" if unknown else "it fits"]
    lines = [f"TAKES TOO LONG: {sentence}" for sentence in plan.too_slow]
    lines += [f"DOES NOT FIT: {problem}" for problem in plan.problems]
    if plan.problems and not plan.changes:
        return [*lines, "no setting that this plan knows of would help"]
    for number, change in enumerate(plan.changes):
        then = "then everything fits" if change.fits else "not enough by itself"
        word = "change first" if not number else "and then"
        lines.append(f"{word}: {' '.join(change.settings)}   ({change.process}: {gib(change.peak)}; {then})")
    return lines


def _assumed(plan: RunPlan) -> list[str]:
    return ["assumed", *(f"  - {line}" for line in plan.assumptions)]


def _flops(operations: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if operations >= size:
            return f"{operations / size:,.1f} {unit}"
    return f"{operations / 1e6:,.1f} MFLOP"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
