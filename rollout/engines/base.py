"""What an actor needs of an engine."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rollout.adapters import AdapterState, digest
from rollout.trajectory import BranchSpec, GroupSpec, SamplerSpec, TrajectoryGroup


class Engine(Protocol):
    """Draws groups with the weights that it holds."""

    tokenizer: Any
    policy_version: int
    adapter_digest: str

    def generate(
        self,
        groups: Sequence[GroupSpec],
        prompts: Sequence[list[int]],
        sampler: SamplerSpec,
        *,
        branches: BranchSpec | None = None,
        on_completion: Callable[[int, int, np.ndarray], None] | None = None,
    ) -> list[TrajectoryGroup]: ...

    def load_adapter(
        self,
        version: int,
        adapter: AdapterState,
        expected_digest: str,
        *,
        hashed: Callable[[AdapterState], str] = digest,
    ) -> None: ...

    def without_adapter(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...
