"""The digest of what a model holds is that of what was published, and is taken where the weights lie."""

import warnings

import numpy as np
import pytest
import torch

from rollout.adapters import adapter_parameters, digest, digest_of, load_state, pack


@pytest.fixture
def model() -> torch.nn.Module:
    """Two LoRA parameters, of different types."""
    model, layer = torch.nn.Module(), torch.nn.Module()
    model.add_module("layer", layer)
    for name, dtype in (("lora_A", torch.float32), ("lora_B", torch.bfloat16)):
        part = torch.nn.Module()
        part.register_parameter("weight", torch.nn.Parameter(torch.randn(4, 6).to(dtype)))
        layer.add_module(name, part)
    return model


def test_it_is_the_packed_weights_digest(model: torch.nn.Module) -> None:
    held = adapter_parameters(model)
    assert len(held) == 2 and digest_of(held) == digest(pack(held))
    turned = {name: value.detach().t() for name, value in held.items()}  # not contiguous
    assert digest_of(turned) == digest(pack(turned)) != digest_of(held)


def test_one_changed_value_changes_it(model: torch.nn.Module) -> None:
    held = adapter_parameters(model)
    before = digest_of(held)
    with torch.no_grad():
        next(iter(held.values()))[2, 3] += 1e-3
    assert digest_of(held) != before


def test_weights_are_loaded_from_memory_that_nobody_may_write_to(model: torch.nn.Module) -> None:
    state = pack({name: torch.full_like(value, 3.0) for name, value in adapter_parameters(model).items()})
    for tensor in state.values():
        tensor.data.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_state(model, state)
    assert digest_of(adapter_parameters(model)) == digest(state)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.zero_()
    assert all(np.asarray(tensor.data).any() for tensor in state.values()), "the model shares the store's memory"
