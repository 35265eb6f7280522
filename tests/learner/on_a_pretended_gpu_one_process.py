"""A rank's model over the base of an engine, on one pretended GPU."""

import numpy as np
import torch

from learner.ranks.one_process import over_the_same_base
from learner.ranks.rank import lora_spec
from rollout.engines.torch import TorchEngine
from tests.learner.on_a_pretended_gpu import (  # noqa: F401  (fixtures)
    SAMPLER,
    adapter,
    batches,
    drawn,
    gpu,
    gradients,
    gradients_of,
)
from tests.support.every_method import at, drawing_of


def test_one_draws_and_the_other_learns_over_one_base(gpu, tiny_model, adapter, batches):  # noqa: F811
    groups = batches[drawing_of("agrpo")]
    expected, _, _ = gradients(tiny_model, "cpu", "agrpo", adapter, groups)
    lora = lora_spec(at("agrpo"))
    engine = TorchEngine(model_path=tiny_model, lora=lora, max_rows=16, threads=1, device=str(gpu))
    before, _, _ = drawn(engine, SAMPLER)
    twin = over_the_same_base(engine.model).train()
    assert all(parameter.device.type == gpu.type for parameter in twin.parameters())
    found, _, _ = gradients_of(twin, tiny_model, "agrpo", adapter, groups)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)
    again, _, _ = drawn(engine, SAMPLER)
    for ours, theirs in zip(again, before, strict=True):
        np.testing.assert_array_equal(ours.logp, theirs.logp)
