"""What the run store knows of a run's processes: rollout actors and learner ranks."""

import time
from typing import Any

from learner.group import LearnerGroup
from rollout.pool import RolloutPool
from services.store.writer import StoreWriter

_EVERY_S = 10.0


class Workers:
    """Tells the store of all that work for a run.

    Args:
        pool: the rollout actors; None for a run without any.
    """

    def __init__(self, store: StoreWriter, learner: LearnerGroup, pool: RolloutPool | None) -> None:
        self._store, self._learner, self._pool = store, learner, pool
        self._actors: dict[str, dict[str, Any]] = {}  # as they were told last
        self._told = 0.0

    def tell(self, policy_version: int) -> None:
        """``policy_version``: what the ranks hold."""
        self._told = time.monotonic()
        self._tell_actors()
        for rank in self._learner.descriptions:
            self._store.worker(
                f"learner-{rank['rank']}",
                role="learner",
                status="ready",
                node=rank["host"],
                pid=rank["pid"],
                policy_version=policy_version,
                data=rank["usage"],
            )

    def tell_if_due(self, policy_version: int) -> None:
        """The same when the store was not told for a while."""
        if time.monotonic() - self._told > _EVERY_S:
            self.tell(policy_version)

    def _tell_actors(self) -> None:
        actors = {} if self._pool is None else {actor["actor_id"]: actor for actor in self._pool.workers()}
        gone = {name: actor | {"state": "retired"} for name, actor in self._actors.items() if name not in actors}
        self._actors = actors
        for actor in [*actors.values(), *gone.values()]:
            self._store.worker(
                actor["actor_id"],
                role="rollout",
                status=actor["state"],
                node=str(actor["host"]),
                pid=actor["pid"],
                policy_version=actor["policy_version"],
                restarts=actor["restarts"],
                last_error=actor["last_error"],
                data={"node_id": actor["node_id"], "engine": actor["engine"], **(actor["usage"] or {})},
            )
