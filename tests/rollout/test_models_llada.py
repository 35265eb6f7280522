"""The LLaDA model against recorded logits of the reference, and what the contract asks of it beyond that."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from rewards.errors import ConfigError
from rollout.models.family import policy_adapter
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.loading import load_model
from tests.support.hand_made import GOLDEN
from tests.support.published import write_published

BLOCK_MAPS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


def tiny(seed: int = 0, **changes) -> LLaDAModelLM:
    sizes = dict(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=48, vocab_size=20, init_std=0.2)
    tokens = dict(mask_token_id=1, eos_token_id=0, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LLaDAModelLM(LLaDAConfig(**(sizes | tokens | changes))).eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 20, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def golden() -> tuple[LLaDAModelLM, dict[str, torch.Tensor]]:
    config = LLaDAConfig(d_model=64, n_layers=4, n_heads=4, mlp_hidden_size=128, vocab_size=70)
    model = LLaDAModelLM(config).eval()
    weights = np.load(GOLDEN / "weights_base.npz")
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights})
    probe = np.load(GOLDEN / "probe_logits.npz")
    return model, {name: torch.from_numpy(probe[name]) for name in probe}


@torch.no_grad()
def test_logits_are_the_references(golden):
    model, probe = golden
    torch.testing.assert_close(model(probe["input_ids"]).logits, probe["logits_no_mask"], atol=2e-5, rtol=0)
    masked = model(probe["input_ids"], probe["attention_mask"]).logits
    real = probe["attention_mask"].bool()
    torch.testing.assert_close(masked[real], probe["logits_mask_honoured"][real], atol=2e-5, rtol=0)
    assert (masked[real] - probe["logits_mask_ignored"][real]).abs().max() > 0.1  # the mask matters on this probe


@torch.no_grad()
@pytest.mark.parametrize("change", ["theta", "interleaved heads"])
def test_parity_would_notice_another_architecture(golden, change):
    model, probe = golden
    if change == "theta":
        model.config.rope_theta = 10000.0
    else:
        q_proj = model.model.transformer.blocks[0].q_proj
        q_proj.weight.copy_(q_proj.weight.unflatten(0, (16, 4)).transpose(0, 1).flatten(0, 1))
    assert (model(probe["input_ids"]).logits - probe["logits_no_mask"]).abs().max() > 1e-3


def by_the_book(weights: dict[str, torch.Tensor], c: dict, ids: list[int]) -> torch.Tensor:
    """A second implementation, for one sequence, in float64: heads one by one, rotations as complex numbers, softmax
    spelled out. Logits [L, V]."""
    w = {name.removeprefix("model.transformer."): tensor.double() for name, tensor in weights.items()}
    width, heads = c["d_model"] // c["n_heads"], c["n_heads"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def turn(x: torch.Tensor) -> torch.Tensor:
        rate = torch.tensor([c["rope_theta"] ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
        angle = torch.arange(len(ids), dtype=torch.float64)[:, None] * rate
        turned = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=1)

    x = w["wte.weight"][ids]
    for i in range(c["n_layers"]):
        block = {part: w[f"blocks.{i}.{part}.weight"] for part in BLOCK_MAPS}
        h, out = norm(x, f"blocks.{i}.attn_norm"), []
        for head in range(heads):
            shared = head * c["n_kv_heads"] // heads
            q = turn(h @ block["q_proj"][head * width : (head + 1) * width].T)
            k = turn(h @ block["k_proj"][shared * width : (shared + 1) * width].T)
            v = h @ block["v_proj"][shared * width : (shared + 1) * width].T
            weight = (q @ k.T / width**0.5).exp()
            out.append(weight / weight.sum(1, keepdim=True) @ v)
        x = x + torch.cat(out, dim=1) @ block["attn_out"].T
        h = norm(x, f"blocks.{i}.ff_norm")
        gate = h @ block["ff_proj"].T
        x = x + (gate / (1 + (-gate).exp()) * (h @ block["up_proj"].T)) @ block["ff_out"].T
    return norm(x, "ln_f") @ w["ff_out.weight"].T


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_logits_are_those_of_a_second_implementation(tmp_path, kv_heads):
    weights = write_published(tmp_path, "llada", n_kv_heads=kv_heads)
    config = json.loads((tmp_path / "config.json").read_text())
    ids = torch.randint(2, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    found = load_model(tmp_path)(ids).logits
    expected = torch.stack([by_the_book(weights, config, row) for row in ids.tolist()])
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    other = by_the_book(weights, config | {"rope_theta": 10000.0}, ids[0].tolist()).float()
    assert (found[0] - other).abs().max() > 1e-2  # control


def test_published_sizes_are_the_defaults():
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig())
    assert sum(p.numel() for p in model.parameters()) * 2 == 16_031_162_368  # bytes that the published index states


@torch.no_grad()
def test_left_pads_are_not_seen():
    model, ids = tiny(), random_ids(2, 11)
    padded = torch.cat([random_ids(2, 5, seed=1), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 11)], dim=1).long()
    expected = model(ids).logits
    torch.testing.assert_close(model(padded, mask).logits[:, 5:], expected, atol=1e-5, rtol=0)
    assert (model(padded).logits[:, 5:] - expected).abs().max() > 0.1  # control: pads seen


@torch.no_grad()
def test_logit_rows_are_rows_of_the_full_logits():
    model, ids = tiny(), random_ids(3, 9)
    rows = torch.tensor([26, 0, 10, 10, 7])
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logit_rows=rows).logits, full.flatten(0, 1)[rows], atol=1e-6, rtol=0)
    assert not torch.allclose(model(ids, logit_rows=rows.flip(0)).logits, full.flatten(0, 1)[rows])


def test_the_head_runs_on_the_wanted_rows_only():
    model, seen = tiny(), []
    model.model.transformer.ff_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(random_ids(3, 9), logit_rows=torch.tensor([4, 20]))
    assert seen == [(2, 32)]


def test_a_row_of_pads_only_gives_finite_logits_and_gradients():
    model, ids = tiny().train(), random_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    logits = model(ids, mask).logits
    assert logits.isfinite().all()
    logits[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_parameter_names_are_the_published_ones():
    block = ("attn_norm", "ff_norm", *BLOCK_MAPS)
    expected = {"model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"}
    expected |= {f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in block}
    assert set(tiny().state_dict()) == expected
    assert set(tiny(weight_tying=True).state_dict()) == expected - {"model.transformer.ff_out.weight"}


@pytest.mark.parametrize("changes", [{}, {"weight_tying": True}, {"n_kv_heads": 2}])
@torch.no_grad()
def test_saving_and_loading_changes_nothing(tmp_path, changes):
    model, ids = tiny(**changes), random_ids(2, 8)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loaded in (load_model(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, LLaDAModelLM) and not loaded.training
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert next(load_model(tmp_path, "bfloat16").parameters()).dtype == torch.bfloat16


@torch.no_grad()
def test_grouped_heads_equal_full_heads_with_repeated_weights():
    grouped, full, ids = tiny(n_kv_heads=2), tiny(), random_ids(2, 8)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(ids).logits, full(ids).logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient():
    gradients, forwards = [], []
    for checkpointing in (False, True):
        model, calls = tiny().train(), []
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.model.transformer.blocks[0].ff_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(random_ids(2, 8)).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        forwards.append(len(calls))
    assert forwards == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@torch.no_grad()
def test_bfloat16_norms_are_computed_in_float32():
    norm = tiny().to(torch.bfloat16).model.transformer.ln_f
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 100
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), exact.to(torch.bfloat16))
    low_precision = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    assert not torch.equal(low_precision, exact.to(torch.bfloat16))


@torch.no_grad()
def test_initial_weights_have_the_configured_spread():
    model = tiny(d_model=64, init_std=0.07)
    assert model.model.transformer.blocks[0].q_proj.weight.std().item() == pytest.approx(0.07, rel=0.1)
    assert (model.model.transformer.ln_f.weight == 1).all()


def test_a_published_configuration_is_read_and_written(tmp_path):
    published = {"model_type": "llada", "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32}
    published |= {"mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "rope_theta": 500000.0}
    published |= {"block_type": "llama", "alibi": False, "multi_query_attention": None, "precision": "amp_bf16"}
    published |= {"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}, "architectures": ["LLaDAModelLM"]}
    (tmp_path / "config.json").write_text(json.dumps(published))
    adapter = policy_adapter(tmp_path)
    assert (adapter.mask_token_id, adapter.eos_token_id, adapter.pad_token_id) == (126336, 126081, 126081)
    config = LLaDAConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (4096, 32, False)
    assert json.loads(config.to_json_string(use_diff=False))["block_type"] == "llama"


def test_a_switch_that_is_not_implemented_is_refused():
    with pytest.raises(ConfigError, match="alibi=True"):
        LLaDAConfig(alibi=True)
    with pytest.raises(ConfigError, match="n_heads=5"):
        LLaDAConfig(d_model=32, n_heads=5)


def test_adapter_names_the_seven_maps_and_not_the_head(tmp_path):
    import re

    model = tiny()
    model.save_pretrained(tmp_path)
    adapter = policy_adapter(tmp_path)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    matched = {name for name in linear if re.fullmatch(adapter.lora_regex, name)}
    assert matched == {f"model.transformer.blocks.{i}.{part}" for i in range(2) for part in BLOCK_MAPS}
    assert linear - matched == {adapter.head_name}


def test_unknown_families_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no model at"):
        policy_adapter(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no model at .*: there is no config.json"):
        policy_adapter(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2'.*Dream.*llada"):
        policy_adapter(tmp_path)
