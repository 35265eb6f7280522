"""Work of an iteration: forwards, operations, bytes that move, and the time they take at a stated utilisation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from learner.planning.flops import Flops, forward_flops, training_flops
from learner.planning.memory import adapter_bytes, scored_rows, trajectory_bytes
from learner.planning.scored import completions_learned
from learner.planning.shapes import ModelShape
from learner.settings.run import RunConfig
from rollout.trajectory import GreedyBranches


@dataclass(frozen=True)
class Work:
    """Of one iteration, at most: no completion ends early, every group has a signal, no drawn step repeats."""

    completions: int
    """Drawn; a mean over a phase, where the method learns in phases."""
    learned: int
    """Completions that an update learns from."""
    held: int
    """Groups in a full buffer."""
    engine_forwards: int
    """Of the actor with the most leases."""
    engine: Flops
    """Of all actors."""
    views: int
    """Of all updates of the iteration."""
    learner_forwards: int
    """Per rank, all updates."""
    learner: Flops
    """Of all ranks, all updates."""
    reference: Flops
    """Forwards without gradient, of the reference, the old policy and a teacher; not in ``learner``."""
    published: int
    """Bytes that one actor pulls."""
    published_by_all: int
    """Bytes that leave the object store: one pull per actor."""
    trajectories: int
    """Bytes of the iteration's groups in the object store."""
    buffered: int
    """Bytes of a full buffer."""
    engine_share: float
    """Work of the busiest actor, as a share of all."""
    batch_arrays: int
    """Host bytes of one forward's arrays."""


@dataclass(frozen=True)
class Duration:
    """Seconds at the stated utilisation; grading, evaluation, publishing and start-up are left out."""

    rollout: float
    learn: float
    iteration: float
    run: float


def too_slow(
    config: RunConfig, work: Work, *, flops_per_actor: float, flops_per_rank: float, speed: str
) -> Iterator[str]:
    """What can't be done within its time limit even at the devices' full speed, a sentence each."""
    rollout, limits, learner = config.rollout, config.timeouts, config.learner
    share = rollout.groups_per_lease / rollout.prompts_per_iteration
    lease = work.engine.total * share / flops_per_actor
    if lease > limits.lease:
        yield (
            f"a lease of {rollout.groups_per_lease} groups takes {lease:,.0f} s at the least, at {speed}, and "
            f"timeouts.lease is {limits.lease:g}; lower rollout.groups_per_lease={rollout.groups_per_lease}, "
            f"rollout.group_size={rollout.group_size} or the lengths in rollout.sampler, or raise timeouts.lease"
        )
    update = work.learner.total / learner.updates_per_batch / learner.ranks / flops_per_rank
    if update > limits.update:
        yield (
            f"an update takes {update:,.0f} s at the least, at {speed}, and timeouts.update is {limits.update:g}; "
            f"lower rollout.prompts_per_iteration={rollout.prompts_per_iteration} or "
            f"rollout.group_size={rollout.group_size}, take more learner.ranks, or raise timeouts.update"
        )


