"""What an actor needs of an engine."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rollout.adapters import AdapterState, digest
from rollout.engines.groups import OnCompletion
from rollout.spans import Gap
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
        gaps: Sequence[Sequence[Gap]] | None = None,
        branches: BranchSpec | None = None,
        on_completion: OnCompletion | None = None,
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
