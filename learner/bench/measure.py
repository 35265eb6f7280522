"""Time, memory, and the machine that they were measured on.

*Time* is the process's CPU time, user and system, of all its threads (the benchmarks run one): on a machine that is
shared, the wall clock also measures the neighbours. The wall clock is stored beside it.

*Memory* is the peak of the process's resident memory during a step minus its resident memory just before, when the
model was loaded and had done a tiny forward (and backward). It is the kernel's own high-water mark (VmHWM), reset
before the step (/proc/self/clear_refs), in a fresh process, so nothing freed earlier can be used again unseen.
"""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from learner.planning.hardware import processor_name

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Seconds(NamedTuple):
    cpu: float
    wall: float


def timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    """What ``work`` returns and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[Seconds, Seconds]:
    """Median seconds of each, taken in turns."""
    taken: tuple[list[Seconds], list[Seconds]] = ([], [])
    for _ in range(repeats):
        taken[0].append(timed(first)[1])
        taken[1].append(timed(second)[1])
    medians = [Seconds(*(statistics.median(column) for column in zip(*way, strict=True))) for way in taken]
    return medians[0], medians[1]


def peak_above(work: Callable[[], Any]) -> int:
    """Bytes of resident memory that ``work`` needs above what the process holds now, at its peak.

    Raises:
        OSError: this kernel has no resettable high-water mark (Linux only).
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc: hand freed pages back, or work could use them again unseen
        libc.malloc_trim(0)
    _CLEAR_REFS.write_text("5")
    before = _status_bytes("VmRSS")
    result = work()
    peak = _status_bytes("VmHWM") - before
    del result
    return max(0, peak)


def matmul_rate(*, device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Operations per second of a square matrix product: the ceiling for everything made of matrix products. The best
    of several tries, since whatever else the machine does only slows it down."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        seconds = _product_seconds(a, b, device)
        best = max(best, 2.0 * size**3 / seconds)
    return best


def machine(*, threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _product_seconds(a: torch.Tensor, b: torch.Tensor, device: str) -> float:
    if device != "cuda":
        return timed(lambda: a @ b)[1].cpu
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 10


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _commit() -> str:
    folder = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except OSError:
        return ""
    return found.stdout.strip()
