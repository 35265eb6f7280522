"""What GPUs are there, and with which libraries."""

import torch

from learner.bench.first_minutes.figures import Figure


def measure(*, small: bool) -> list[Figure]:
    flash = Figure("FlashAttention in torch", "yes" if torch.backends.cuda.is_flash_attention_available() else "no")
    if small:
        return [Figure("GPUs", 0), flash]
    found = torch.cuda.get_device_properties(0)
    count, nccl = torch.cuda.device_count(), ".".join(map(str, torch.cuda.nccl.version()))
    return [
        Figure("GPUs", count, note=", ".join(torch.cuda.get_device_name(i) for i in range(count))),
        Figure(
            "GiB of the first", found.total_memory / (1 << 30), note=f"{torch.cuda.mem_get_info()[0] / 1e9:.1f} GB free"
        ),
        Figure("compute capability", f"{found.major}.{found.minor}", ">= 8.0", "bfloat16 and fused attention"),
        Figure("CUDA, cuDNN, NCCL", f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {nccl}"),
        flash,
    ]
