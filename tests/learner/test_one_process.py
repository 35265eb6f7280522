"""Two models over one base: the same tensors, adapters and modes of their own. And what the settings refuse."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner.finetuning.settings import load_sft_config
from learner.ranks.one_process import over_the_same_base
from learner.ranks.rank import rank_manners
from learner.settings.run import check_resources, load_config, required_resources
from learner.supply import actors
from learner.supply.actor_count import ActorCount
from rewards.errors import ConfigError
from rollout.adapters import adapter_parameters
from rollout.gpu import GpuManners
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model, recompute_activations
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.quantization import require_bitsandbytes
from tests.support.small_policies import FAMILIES, write_policy

LORA = LoraSpec(r=4, alpha=8.0)
IDS = torch.randint(7, 60, (2, 12), generator=torch.Generator().manual_seed(0))
ONE = "resources.one_process=true"
KINDS = [*((family, None) for family in FAMILIES), ("llada", "nf4"), ("llada", "int8"), ("bert", "nf4")]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """As an engine holds it, with an adapter that does something."""
    family, kind = request.param
    if kind is not None:
        try:
            require_bitsandbytes(kind, "cpu")
        except ConfigError as error:
            pytest.skip(str(error))
    write_policy(tmp_path, family)
    made = attach_lora(load_model(str(tmp_path), quantization=kind), policy_adapter(str(tmp_path)), LORA).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(made).values():
            parameter.normal_(std=0.1, generator=generator)
    return made


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=None, logit_rows=torch.arange(24)).logits


def held(*models: Any) -> int:
    """Bytes of all tensors that the models hold, each storage once; those beside quantized weights too."""
    found: dict[int, int] = {}

    def note(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()

    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            for each in (tensor, *vars(tensor).values()):
                note(each)
                for inner in getattr(each, "__dict__", {}).values():
                    note(inner)
        for module in model.modules():
            for value in vars(module).values():
                note(value)
                for inner in getattr(value, "__dict__", {}).values():
                    note(inner)
    return sum(found.values())


def test_the_base_is_there_once_and_each_adapter_is_its_own(model: Any) -> None:
    twin = over_the_same_base(model)
    adapter = sum(p.untyped_storage().nbytes() for p in adapter_parameters(model).values())
    assert held(model, twin) == held(model) + adapter
    assert held(model, copy.deepcopy(model)) > 1.9 * held(model), "control: a plain copy holds all of it again"
    assert torch.equal(logits(twin), logits(model))


def test_one_learns_while_the_other_stays_as_it_is(model: Any) -> None:
    before = logits(model)
    twin = over_the_same_base(model).train()
    recompute_activations(twin)
    optimizer = torch.optim.SGD(adapter_parameters(twin).values(), lr=1.0)
    logits(twin).square().mean().backward()
    optimizer.step()
    assert not torch.equal(logits(twin), before), "control: it learned"
    assert torch.equal(logits(model), before) and not model.training
    assert all(p.grad is None for p in model.parameters())
    with model.disable_adapter():
        assert not torch.equal(logits(model), before)
        assert not torch.equal(logits(twin), logits(model)), "it goes without its adapter alone"


MISTAKES = {
    "more actors": (["rollout.actors=2"], "rollout.actors (2) isn't learner.ranks=1; set them to one number"),
    "stragglers": (["rollout.second_lease_after_s=5"], "second_lease_after_s=5: a straggler can't learn before"),
    "drawn ahead": (
        ["rollout.max_staleness=1"],
        "at the same time, as rollout.max_staleness=1 asks for; set that to 0",
    ),
    "vLLM": (["rollout.engine=vllm"], "rollout.engine=vllm has a base of its own"),
    "a base in shards": (["learner.zero_stage=3"], "learner.zero_stage=3 cuts the base into shards"),
    "two devices": (["resources.gpus_per_rank=0.5"], "put it on different devices; give both a share"),
    "more than a GPU": (
        ["resources.gpus_per_rank=1", "resources.gpus_per_actor=0.5"],
        "sum of resources.gpus_per_rank and resources.gpus_per_actor, 1.5",
    ),
}


@pytest.mark.parametrize("arguments, sentence", MISTAKES.values(), ids=MISTAKES)
def test_what_one_process_cannot_do_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["rollout.actors=1", ONE, *arguments])
    (line,) = str(caught.value).splitlines()
    assert sentence in line
    load_config(["rollout.actors=1", *arguments])  # control


def test_two_ranks_on_a_gpu_are_refused_by_the_sum_of_the_shares() -> None:
    two = ["learner.ranks=2", "rollout.actors=2", ONE]
    with pytest.raises(ConfigError, match="0.4, which lets two of learner.ranks=2 share a GPU"):
        load_config([*two, "resources.gpus_per_rank=0.2", "resources.gpus_per_actor=0.2"])
    load_config([*two, "resources.gpus_per_rank=0.3", "resources.gpus_per_actor=0.3"])  # control


def test_fine_tuning_has_no_actors_to_be_one_process_with() -> None:
    with pytest.raises(ConfigError, match="one_process=true is for ranks that share a GPU with actors"):
        load_sft_config(["data.train=x", ONE])


def test_a_process_asks_for_what_both_ask_and_keeps_to_it() -> None:
    shared = ["recipe=llada_gsm8k", "learner.deterministic=true"]
    apart, both = load_config(shared), load_config([*shared, ONE])
    assert both.resources.of("rank") == both.resources.of("actor") == (2.0, 1.0)
    assert (apart.resources.of("rank")[1], apart.resources.of("actor")[1]) == (0.6, 0.4)
    assert required_resources(both) == required_resources(apart)
    check_resources(both, *required_resources(both))
    assert rank_manners(both) == actors._manners(both) == GpuManners(1.0, several=True, deterministic=True)


def test_the_number_of_processes_stays() -> None:
    pool: Any = SimpleNamespace(size=1)
    with pytest.raises(ConfigError, match="each actor is a learner rank too, whose number can't change"):
        ActorCount(load_config(["rollout.actors=1", ONE]), pool).change(2)
