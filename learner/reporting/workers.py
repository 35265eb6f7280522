"""What the run store knows of a run's processes: rollout actors and learner ranks.

A worker's heartbeat is its last answer. Nobody asks it while it works: what it does and since when is told instead, and
how long that may take is bounded elsewhere (leases, evaluations, updates). Ray reports a process that ends.
"""

import time
from typing import Any

from learner.planning.memory import GIB
from learner.ranks.group import LearnerGroup
from rollout.pool import RolloutPool
from services.store.writer import StoreWriter

_EVERY_S = 10.0


class Workers:
    """Tells the store of all that work for a run. For the thread that works with the actors.

    Attributes:
        learner: None until the ranks have started.
        pool: None until the actors are starting, and for a run without any.
    """

    learner: LearnerGroup | None = None
    pool: RolloutPool | None = None

    def __init__(self, store: StoreWriter) -> None:
        self._store = store
        self._actors: dict[str, dict[str, Any]] = {}  # as they were told last
        self._told = -_EVERY_S

    def tell(self, policy_version: int) -> None:
        """``policy_version``: what the ranks hold."""
        self._told = time.monotonic()
        if self.pool is not None:
            self._tell_actors(self.pool)
        if self.learner is not None:
            self._tell_ranks(self.learner, policy_version)

    def tell_if_due(self, policy_version: int) -> None:
        """The same when the store was not told for a while."""
        if time.monotonic() - self._told >= _EVERY_S:
            self.tell(policy_version)

    def gpu_peaks(self) -> dict[str, float]:
        """The most memory that a process of each kind has held on its GPU since it started, by metric, GiB; nothing
        without GPUs."""
        actors = self.pool.workers() if self.pool is not None else []
        ranks = self.learner.descriptions if self.learner is not None else []
        peaks: dict[str, float] = {}
        for kind, workers in (("actor", actors), ("rank", ranks)):
            of_gpus = [worker["usage"]["gpu"] for worker in workers if "gpu" in (worker["usage"] or {})]
            if of_gpus:
                peaks[f"machine/gpu_allocated_gib/{kind}"] = max(gpu["peak_allocated_bytes"] for gpu in of_gpus) / GIB
                peaks[f"machine/gpu_reserved_gib/{kind}"] = max(gpu["peak_reserved_bytes"] for gpu in of_gpus) / GIB
        return peaks

    def _tell_actors(self, pool: RolloutPool) -> None:
        actors = {actor["actor_id"]: actor for actor in pool.workers()}
        retired = {"state": "retired", "doing": None}
        gone = {name: actor | retired for name, actor in self._actors.items() if name not in actors}
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
                heartbeat=actor["heard"] or actor["began"],
                data={
                    **_work(actor["doing"]),
                    "node_id": actor["node_id"],
                    "engine": actor["engine"],
                    **(actor["usage"] or {}),
                },
            )

    def _tell_ranks(self, learner: LearnerGroup, policy_version: int) -> None:
        doing = learner.doing  # one look: an update is waited for in another thread
        for rank in learner.descriptions:
            self._store.worker(
                f"learner-{rank['rank']}",
                role="learner",
                status="ready" if doing is None else "busy",
                node=rank["host"],
                pid=rank["pid"],
                policy_version=policy_version,
                heartbeat=learner.heard,
                data={**_work(doing), **rank["usage"]},
            )


def _work(doing: tuple[str, float] | None) -> dict[str, Any]:
    what, since = doing or (None, None)
    return {"doing": what, "since": since, "told": time.time()}
