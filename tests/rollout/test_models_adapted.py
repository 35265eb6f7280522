"""Adapted maps of one input are computed together: the same values and gradients as one by one, in fewer passes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rollout.adapters import adapter_parameters, load_state
from rollout.models.adapted import products
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from tests.support.hand_made import acting_adapter
from tests.support.published import random_ids, write_published

BLOCK = "base_model.model.model.layers.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dream")  # its queries, keys and values have biases
    write_published(path, "dream")
    return path


def policy(folder: Path, alpha: float = 8.0, targets: tuple[str, ...] | None = None) -> nn.Module:
    model = attach_lora(load_model(folder), policy_adapter(folder), LoraSpec(4, alpha, target_modules=targets))
    load_state(model, acting_adapter(model))
    return model


def one_by_one(x: torch.Tensor, maps: list[nn.Module]) -> list[torch.Tensor]:
    """What LoRA is defined as."""
    found = []
    for one in maps:
        base = one.base_layer if hasattr(one, "base_layer") else one
        found.append(F.linear(x, base.weight, base.bias))
        if hasattr(one, "lora_A"):
            low = x @ one.lora_A["default"].weight.T @ one.lora_B["default"].weight.T
            found[-1] = found[-1] + low * one.scaling["default"]
    return found


def gradients(found: list[torch.Tensor], x: torch.Tensor, maps: list[nn.Module]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in found)
    trained = [p for one in maps for p in one.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, [x, *trained]))


@pytest.mark.parametrize("alpha", [4.0, 8.0])  # of rank 4: scales 1 and 2
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj")])
def test_together_they_are_what_they_are_one_by_one(folder, alpha, targets):
    attention = policy(folder, alpha, targets).get_submodule(f"{BLOCK}.self_attn").double()
    maps = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, expected = products(x, *maps), one_by_one(x, maps)
    assert [y.shape for y in found] == [y.shape for y in expected]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    of_found, of_expected = gradients(found, x, maps), gradients(expected, x, maps)
    assert len(of_found) == 1 + 2 * (3 if targets is None else 2) and all(g.any() for g in of_found)
    torch.testing.assert_close(of_found, of_expected, atol=1e-12, rtol=1e-12)
    other = gradients(one_by_one(x, maps[::-1]), x, maps)  # control: maps mixed up
    assert not all(torch.allclose(ours, theirs) for ours, theirs in zip(of_found, other, strict=True))


@torch.no_grad()
def test_without_an_active_adapter_they_are_the_base(folder):
    base, adapted, ids = load_model(folder), policy(folder), random_ids(2, 6)
    assert not torch.allclose(adapted(ids).logits, base(ids).logits)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, base(ids).logits)
    acting = adapted(ids).logits
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(ids).logits, acting, atol=1e-4, rtol=1e-4)


def test_no_tokens_pass_a_gradient_of_zeros(folder):
    mlp = policy(folder).get_submodule(f"{BLOCK}.mlp")
    mlp(torch.zeros(0, 32)).sum().backward()
    assert not any(p.grad.any() for p in adapter_parameters(mlp).values())


def test_trained_bases_and_the_heads_logits_are_adapted_too(folder):
    model = attach_lora(load_model(folder, "bfloat16"), policy_adapter(folder), LoraSpec(4, 8.0, include_head=True))
    load_state(model, acting_adapter(model))
    model.get_submodule(f"{BLOCK}.self_attn.q_proj").base_layer.weight.requires_grad_()
    logits = model(random_ids(2, 6)).logits
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
