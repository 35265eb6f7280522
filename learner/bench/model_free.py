"""Actors without a model, for the control path: no torch in here, so that 64 of them fit on a small machine.

Shapes: G completions, C positions, m steps, K kept tokens of a position.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from rollout.seeds import numpy_generator
from rollout.trajectory import Lease, SamplerSpec, TrajectoryGroup


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


class ModelFreeActor:
    """Answers a lease at once, with copies of one prebuilt group."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._group = prebuilt_group(**sizes)

    def ready(self) -> int:
        """The process id."""
        return os.getpid()

    def run_lease(self, lease: Lease) -> tuple[Any, ...]:
        """The lease's id, then its groups."""
        return lease.lease_id, *(dataclasses.replace(self._group, group_id=s.group_id) for s in lease.groups)
