"""What GPUs are there, and with which libraries."""

from importlib.util import find_spec

import torch

from learner.bench.first_minutes.figures import Figure


def measure(*, small: bool) -> list[Figure]:
    flash = "installed" if find_spec("flash_attn") else "not installed"
    if small:
        return [Figure("GPUs", 0), Figure("flash-attn", flash)]
    found = torch.cuda.get_device_properties(0)
    count, nccl = torch.cuda.device_count(), ".".join(map(str, torch.cuda.nccl.version()))
    return [
        Figure("GPUs", count, note=", ".join(torch.cuda.get_device_name(i) for i in range(count))),
        Figure(
            "GiB of the first", found.total_memory / (1 << 30), note=f"{torch.cuda.mem_get_info()[0] / 1e9:.1f} GB free"
        ),
        Figure("compute capability", f"{found.major}.{found.minor}", ">= 8.0", "bfloat16 and fused attention"),
        Figure("CUDA, cuDNN, NCCL", f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {nccl}"),
        Figure("flash-attn", flash),
    ]
