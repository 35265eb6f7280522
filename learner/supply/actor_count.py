"""How many rollout actors a run has, while it runs.

The number changes while work goes on: a lease is computed and delivered whole whoever computes it, so a synchronous run
has the same bits whatever their number.
"""

from typing import Any

import ray

from learner.planning.check import check_memory
from learner.planning.hardware import this_machine
from learner.runs.session import joins
from learner.settings.run import RunConfig, check_resources, required_resources
from rewards.errors import ConfigError
from rollout.places import Resize
from rollout.pool import RolloutPool


class ActorCount:
    """Changes the number of a pool's actors, one change at a time."""

    def __init__(self, config: RunConfig, pool: RolloutPool) -> None:
        self._config, self._pool = config, pool

    def change(self, wanted: Any) -> Resize:
        """Begin with it; the pool goes on while it is polled. Raises ConfigError when there is no room for so many."""
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise ConfigError(f"actors={wanted!r} is no number of actors; give one of at least 1")
        if self._config.resources.one_process:
            raise ConfigError("with resources.one_process each actor is a learner rank too, whose number can't change")
        try:
            if wanted > self._pool.size:
                self._check_room(wanted)
        except ConfigError as error:
            raise ConfigError(f"no room for {wanted} actors, it stays at {self._pool.size}: {error}") from None
        return self._pool.resize(wanted, timeout_s=self._config.timeouts.resize)

    def _check_room(self, actors: int) -> None:
        """Raises ConfigError where it is known beforehand; on a cluster, which may grow, the pool tries."""
        if joins(self._config.resources.ray_address):
            return
        rollout = self._config.rollout.model_copy(update={"actors": actors})
        config = self._config.model_copy(update={"rollout": rollout})
        have = ray.cluster_resources()
        if required_resources(config)[0] > have.get("CPU", 0.0):
            raise ConfigError(
                f"the run's local Ray was started with room for {self._config.rollout.most_actors}; "
                f"start it with rollout.max_actors={actors}"
            )
        check_resources(config, have.get("CPU", 0.0), have.get("GPU", 0.0))
        check_memory(config, this_machine(config))