def work_of(config: RunConfig, model: ModelShape, *, prompt: int) -> Work:
    """Count one iteration's work. ``prompt``: tokens of a prompt."""
    rollout, sampler, learner = config.rollout, config.rollout.sampler, config.learner
    steps = sampler.spec().most_steps
    C, length, r = sampler.completion_length, prompt + sampler.completion_length, config.lora.r
    phases = config.objective.phases()
    drawn = rollout.prompts_per_iteration if phases is None else math.ceil(phases.drawn(rollout.prompts_per_iteration))
    held = rollout.buffer_size if phases is None else phases.prompts + rollout.buffer_size
    completions = drawn * rollout.group_size
    head = completions * (C * candidates_per_token(config) + branched_positions(config))
    one_forward = forward_flops(model, lora_r=r, rows=completions, length=length, head_rows=head / steps)
    leases = math.ceil(drawn / rollout.groups_per_lease)
    rounds = math.ceil(leases / rollout.wanted_actors)
    rows_of_lease = rollout.groups_per_lease * rollout.group_size
    busiest = min(completions, rounds * rows_of_lease)
    cost = config.objective.cost(sampler.spec())
    learned = completions_learned(config)
    views = learned * cost.views * learner.updates_per_batch
    rows, candidates = scored_rows(config, views)
    training = training_flops(
        model,
        lora_r=r,
        rows=views,
        length=length,
        head_rows=max(rows, candidates),
        checkpointing=learner.activation_checkpointing,
    )
    plain = forward_flops(model, lora_r=0, rows=views, length=length, head_rows=max(rows, candidates))
    later_updates = (learner.updates_per_batch - 1) / learner.updates_per_batch
    without_gradient = float(cost.reference) + float(cost.teacher) + (later_updates if cost.old else 0.0)
    without_gradient += (
        2 * cost.measured / (cost.views * (1 if cost.measured_each_update else learner.updates_per_batch))
    )
    without_gradient += cost.remeasured / cost.views
    without_gradient += cost.valued / (cost.views * learner.updates_per_batch)
    without_gradient += cost.prompts / (cost.views * rollout.group_size)
    per_rank = math.ceil(learned * cost.views / learner.ranks)
    in_forward = min(per_rank, learner.views_per_forward)
    scored, _ = scored_rows(config, in_forward)
    return Work(
        completions=completions,
        learned=learned,
        held=held,
        engine_forwards=rounds * math.ceil(rows_of_lease / rollout.max_rows) * steps,
        engine=one_forward * steps,
        views=views,
        learner_forwards=math.ceil(per_rank / learner.views_per_forward) * learner.updates_per_batch,
        learner=training,
        reference=plain * without_gradient,
        published=adapter_bytes(config, model),
        published_by_all=adapter_bytes(config, model) * rollout.wanted_actors,
        trajectories=trajectory_bytes(config, prompt) * drawn,
        buffered=trajectory_bytes(config, prompt) * held,
        engine_share=busiest / completions,
        batch_arrays=in_forward * length * 16 + scored * (40 + 9 * (sampler.top_k or 1)),
    )


def branched_positions(config: RunConfig) -> float:
    """Positions that the head sees for the branches of a completion, on average."""
    sampler = config.rollout.sampler.spec()
    branches = config.objective.branches(sampler)
    if branches is None:
        return 0.0
    if isinstance(branches, GreedyBranches):  # which steps count is known in the end: all masked positions of each
        return sampler.completion_length * (sampler.steps + 1) / 2
    return sampler.completion_length / (branches.degree + 2)


def candidates_per_token(config: RunConfig) -> float:
    """Positions that the head sees per position that is revealed, on average over a rollout."""
    sampler = config.rollout.sampler
    if sampler.threshold is not None:
        return (sampler.block_length + 1) / 2  # a position a step, at most
    if sampler.position_rule in ("random", "left_to_right"):
        return 1.0
    steps = sampler.steps * sampler.block_length // sampler.completion_length
    revealed = sampler.block_length / steps
    return sum(sampler.block_length - revealed * step for step in range(steps)) / sampler.block_length


def duration(
    config: RunConfig, work: Work, *, flops_per_actor: float, flops_per_rank: float, utilisation: float
) -> Duration:
    """Seconds when every process does this share of its device's peak. Synchronous runs add up; asynchronous ones take
    as long as their slower half."""
    rollout = work.engine.total * work.engine_share / (flops_per_actor * utilisation)
    learn = (work.learner.total + work.reference.total) / config.learner.ranks / (flops_per_rank * utilisation)
    iteration = rollout + learn if config.rollout.max_staleness == 0 else max(rollout, learn)
    return Duration(rollout, learn, iteration, iteration * config.run.iterations)
