"""LLaDA-MoE against transformers' Qwen3-MoE made bidirectional, its nearest relative: the same names, a norm per head
on queries and keys, and routing without rescaling."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rewards.errors import ConfigError
from rollout.adapters import adapter_parameters
from rollout.engines.torch import TorchEngine
from rollout.models.family import policy_adapter
from rollout.models.llada import LLaDAConfig
from rollout.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM, MixtureOfExperts
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from tests.learner.test_scorer import rollout, worst_difference
from tests.support.published import write_published, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llada_moe")
    write_published(path, "llada_moe")
    return path


def qwen3_moe(folder: Path, *, dense_layers: tuple[int, ...] = (), **changes) -> Qwen3MoeForCausalLM:
    raw = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("num_experts", "num_experts_per_tok", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    settings = {name: raw[name] for name in names} | {
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
        "moe_intermediate_size": raw["expert_intermediate_size"],
        "intermediate_size": raw["dense_intermediate_size"],
        "mlp_only_layers": list(dense_layers),
        "norm_topk_prob": False,
        "pad_token_id": None,
    }
    config = Qwen3MoeConfig(**(settings | changes))
    config.is_causal = False
    model, loading = Qwen3MoeForCausalLM.from_pretrained(
        folder, config=config, dtype="float32", output_loading_info=True
    )
    assert not any(loading.values()), loading
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(20, 110, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_qwen3_moe_seeing_both_ways(folder):
    model, ids = load_model(folder), random_ids(2, 40)
    expected = qwen3_moe(folder)(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    mask = torch.ones(2, 40).long()
    mask[1, :5] = 0
    masked = qwen3_moe(folder)(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(model(ids, mask).logits[1, 5:], masked[1, 5:], atol=1e-5, rtol=1e-5)
    rescaled = qwen3_moe(folder, norm_topk_prob=True)(ids, use_cache=False).logits
    assert (rescaled - expected).abs().max() > 0.1  # control: router weights that sum to 1


@torch.no_grad()
def test_a_layer_may_have_one_dense_mlp(tmp_path):
    state = write_published(tmp_path, "llada_moe", moe_layer_freq=[0, 1])
    generator = torch.Generator().manual_seed(1)
    kept = {name: t for name, t in state.items() if not name.startswith("model.layers.0.mlp.")}
    for part, shape in (("gate_proj", (64, 32)), ("up_proj", (64, 32)), ("down_proj", (32, 64))):
        kept[f"model.layers.0.mlp.{part}.weight"] = torch.randn(shape, generator=generator) * 0.25
    write_shards(tmp_path, kept)
    ids = random_ids(2, 20)
    expected = qwen3_moe(tmp_path, dense_layers=(0,))(ids, use_cache=False).logits
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, expected, atol=1e-5, rtol=1e-5)


def mixture(seed: int = 0, **changes) -> MixtureOfExperts:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LLaDAMoEConfig(hidden_size=16, expert_intermediate_size=12, **heads, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        experts = MixtureOfExperts(config)
        torch.nn.init.normal_(experts.gate.weight)
    return experts


def token_by_token(experts: MixtureOfExperts, h_BLD: torch.Tensor) -> torch.Tensor:
    rows = []
    for h in h_BLD.flatten(0, 1):
        probability = (experts.gate.weight @ h).softmax(0)
        best = probability.argsort(descending=True)[: experts.gate.chosen]
        rows.append(sum(probability[e] * experts.experts[int(e)](h) for e in best))
    return torch.stack(rows).view_as(h_BLD)


@pytest.mark.parametrize(("num_experts", "chosen"), [(6, 2), (6, 6), (6, 1), (64, 8)])
def test_grouped_experts_equal_a_loop_over_tokens(num_experts, chosen):
    experts = mixture(num_experts=num_experts, num_experts_per_tok=chosen)
    h = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    ours, plain = h.clone().requires_grad_(), h.clone().requires_grad_()
    out, expected = experts(ours), token_by_token(experts, plain)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    parameters = list(experts.parameters())
    gradients = torch.autograd.grad(out.square().sum(), [ours, *parameters])
    wanted = torch.autograd.grad(expected.square().sum(), [plain, *parameters], allow_unused=True)
    for found, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if want is None else want, atol=1e-4, rtol=1e-4)


def test_an_expert_that_nobody_chose_runs_over_nothing():
    """ZeRO-3 gathers a module's weights when it is called, on all ranks together, whatever the tokens of each."""
    experts = mixture(num_experts=6, num_experts_per_tok=1)
    with torch.no_grad():
        experts.gate.weight.zero_()
        experts.gate.weight[2] = 5.0
    rows = {}
    for number, expert in enumerate(experts.experts):
        expert.gate_proj.register_forward_hook(lambda _, inputs, __, n=number: rows.update({n: len(inputs[0])}))
    experts(torch.ones(2, 5, 16))
    assert rows == {0: 0, 1: 0, 2: 10, 3: 0, 4: 0, 5: 0}


