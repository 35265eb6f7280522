"""Actors without a model, for the control path: no torch in here, so that hundreds of them fit on a small machine.

Shapes: G completions, C positions, m steps, K kept tokens of a position.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from learner.simulation.spread import Spread
from rollout.messages import GroupReport, LeaseReport, Weights
from rollout.seeds import numpy_generator
from rollout.trajectory import BranchSpec, Lease, SamplerSpec, TrajectoryGroup


def prebuilt_group(
    *, size: int, prompt: int, completion: int, block: int, steps: int, kept: int, vocabulary: int
) -> TrajectoryGroup:
    """A group that no model drew: random tokens, random order, ``kept`` tokens in the support of every position. The
    last two of the vocabulary, which are the special ones in these benchmarks, don't occur."""
    generator = numpy_generator("bench trajectory")
    G, C, V = size, completion, vocabulary - 2
    stride = V // kept
    support = generator.integers(0, stride, G * C)[:, None] + stride * np.arange(kept)  # ascending
    inside = np.stack([generator.permutation(block) for _ in range(G * C // block)]).reshape(G, C)
    per_block = steps // (C // block)
    flat = np.full((G, C), -np.log(kept), dtype=np.float32)
    group = TrajectoryGroup(
        group_id=0,
        problem_id="bench",
        prompt_ids=generator.integers(0, V, prompt).astype(np.int32),
        completion_ids=support[np.arange(G * C), generator.integers(0, kept, G * C)].reshape(G, C).astype(np.int32),
        unmask_step=(np.arange(C) // block * per_block + inside // (block // per_block)).astype(np.int16),
        unmask_rank=(inside % (block // per_block)).astype(np.int16),
        drawn=np.ones((G, C), dtype=bool),
        logp=flat,
        logp_raw=flat,
        entropy=-flat,
        support_indptr=np.arange(G * C + 1, dtype=np.int64) * kept,
        support_ids=support.ravel().astype(np.int32),
        rewards=np.linspace(0.0, 1.0, G, dtype=np.float32)[:, None],
        reward_names=("reward",),
        correct=np.zeros(G, dtype=bool),
        policy_version=0,
        adapter_digest="bench",
        sampler=SamplerSpec(C, block, steps, "random", 0.6, kept, 1.0),
        seed=0,
        nfe=np.full(G, steps, dtype=np.int32),
    )
    group.validate()
    return group


class ModelFreeSettings(NamedTuple):
    """What all actors of a pool have in common."""

    group: Mapping[str, int]
    """Sizes, as ``prebuilt_group`` wants them."""
    lease_s: float = 0.0
    """Mean time of a lease; 0: answers at once."""
    spread: float = 0.0
    """Standard deviation of that, as a share of it."""


class ModelFreeActor:
    """Answers a lease with copies of one prebuilt group, after a while in which it uses no core."""

    def __init__(self, actor_id: str, settings: ModelFreeSettings) -> None:
        self._actor_id, self._settings = actor_id, settings

    def ping(self) -> None:
        """Answers, in a thread of its own (``rollout.pulse``)."""

    def start(self) -> dict[str, Any]:
        """Say where this actor is, as ``rollout.actor.RolloutActor`` does."""
        self._group = prebuilt_group(**self._settings.group)
        return {"actor_id": self._actor_id, "pid": os.getpid()}

    def run_lease(
        self, lease: Lease, sampler: SamplerSpec, weights: Weights, branches: BranchSpec | None = None
    ) -> tuple[Any, ...]:
        """The lease's report, then its groups. How long it takes depends on the lease's first group alone."""
        begin = time.perf_counter()
        if self._settings.lease_s:
            name = ("model-free lease", lease.groups[0].seed)
            time.sleep(Spread(self._settings.lease_s, self._settings.spread, *name).draw())
        groups = [dataclasses.replace(self._group, group_id=spec.group_id) for spec in lease.groups]
        report = LeaseReport(
            lease_id=lease.lease_id,
            actor_id=self._actor_id,
            policy_version=weights.version,
            adapter_digest=weights.digest,
            groups=tuple(GroupReport(s.group_id, s.problem.id, 0, 0, 0, 0, None) for s in lease.groups),
            load_s=0.0,
            generate_s=time.perf_counter() - begin,
            grade_wait_s=0.0,
        )
        return report, *groups
