"""The product's pool over actors without a model."""

import sys
from typing import Any

from learner.bench.model_free import ModelFreeActor, ModelFreeSettings
from rollout.pool import RolloutPool
from services.store.faults import Cause, Part


class ModelFreePool(RolloutPool):
    """The product's pool, whose actors have no model, and whose groups are none that was asked for."""

    actor_class = ModelFreeActor
    looks_into_groups = False


def start_model_free(settings: ModelFreeSettings, size: int, *, start_timeout_s: float) -> ModelFreePool:
    """So many actors, ready. They take no logical CPU."""
    pool_settings: Any = settings  # its own actors know what to do with them
    pool = ModelFreePool(
        pool_settings, size=size, resources={"CPU": 0}, environment={}, start_timeout_s=start_timeout_s, max_restarts=0
    )
    pool.wait_ready()
    return pool


def tell_fault(part: Part, cause: Cause, text: str, **cost: Any) -> None:
    """What a run's reporter does with a fault, where there is no run."""
    print(f"{part} {cause}: {text}", file=sys.stderr)
