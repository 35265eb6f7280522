"""Memory of a process that is learner rank and rollout actor with one base (``resources.one_process``)."""

import dataclasses

from learner.planning.memory import Device, Item, ProcessMemory, actor_memory, adapter_bytes, rank_memory
from learner.planning.shapes import ModelShape
from learner.settings.run import RunConfig


def one_process_memory(
    config: RunConfig,
    model: ModelShape,
    *,
    device: Device,
    prompt: int,
    views: int | None = None,
    rows: int | None = None,
    checkpointing: bool | None = None,
) -> ProcessMemory:
    """What the rank holds and an adapter more; while it draws, nothing waits for a backward. Arguments as of
    ``rank_memory`` and ``actor_memory``."""
    rank = rank_memory(config, model, device=device, prompt=prompt, views=views, checkpointing=checkpointing)
    actor = actor_memory(config, model, device=device, prompt=prompt, rows=rows)
    drawing = (dataclasses.replace(each, name=f"rollout: {each.name}") for each in actor.moments)
    return dataclasses.replace(
        rank,
        name=f"{rank.name} and {actor.name}",
        resident=(*rank.resident, Item("rollout's adapter", adapter_bytes(config, model), "beside the learner's")),
        after=(*rank.after, *drawing),
    )
