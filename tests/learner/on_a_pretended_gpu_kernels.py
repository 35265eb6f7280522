"""How many kernels a block of each family launches on a GPU, forward and backward, with LoRA on all the maps that a
family's adapters cover: each costs a launch, and most of them read and write a hidden state."""

from pathlib import Path

import pytest
import torch

from rollout.adapters import adapter_parameters
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.prompt_head import last_block
from tests.support.pretended_gpu import counted, pretended_gpu
from tests.support.small_masked_lms import write_masked_lm
from tests.support.small_policies import FAMILIES, write_policy

KERNELS = {
    "llada": (49, 89),
    "dream": (49, 81),
    "llada_moe": (101, 197),
    "bert": (24, 40),
    "modernbert": (29, 46),
}
"""At most, (forward, backward); whoever fuses kernels lowers them. The small LLaDA and Dream repeat keys and values. In
the backward of LLaDA 6 are the last block's alone: gradients at asked rows go back among all rows."""


def launched(path: str, device: torch.device, *, without_last: int) -> tuple[int, int]:
    """Kernels of a forward of the model and of its backward, its last blocks left out."""
    family = policy_adapter(path)
    model = attach_lora(load_model(path), family, LoraSpec(r=4, alpha=4.0)).to(device)
    block = last_block(model, family)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and any(b is block for b in m))
    del blocks[len(blocks) - without_last :]
    ids = torch.arange(5, 29).view(2, 12).to(device)
    with counted() as forward:
        loss = model(input_ids=ids, logit_rows=torch.arange(2, 6).to(device)).logits.sum()
    with counted() as backward:
        loss.backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values()) or family.family == "llada_moe"
    return forward.kernels, backward.kernels


@pytest.mark.parametrize("family", KERNELS)
def test_a_block_launches_no_more_kernels_than_it_did(family: str, tmp_path: Path) -> None:
    (write_policy if family in FAMILIES else write_masked_lm)(tmp_path, family)
    with pretended_gpu() as device:
        whole, less = (launched(str(tmp_path), device, without_last=n) for n in (0, 1))
    found = whole[0] - less[0], whole[1] - less[1]
    most = KERNELS[family]
    assert 0 < found[0] <= most[0] and 0 < found[1] <= most[1], f"{family}: {found} kernels, and {most} are allowed"
    assert whole[0] > most[0] and whole[1] > most[1], "control: a whole model launches more than a block"
