"""The memory and the speed that are there: what the command line says, the GPUs of a cluster, or this machine."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from learner.settings.run import RunConfig
from rewards.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A model of GPU: memory as sold, and its peak without sparsity in 16 bits and in fp32 (no TF32)."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float


GPUS = {
    "H200": Gpu(141, 989, 67),
    "H100": Gpu(80, 989, 67),
    "A100": Gpu(80, 312, 19.5),
    "A100-40G": Gpu(40, 312, 19.5),
    "L40S": Gpu(48, 362, 91.6),
    "A6000": Gpu(48, 155, 38.7),
    "A10": Gpu(24, 125, 31.2),
    "L4": Gpu(24, 121, 30.3),
    "4090": Gpu(24, 165, 82.6),
    "3090": Gpu(24, 71, 35.6),
}
"""Data sheets' values."""

CPU_FLOPS_PER_THREAD = 5e10
"""Assumed fp32 operations per second of one CPU thread; --tflops says better."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True)
class Hardware:
    """What a run may use. On "cpu" all processes share ``memory``; on "cuda" it is one GPU's."""

    device: str
    gpus: int
    memory: int | None
    """Bytes; None when unknown."""
    gpu: str | None
    """A key of ``GPUS``, when known."""
    source: str
    """Where this comes from, as a sentence's part."""


def processor_name() -> str:
    """Of this machine, in words."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def parse_memory(text: str) -> int:
    """Bytes of "80GiB", "24GB", "512MiB". Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?b?)\s*", text, flags=re.IGNORECASE)
    unit = found.group(2).upper() if found else ""
    unit = unit if unit in _UNITS else unit + "B"
    if not found or unit not in _UNITS or float(found.group(1)) <= 0:
        raise ConfigError(f"memory {text!r} is not an amount such as 80GiB or 24GB")
    return int(float(found.group(1)) * _UNITS[unit])


def known_gpu(name: str) -> str | None:
    """The key of ``GPUS`` that this device name holds, the longest if several: "NVIDIA A100-SXM4-80GB" is an A100."""
    fits = [key for key in GPUS if key.lower() in name.lower().replace(" ", "").replace("rtx", "")]
    best = max(fits, key=len, default=None)
    return "A100-40G" if best == "A100" and re.search(r"40\s*GB?", name) else best


def on_gpus(count: int, memory: int | None, gpu: str | None) -> Hardware:
    """GPUs as the command line describes them: by model, by memory, or both. Raises ConfigError for unknown models."""
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu} is none of {', '.join(GPUS)}; give --memory and --tflops instead")
    if memory is None:
        if gpu is None:
            raise ConfigError("--gpus needs --memory (80GiB, for example) or --gpu (H100, for example)")
        memory = int(GPUS[gpu].memory_gib * (1 << 30))
    return Hardware("cuda", count, memory, gpu, "the command line")


def uses_gpus(config: RunConfig) -> bool:
    """Whether the run's settings put any process on a GPU."""
    return config.resources.gpus_per_rank > 0 or config.resources.gpus_per_actor > 0


def this_machine(config: RunConfig) -> Hardware:
    """What this machine has for the run: its GPUs when the settings ask for some, else its memory."""
    if not uses_gpus(config):
        return Hardware("cpu", 0, machine_memory(), None, "this machine")
    import torch

    if not torch.cuda.is_available():
        return Hardware("cuda", 0, None, None, "this machine, where torch sees no GPU")
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    name = torch.cuda.get_device_name(0)
    return Hardware("cuda", len(sizes), min(sizes), known_gpu(name), f"this machine ({name})")


def ray_cluster(config: RunConfig) -> Hardware:
    """What the Ray that this process has joined has. Ray says how many GPUs of which model, not how large they are: the
    model's size as sold stands in, unless this machine has one of them to ask."""
    import ray

    have = ray.cluster_resources()
    where = f"the Ray cluster at {ray.get_runtime_context().gcs_address}"
    if not uses_gpus(config):
        # What the nodes had free when Ray started; a cluster of one node has at least this machine's.
        free = int(have.get("memory", 0) + have.get("object_store_memory", 0))
        return Hardware("cpu", 0, max(free, machine_memory() or 0) or None, None, where)
    count = int(have.get("GPU", 0))
    models = [known_gpu(key.partition(":")[2]) for key in have if key.startswith("accelerator_type:")]
    local = this_machine(config)
    if local.memory is not None:
        return Hardware("cuda", count, local.memory, local.gpu, f"{where}; memory as on this machine")
    sizes = [(GPUS[model].memory_gib, model) for model in models if model is not None]
    if not sizes or len(sizes) < len(models):
        return Hardware("cuda", count, None, None, where)
    smallest, model = min(sizes)
    return Hardware("cuda", count, int(smallest * (1 << 30)), model, f"{where}; memory as sold")


def machine_memory() -> int | None:
    """Bytes of this machine's memory, or of its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total
