"""What a GPU would refuse, and what it would wait for: sampling, scoring and every method's loss on a pretended one.

Values are those of the CPU, bit for bit, since the CPU computes them.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores, score
from learner.likelihood.views import build_batch
from learner.objectives import make_objective
from learner.ranks.plan import Forward, plan_update
from learner.ranks.rank import lora_spec
from rewards.task import Problem
from rollout.adapters import AdapterState, adapter_parameters, load_state
from rollout.engines.torch import TorchEngine
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.every_method import METHODS, Drawing, at, draw_batches, drawing_of
from tests.support.learner_ranks import SAMPLER, random_adapter, settings
from tests.support.pretended_gpu import Counts, MixedDevices, counted, pretended_gpu
from tests.support.small_policies import FAMILIES, write_policy

SAMPLERS = {
    "random": SAMPLER,
    "untruncated": dataclasses.replace(SAMPLER, top_k=None, top_p=1.0),
    "low_confidence": dataclasses.replace(SAMPLER, position_rule="low_confidence"),
    "decoupled_confidence": dataclasses.replace(SAMPLER, position_rule="decoupled_confidence"),
    "threshold": dataclasses.replace(SAMPLER, threshold=0.05),
    "greedy": dataclasses.replace(SAMPLER, temperature=0.0, top_k=None, top_p=1.0),
}
MOST_SYNCS_OF_A_STEP = 8
MOST_SYNCS_OF_A_FORWARD = 4
"""Before the backward is queued."""
MORE = {"bgpo": 5, "just_grpo": 5, "trafl": 6, "espo": 7, "gdpo": 7, "trace_rl_values": 7, "diffpo_thresholds": 8}
MORE |= {"egspo": 8, "coupled_grpo": 11, "dispo": 12, "spg": 12}
"""Of methods that wait more often: their sums over units, fills or tokens send an index each."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[torch.device]:
    with pretended_gpu() as device:
        yield device


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> dict[str, str]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        write_policy(folder, family)
    return {family: str(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def adapter(tiny_model) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def batches(tiny_model, adapter) -> dict[Drawing, list[TrajectoryGroup]]:
    return draw_batches(tiny_model, adapter)


# ---- the pretended GPU itself


def test_operations_that_mix_devices_are_refused(gpu):
    here, there = torch.ones(3), torch.ones(3).to(gpu)
    assert there.device.type == gpu.type and (there + 1.0).sum().item() == 6.0
    torch.testing.assert_close((there * torch.tensor(2.0)).cpu(), 2 * here)  # a number is allowed, as on CUDA
    torch.testing.assert_close(there[torch.tensor([0, 2])].cpu(), here[:2])  # and indices are
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there.gather(0, torch.tensor([0]))):
        with pytest.raises(MixedDevices, match="mixes devices"):
            mixed()


def test_what_is_waited_for_is_counted(gpu):
    x = torch.arange(6.0).to(gpu)
    with counted() as counts:
        (x.view(2, 3)[:, 1:] * 2).sum()  # two kernels: a view is none
    assert (counts.kernels, counts.syncs) == (2, [])
    for waits in (x.sum().item, x.tolist, x.cpu, lambda: x[x > 2], x.nonzero, lambda: torch.ones(2).to(gpu)):
        with counted() as counts:
            waits()
        assert counts.syncs, "control: this waits"


# ---- sampling


def engine(path: str, device: torch.device | str) -> TorchEngine:
    return TorchEngine(model_path=path, lora=LoraSpec(r=4, alpha=8.0), max_rows=16, threads=1, device=str(device))


def drawn(sampled: TorchEngine, sampler: SamplerSpec) -> tuple[list[TrajectoryGroup], Counts, int]:
    """Two groups with prompts of two lengths, what it took, and in how many steps of the 16 rows."""
    specs = [GroupSpec(i, Problem(f"p{i}", {}), 8, 5 + i) for i in range(2)]
    with counted() as counts:
        groups = sampled.generate(specs, [[5, 6, 7], [5, 6, 7, 8, 9]], sampler)
    return groups, counts, int(max(group.nfe.max() for group in groups))


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_waits_a_few_times_a_step_and_draws_the_same(gpu, policies, name):
    expected, none, _ = drawn(engine(policies["llada"], "cpu"), SAMPLERS[name])
    found, counts, steps = drawn(engine(policies["llada"], gpu), SAMPLERS[name])
    assert not none.syncs, "control: the CPU waits for nobody"
    assert len(counts.syncs) <= MOST_SYNCS_OF_A_STEP * steps, counts.told()
    for ours, theirs in zip(found, expected, strict=True):
        for field in ("completion_ids", "unmask_step", "logp", "logp_raw", "entropy", "support_ids", "position_logp"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llada"])
def test_every_family_samples_on_one_device(gpu, policies, family):
    expected, _, _ = drawn(engine(policies[family], "cpu"), SAMPLER)
    found, counts, steps = drawn(engine(policies[family], gpu), SAMPLER)
    routed = counts.syncs if family != "llada_moe" else [s for s in counts.syncs if "llada_moe" not in s]
    assert len(routed) <= MOST_SYNCS_OF_A_STEP * steps, counts.told()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)


# ---- learning


def gradients(
    path: str, device: torch.device | str, method: str, adapter: AdapterState, groups: list[TrajectoryGroup]
) -> tuple[dict[str, torch.Tensor], Counts, int]:
    """Of an update's forwards, one after the other; and what was waited for before each backward."""
    config = at(method)
    family, objective = policy_adapter(path), make_objective(config.objective)
    model = attach_lora(load_model(path), family, lora_spec(config)).to(device).train()
    load_state(model, adapter)
    plan = plan_update(
        groups,
        objective=objective,
        run_seed=1,
        update_index=0,
        eos_ids=(family.eos_token_id,),
        ranks=1,
        views_per_forward=16,
    )
    before = Counts()
    for forward in plan.forwards[0]:
        with counted() as counts:
            loss = loss_of(model, forward, objective, family, groups)
        before.syncs += counts.syncs
        (loss / plan.normaliser).backward()
    found = {name: p.grad.cpu() for name, p in adapter_parameters(model).items() if p.grad is not None}
    return found, before, len(plan.forwards[0])


def loss_of(model, forward: Forward, objective, family, groups) -> torch.Tensor:
    needs = objective.needs
    batch = build_batch(
        forward.views,
        groups,
        mask_id=family.mask_token_id,
        pad_id=family.pad_token_id,
        law=needs.law,
        unit_sizes=[len(unit) for unit in forward.units],
    )
    policy = score(model, batch, family=family, vocabulary=needs.vocabulary)
    if needs.head is not None:  # a head's values are 0 at first
        zeros = {"value_Z": policy.logp_N.new_zeros(len(batch.views)), "value_N": torch.zeros_like(policy.logp_N)}
        policy = dataclasses.replace(policy, **zeros)
    reference: Scores | None = None
    if needs.reference:
        with torch.no_grad(), model.disable_adapter():
            reference = score(model, batch, family=family)
    loss, _ = objective.loss(PolicyScores(policy, policy.detached(), reference, policy.detached()), batch)
    return loss


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_one_device(gpu, tiny_model, adapter, batches, method):
    groups = batches[drawing_of(method)]
    expected, none, _ = gradients(tiny_model, "cpu", method, adapter, groups)
    found, before, forwards = gradients(tiny_model, gpu, method, adapter, groups)
    assert not none.syncs and expected, "control: the CPU waits for nobody"
    assert len(before.syncs) <= MORE.get(method, MOST_SYNCS_OF_A_FORWARD) * forwards, before.told()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)
