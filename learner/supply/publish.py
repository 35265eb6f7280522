"""Publishing the adapter: put once per version, pulled by the actors between leases."""

import ray

from learner.ranks.rank import PublishedAdapter
from rewards.errors import WeightMismatch
from rollout.adapters import digest
from rollout.messages import Weights


def publish(version: int, adapter: PublishedAdapter) -> Weights:
    """Put a version into the object store, from the process that outlives actors and ranks.

    Every lease carries the newest version, so a late or restarted actor gets it with its first lease.

    Raises:
        WeightMismatch: when what arrived is not what rank 0 hashed.
    """
    arrived = digest(adapter.state)
    if arrived != adapter.digest:
        raise WeightMismatch(
            f"adapter version {version} left rank 0 with digest {adapter.digest[:12]} and arrived with {arrived[:12]}"
        )
    return Weights(version, arrived, [ray.put(adapter.state)])
