"""A process's manners on its GPU: it keeps to its share of the memory, gives back what it doesn't use, repeats itself
where that is asked of it, and says in one sentence when the memory didn't suffice.

Without a GPU nothing of it does anything. Loads torch only where it is needed: plans are made without.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rewards.errors import OutOfMemory

_GIB = 1 << 30
CUDA_ALLOWANCE = int(0.75 * _GIB)
"""Assumed: CUDA context, loaded kernels and cuBLAS workspaces of one process, outside of torch's allocator."""
NCCL_ALLOWANCE = int(0.5 * _GIB)
"""Assumed: communication buffers of one rank among several, outside of it too."""

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class GpuManners:
    """Of one process.

    share: of a GPU, as Ray counts them; 0 for a process without. several: it speaks with others by NCCL.
    deterministic: ``learner.deterministic``.
    """

    share: float = 0.0
    several: bool = False
    deterministic: bool = False

    def environment(self) -> dict[str, str]:
        """Variables that the process must find when it starts; the user's own values stay."""
        found: dict[str, str] = {}
        if self.share > 0:
            own = {name: os.environ[name] for name in _ALLOCATOR if name in os.environ}
            # Leases differ in length; blocks of ever new sizes would each keep memory that no other can use.
            found |= own or {_ALLOCATOR[0]: "expandable_segments:True"}
        if self.share > 0 and self.deterministic:
            found[_CUBLAS] = os.environ.get(_CUBLAS, ":4096:8")
        return found

    def begin(self) -> None:
        """Before anything is computed or loaded."""
        if self.share <= 0:
            return
        import torch

        if self.share < 1:
            total = torch.cuda.mem_get_info()[1]
            beside = CUDA_ALLOWANCE + NCCL_ALLOWANCE * self.several
            torch.cuda.set_per_process_memory_fraction(max(0.0, self.share - beside / total))
        if self.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # The fused kernels' backwards add up in no fixed order.
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)

    def rest(self) -> None:
        """Between two pieces of work: what is cached goes back to a GPU that others share."""
        if 0 < self.share < 1:
            import torch

            torch.cuda.empty_cache()


NO_GPU = GpuManners()


def larger_gpu() -> str:
    """What to change where nothing better is known."""
    return "take a GPU with more memory"


@contextlib.contextmanager
def told_when_full(who: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Around work on a GPU.

    Args:
        who: does it, for the error.
        remedy: what to change first, as "set KEY=VALUE ...".

    Raises:
        OutOfMemory: when the GPU's memory doesn't suffice.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
        what = f"{asked[1]} more" if asked else "more"
        held = f"{torch.cuda.memory_reserved() / _GIB:.2f} GiB"
        # Without its cause, whose frames hold what fills the memory.
        raise OutOfMemory(f"{who} ran out of its GPU's memory: it wanted {what} and holds {held}; {remedy()}") from None
