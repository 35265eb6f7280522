"""Logits of a model in bfloat16: their products and sums are in fp32."""

import pytest
import torch
import torch.nn.functional as F

from rollout.models import head
from rollout.models.family import policy_adapter
from rollout.models.head import Head, exact_logits
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from tests.support.small_policies import FAMILIES, write_policy


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_bfloat16_model_are_fp32(tmp_path, family):
    write_policy(tmp_path, family)
    adapter = policy_adapter(tmp_path)
    adapters = [None, LoraSpec(r=2, alpha=2.0)]
    if family != "bert":  # whose head is its embedding
        adapters.append(LoraSpec(r=2, alpha=2.0, include_head=True))
    for lora in adapters:
        model = load_model(tmp_path, "bfloat16")
        top = model.get_submodule(adapter.head_name)
        assert isinstance(top, Head) and top.weight.dtype is torch.bfloat16
        seen: list[torch.Tensor] = []
        top.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        policy = model if lora is None else attach_lora(model, adapter, lora)
        logits = policy(input_ids=torch.arange(10, 26).view(2, 8), logit_rows=torch.tensor([3, 9])).logits
        expected = F.linear(seen[0].float(), top.weight.float(), None if top.bias is None else top.bias.float())
        assert logits.dtype is torch.float32 and seen[0].dtype is torch.bfloat16
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-6)
        rounded = F.linear(seen[0], top.weight, top.bias).float()
        assert (rounded - expected).abs().max() > 1e-3, "control: a bfloat16 product rounds"


def test_slices_of_the_vocabulary_are_the_whole_map_and_so_is_its_gradient(monkeypatch):
    monkeypatch.setattr(head, "_ELEMENTS_AT_ONCE", 7 * 16)
    generator = torch.Generator().manual_seed(0)
    x_ND, weight_VD, bias_V, slope_NV = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 16), (40, 16), (40,), (5, 40))
    )
    ours = [tensor.clone().requires_grad_() for tensor in (x_ND, weight_VD, bias_V)]
    whole = [tensor.float().requires_grad_() for tensor in (x_ND, weight_VD, bias_V)]
    found, expected = exact_logits(*ours), F.linear(*whole)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for logits in (found, expected):
        (logits * slope_NV.float()).sum().backward()
    for tensor, exact in zip(ours, whole, strict=True):
        torch.testing.assert_close(tensor.grad, exact.grad.bfloat16())