def test_the_router_is_no_target_and_the_experts_are_one_by_name(folder):
    policy = policy_adapter(folder)

    def adapted(**options) -> set[str]:
        model = attach_lora(load_model(folder), policy, LoraSpec(2, 4.0, **options))
        return {name.partition(".lora_")[0] for name in adapter_parameters(model)}

    attention = {f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"}
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.{part}_proj"
        for i in range(2)
        for e in range(8)
        for part in ("gate", "up", "down")
    }
    assert adapted() == attention
    assert adapted(target_modules=("gate_proj", "up_proj", "down_proj")) == experts
    assert adapted(target_modules=("experts.3.up_proj",)) == {name for name in experts if ".3.up_" in name}
    with pytest.raises(ConfigError, match=r"'mlp\.gate' names no linear map.*mlp\.experts\.N\.down_proj"):
        adapted(target_modules=("mlp.gate",))


def test_few_bits_reach_the_experts_and_not_the_router(folder):
    pattern = policy_adapter(folder).block_regex
    linear = {name for name, module in load_model(folder).named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linear if not re.fullmatch(pattern, name)} == {"lm_head"}
    assert not any(name.endswith("mlp.gate") for name in linear)


def test_replay_parity(folder):
    engine = TorchEngine(model_path=str(folder), lora=None, max_rows=5, threads=1)
    groups = rollout(engine, "low_confidence")
    assert worst_difference(load_model(folder), groups, engine.family) <= 1e-5
    other = worst_difference(
        load_model(folder), groups, engine.family, law_of=lambda batch: dataclasses.replace(batch, temperature=0.8)
    )
    assert other > 1e-3  # control


def test_the_model_type_that_both_llada_share_is_told_apart(folder, tmp_path):
    assert policy_adapter(folder).family == "llada_moe"
    assert json.loads((folder / "config.json").read_text())["model_type"] == LLaDAConfig.model_type == "llada"
    assert isinstance(LLaDAConfig.from_pretrained(folder), LLaDAMoEConfig)
    load_model(folder).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    read = set(LLaDAMoEConfig().to_dict()) | {"moe_layer_freq", "rope_scaling"}
    published = json.loads((folder / "config.json").read_text())
    assert {name for name in published if name in read and published[name] != written.get(name)} <= {
        "architectures",
        "transformers_version",
    }


def test_published_sizes_and_ids_are_the_defaults():
    config = LLaDAMoEConfig()
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (156895, 156892, 156892)
    with torch.device("meta"):
        model = LLaDAMoEModelLM(config)
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) * (64 - 8) // 64
    assert round(total / 1e9, 2) == 7.36 and round((total - idle) / 1e9, 1) == 1.7  # 1.4 without the embedding


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"qk_layernorm": False}, "qk_layernorm=False"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok=65"),
        ({"moe_layer_freq": [1, 0]}, "moe_layer_freq has 2 entries"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        LLaDAMoEConfig(**changes)


def test_a_router_in_low_precision_decides_in_float32():
    experts = mixture(num_experts=6, num_experts_per_tok=2).to(torch.bfloat16)
    h = torch.randn(9, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight, chosen = experts.gate(h)
    exact = F.linear(h, experts.gate.weight).float().softmax(-1)
    assert weight.dtype == torch.bfloat16 and torch.equal(chosen, exact.topk(2).indices)
    assert torch.equal(weight, exact.topk(2).values.bfloat16())
