"""Starts the actors of a pool, and knows what the cluster's nodes have to do with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn, PlacementGroupSchedulingStrategy

from rollout.given_up import require_ray
from rollout.places import Place
from rollout.pulse import with_pulse

_NODE = "ray.io/node-id"
"""The label that Ray gives each node."""


def draining_nodes() -> dict[str, float]:
    """By id, the nodes that are about to go, by preemption or by an order, and when: Unix seconds, 0 where nobody said.

    Ray starts nothing on them any more. Raises RayLost.
    """
    require_ray()
    # Not part of Ray's public interface, which tells the same only through the dashboard's server.
    return {node: deadline_ms / 1000 for node, deadline_ms in ray_state.get_draining_nodes().items()}


@dataclass
class Starter:
    """Of the actors of a pool; see ``rollout.pool.RolloutPool``."""

    actor_class: type
    settings: Any
    resources: Mapping[str, float]
    environment: Mapping[str, str]
    limit_s: float
    placement: PlacementGroup | None = None
    """In whose bundles they are started, one in each; None: wherever there is room."""
    avoided: set[str] = field(default_factory=set)
    """Nodes where none is started as long as there is room elsewhere."""

    def start(self, place: Place, limit_s: float | None = None) -> None:
        """A new actor in this place, which has ``limit_s`` seconds to start, once Ray has found room for it."""
        custom = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")}
        strategy: Any = "SPREAD"
        if self.placement is not None:
            strategy = PlacementGroupSchedulingStrategy(self.placement)
        elif self.avoided:
            strategy = NodeLabelSchedulingStrategy({}, soft={_NODE: NotIn(*sorted(self.avoided))})
        # Ray neither restarts the actor nor repeats its tasks: that is decided, and counted, by pool and ledger.
        actor_class = with_pulse(self.actor_class).options(
            num_cpus=self.resources.get("CPU", 0),
            num_gpus=self.resources.get("GPU", 0),
            resources=custom,
            scheduling_strategy=strategy,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": dict(self.environment)},
        )
        place.begin(actor_class.remote(place.name, self.settings), limit_s or self.limit_s)

    def not_ready(self, places: Sequence[Place]) -> str:
        """Why these, which are starting, are not ready."""
        free, total = ray.available_resources(), ray.cluster_resources()
        short = [
            f"{name} ({amount:g} asked for by each, {free.get(name, 0):g} of {total.get(name, 0):g} free)"
            for name, amount in self.resources.items()
            if free.get(name, 0) < amount and self.placement is None
        ]
        if short:
            why = f"the cluster is short of {', '.join(short)}; start fewer actors or learner ranks, or add nodes"
        else:
            why = "loading takes longer, or no single node has all that an actor asks for; raise the time limit"
        names = ", ".join(place.name for place in places)
        return f"{names} did not start within {places[0].limit_s:g} s: {why}"
