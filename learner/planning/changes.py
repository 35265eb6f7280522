"""What to change first where a run doesn't fit its hardware, or where a process of it ran out of memory."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from learner.planning.hardware import Hardware
from learner.planning.needs import Budget, Needs, gib
from learner.planning.shapes import ModelShape
from learner.settings.run import RunConfig, required_resources


@dataclass(frozen=True)
class Change:
    """A setting that would help, and what the process would then need."""

    settings: tuple[str, ...]
    process: str
    peak: int
    fits: bool


def changes_of(needs: Needs) -> Iterator[Change]:
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


def first_change(config: RunConfig, model: ModelShape, *, prompt: int, process: str) -> Change | None:
    """What to change first for a process of this name, "learner rank" or "rollout actor", that ran out of its GPU's
    memory, whatever was planned: as if it had room for half of what comes and goes. None where nothing helps."""
    needs = Needs(config, model, Hardware("cuda", 0, None, None, "the GPU that was full"), prompt)
    unlimited = Budget(None, "not asked for")
    rank, actor = (
        Budget(each.peak - each.dynamic // 2, "less than planned") if process in each.name else unlimited
        for each in (needs.rank(), needs.actor())
    )
    return next(changes_of(Needs(config, model, needs.hardware, prompt, (rank, actor))), None)


def _applied(needs: Needs, makes: tuple["_Make", ...]) -> Iterator[tuple[dict[str, Any], Needs]]:
    """These changes on top of each other, without those that don't help. The sizes of forwards come last: how small
    they must be depends on the others."""
    for make in sorted(makes, key=lambda make: make in (_views, _rows)):
        changes = make(needs)
        changed = needs.with_config(changes) if changes else None
        if changed is not None and changed.excess() < needs.excess():
            yield changes, changed
            needs = changed


def _told(needs: Needs, steps: list[tuple[dict[str, Any], Needs]]) -> Iterator[Change]:
    for changes, changed in steps:
        ranks = changed.rank().peak != needs.rank().peak
        process = changed.rank() if ranks else changed.actor()
        settings = tuple(f"{key}={str(value).lower()}" for key, value in changes.items())
        yield Change(settings, process.name, process.peak, not any(changed.problems()))
        needs = changed


def _checkpointing(needs: Needs) -> dict[str, Any]:
    return {} if needs.config.learner.activation_checkpointing else {"learner.activation_checkpointing": True}


def _views(needs: Needs) -> dict[str, Any]:
    largest, now = needs.largest_views(), needs.config.learner.views_per_forward
    return {"learner.views_per_forward": max(1, largest)} if largest is not None and largest < now else {}


def _rows(needs: Needs) -> dict[str, Any]:
    largest, now = needs.largest_rows(), needs.config.rollout.max_rows
    return {"rollout.max_rows": max(1, largest)} if largest is not None and largest < now else {}


def _zero(needs: Needs) -> dict[str, Any]:
    """The lowest stage that is enough, or the highest."""
    learner = needs.config.learner
    if learner.ranks == 1 or learner.zero_stage == 3 or needs.config.model.quantization:
        return {}
    highest = learner.zero_stage
    for stage in range(learner.zero_stage + 1, 4):
        changed = needs.with_config({"learner.zero_stage": stage})
        if changed is not None:
            highest = stage
            if changed.excess() == 0:
                break
    return {"learner.zero_stage": highest} if highest > learner.zero_stage else {}


def _one_process(needs: Needs) -> dict[str, Any]:
    """Of ranks and actors that share GPUs; not where the budgets of one kind were given, which aren't those of both."""
    resources = needs.config.resources
    shared = 0 < resources.gpus_per_rank < 1 and 0 < resources.gpus_per_actor < 1
    return {"resources.one_process": True} if shared and not needs.one_process and needs.given is None else {}


def _bfloat16(needs: Needs) -> dict[str, Any]:
    if needs.config.learner.dtype == "bfloat16":
        return {}
    stage = max(1, needs.config.learner.zero_stage)
    return {"learner.dtype": "bfloat16", "learner.zero_stage": stage}


def _quantized(needs: Needs) -> dict[str, Any]:
    if needs.config.model.quantization is not None:
        return {}
    return {"model.quantization": "nf4"} | ({"learner.zero_stage": 2} if needs.config.learner.zero_stage == 3 else {})


_Make = Callable[[Needs], dict[str, Any]]
_TRIED: tuple[_Make, ...] = (_checkpointing, _views, _rows, _zero, _one_process, _bfloat16, _quantized)


def _more_hardware(needs: Needs) -> Iterator[Change]:
    """A whole GPU for every process; then larger ones, or more."""
    resources = needs.config.resources
    shared = [key for key in ("gpus_per_rank", "gpus_per_actor") if 0 < getattr(resources, key) < 1]
    share = 0.5 if needs.one_process else 1.0
    if shared and (whole := needs.with_config({f"resources.{key}": share for key in shared})) is not None:
        largest = max(whole.rank(), whole.actor(), key=lambda process: process.peak)
        _, gpus = required_resources(whole.config)
        if not whole.excess():
            settings = tuple(f"resources.{key}={share:g}" for key in shared)
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
