"""What a process uses of its machine: for people to look at, nothing is decided by it."""

import os
import sys
from pathlib import Path
from typing import Any


def process_usage() -> dict[str, Any]:
    """Of this process, in bytes: ``memory_bytes`` (resident) and, where it computes on a GPU, ``gpu`` with ``name``,
    ``memory_used_bytes`` and ``memory_total_bytes`` of the whole device, and of this process since its start
    ``peak_allocated_bytes``, what its tensors held at most, and ``peak_reserved_bytes``, what torch held for them. What
    the machine doesn't tell is left out."""
    usage: dict[str, Any] = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        usage["memory_bytes"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    torch = sys.modules.get("torch")  # a process that never loaded it has no GPU either
    if torch is not None and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        usage["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "memory_used_bytes": total - free,
            "memory_total_bytes": total,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return usage
