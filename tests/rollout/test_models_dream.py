"""Dream against transformers' own Qwen2 made bidirectional, in fp32 and in bfloat16; its shifted logits in engine and
scorer; its tokenizer without foreign code."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2Config, Qwen2ForCausalLM

from learner.export import export_merged
from rewards.errors import ConfigError
from rewards.task import Problem
from rollout.adapters import adapter_parameters, digest, load_state, pack, write_peft_folder
from rollout.engines.torch import TorchEngine
from rollout.models.dream import DreamConfig, DreamModel
from rollout.models.encoding import encode_prompt, load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.trajectory import GroupSpec, SamplerSpec
from tests.learner.test_scorer import rollout, worst_difference
from tests.support.hand_made import acting_adapter
from tests.support.published import write_published

LORA = LoraSpec(r=4, alpha=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dream")
    write_published(path, "dream")
    return path


def qwen2(folder: Path, dtype: str = "float32", *, causal: bool = False) -> Qwen2ForCausalLM:
    """transformers' class on the same files; it has no switch of its own for attention in both directions."""
    raw = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in raw.items() if name not in ("auto_map", "model_type", "architectures")}
    config = Qwen2Config(**kept)
    config.is_causal = causal
    model, loading = Qwen2ForCausalLM.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    assert not any(loading.values()), loading
    for layer in model.model.layers:
        layer.self_attn.is_causal = causal
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(20, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_qwen2_seeing_both_ways(folder):
    model, ids = load_model(folder), random_ids(2, 40)
    torch.testing.assert_close(model(ids).logits, qwen2(folder)(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    causal = qwen2(folder, causal=True)(ids, use_cache=False).logits
    assert (model(ids).logits - causal).abs().max() > 0.1  # control: the order of a left-to-right model
    mask = torch.ones(2, 40).long()
    mask[0, :7] = 0
    expected = qwen2(folder)(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(model(ids, mask).logits[0, 7:], expected[0, 7:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_rounds_where_qwen2_rounds(folder):
    ids = random_ids(2, 40)
    ours, theirs = load_model(folder, "bfloat16")(ids).logits, qwen2(folder, "bfloat16")(ids, use_cache=False).logits
    assert ours.dtype == torch.float32, "theirs are rounded after the last product too"
    torch.testing.assert_close(ours.bfloat16(), theirs, atol=0, rtol=2**-7)  # one step, where a sum lies at an edge
    assert (ours.bfloat16() == theirs).float().mean() > 0.98
    assert not torch.allclose(ours, load_model(folder)(ids).logits, atol=1e-3)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """An adapter folder as a run writes it, and its logits."""
    model = attach_lora(load_model(folder), policy_adapter(folder), LORA)
    load_state(model, acting_adapter(model))
    path = tmp_path_factory.mktemp("adapter")
    config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": str(folder)}
    write_peft_folder(
        path,
        pack(adapter_parameters(model)),
        {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()},
    )
    with torch.no_grad():
        return path, model(input_ids=random_ids(2, 12)).logits


@torch.no_grad()
def test_plain_transformers_and_peft_give_the_adapters_logits(trained, folder, tmp_path):
    adapter, expected = trained
    ids = random_ids(2, 12)
    by_peft = PeftModel.from_pretrained(qwen2(folder), adapter)
    torch.testing.assert_close(by_peft(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    export_merged(adapter, tmp_path / "out")
    merged = qwen2(tmp_path / "out")
    torch.testing.assert_close(merged(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    assert (qwen2(folder)(ids, use_cache=False).logits - expected).abs().max() > 0.01  # control: without the adapter


# ---- shifted logits


@pytest.fixture(scope="module")
def engine(folder) -> TorchEngine:
    engine = TorchEngine(model_path=str(folder), lora=LORA, max_rows=5, threads=1)
    state = acting_adapter(engine.model)
    engine.load_adapter(3, state, digest(state))
    return engine


@pytest.mark.parametrize("rule", ["random", "low_confidence"])
def test_replay_parity_with_shifted_logits(engine, folder, rule):
    learner = attach_lora(load_model(folder), policy_adapter(folder), LORA)
    load_state(learner, pack(adapter_parameters(engine.model)))
    groups = rollout(engine, rule, top_k=20)
    assert engine.family.logit_shift == 1
    parity = worst_difference(learner, groups, engine.family)
    print(f"{rule}: largest |difference| {parity:.1e}")
    assert parity <= 1e-5
    for wrong in (0, 2):
        shifted = dataclasses.replace(engine.family, logit_shift=wrong)
        assert worst_difference(learner, groups, shifted) > 0.1, "control: another row's logits"


def test_a_token_is_drawn_by_the_logits_before_it(engine, folder):
    """The first completion token's log-prob from the plain model's logits at the prompt's last position."""
    (group, *_) = rollout(engine, "left_to_right")
    policy = engine.family
    learner = attach_lora(load_model(folder), policy, LORA)
    load_state(learner, pack(adapter_parameters(engine.model)))
    prompt, length = torch.from_numpy(group.prompt_ids).long(), group.completion_ids.shape[1]
    ids = torch.cat([prompt, torch.full((length,), policy.mask_token_id)])[None]
    with torch.no_grad():
        logits = learner(input_ids=ids).logits[0, len(prompt) - 1].clone()
    logits[policy.mask_token_id] = -torch.inf
    first = int(group.completion_ids[0, 0])
    assert group.unmask_step[0, 0] == 0
    assert float((logits / 0.7).log_softmax(0)[first]) == pytest.approx(float(group.logp[0, 0]), abs=1e-4)


def test_a_completion_without_a_prompt_is_refused(engine):
    with pytest.raises(ConfigError, match="a completion here has none before it"):
        engine.generate([GroupSpec(0, Problem("0", {}), 1, 0)], [[]], SamplerSpec(4, 4, 2, "random", 1.0))


# ---- tokenizer and config


def test_the_tokenizer_reads_the_published_files(folder):
    tokenizer = load_tokenizer(folder)
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (first, first, first + 4)
    for text in ("Hello world, 12 + 30 = 42\n\n", "  naïve – \\boxed{1,234}\t日本\n \n", "<think>a</think> it's"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < first
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9"), "NFC, as the published tokenizer normalises"
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("1234")]
    assert digits == list("1234"), "a digit at a time, as Qwen2 splits"
    assert tokenizer.encode("<|mask|>") == [first + 4]
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(prompt) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_other_foreign_tokenizers_are_refused_without_a_question(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["my_code.MyTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "my_code.py").write_text("raise AssertionError('foreign code was run')\n")
    with pytest.raises(ConfigError, match="no tokenizer at") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_published_sizes_and_ids_are_the_defaults():
    config = DreamConfig()
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (151666, 151643, 151643)
    with torch.device("meta"):
        model = DreamModel(config)
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling="),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        DreamConfig(**changes)
