"""Bases stored in 4 and 8 bits: which maps, how many bytes, what they compute, and that learning on them is learning.

Everything is compared with a plain model that holds the expanded weights.
"""

import dataclasses
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learner.export import export_merged
from learner.main import main
from learner.ranks.group import LearnerGroup
from learner.ranks.rank import lora_spec
from learner.runs.start import check_quantization
from learner.settings.run import load_config
from rewards.errors import ConfigError
from rollout.adapters import adapter_parameters, digest, load_state, pack, write_peft_folder
from rollout.engines.torch import TorchEngine
from rollout.models.family import policy_adapter
from rollout.models.few_bits import BYTES_PER_PARAMETER
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.quantization import exact_products, require_bitsandbytes
from tests.learner.test_scorer import rollout, worst_difference
from tests.support.hand_made import acting_adapter
from tests.support.learner_ranks import importing_ray, put, settings
from tests.support.small_masked_lms import write_masked_lm

try:
    bitsandbytes = require_bitsandbytes("nf4", "cpu")
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

KINDS = sorted(BYTES_PER_PARAMETER)
LORA = LoraSpec(r=4, alpha=8.0)


@pytest.fixture(scope="module", params=["llada", "bert"])
def base(request, tiny_model, tmp_path_factory) -> str:
    if request.param == "llada":
        return tiny_model
    folder = tmp_path_factory.mktemp(request.param)
    write_masked_lm(folder, request.param)
    return str(folder)


def expanded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The quantized maps' weights by module name, by bitsandbytes' own expansion."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            found[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            found[name] = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


def plain_twin(base: str, quantized: torch.nn.Module, dtype: str = "float32") -> torch.nn.Module:
    """The base in full, with the weights that the quantized one stands for."""
    twin = load_model(base, dtype)
    with torch.no_grad():
        for name, weight in expanded(quantized).items():
            twin.get_submodule(name).weight.copy_(weight)
    return twin


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(7, 60, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exactly_the_blocks_linear_maps_are_quantized(base, kind, dtype):
    model, whole = load_model(base, dtype, quantization=kind), load_model(base, dtype)
    linear = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name in linear if re.fullmatch(policy_adapter(base).lora_regex, name)}
    assert set(expanded(model)) == wanted and wanted < linear
    for name, parameter in model.named_parameters():
        stored = name.removesuffix(".weight") in wanted
        assert parameter.dtype == (
            getattr(torch, dtype) if not stored else torch.uint8 if kind == "nf4" else torch.int8
        )
        if not stored:
            assert torch.equal(parameter, whole.get_parameter(name))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_expanded_weights(base, kind):
    model, ids = load_model(base, quantization=kind), random_ids(3, 12)
    mask = torch.tensor([[1] * 12, [0] * 4 + [1] * 8, [1] * 12])
    twin, whole = plain_twin(base, model), load_model(base)
    logits = model(ids, mask).logits[mask.bool()]
    torch.testing.assert_close(logits, twin(ids, mask).logits[mask.bool()], atol=1e-5, rtol=0)
    assert (logits - whole(ids, mask).logits[mask.bool()]).abs().max() > 1e-4, "control: quantization rounds"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_other_rows_change_no_logit(base, kind):
    model, ids = load_model(base, quantization=kind), random_ids(4, 12)
    logits = model(ids).logits
    torch.testing.assert_close(model.train()(ids).logits, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.eval()(ids[2:3]).logits, logits[2:3], atol=1e-5, rtol=0)


@torch.no_grad()
def test_bitsandbytes_own_products_would_not_do(tiny_model):
    """Control of the two tests above: what ``exact_products`` replaces rounds activations, outside of training only."""
    layer = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict({"weight": load_model(tiny_model).model.transformer.blocks[0].ff_proj.weight[:48]})
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layer = layer.to("cpu").eval()
    own = layer(x)
    layer.weight.SCB = layer.state.SCB
    exact = exact_products(torch.nn.Sequential(layer))(x)
    weight = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    torch.testing.assert_close(exact, x @ weight.T, atol=1e-6, rtol=1e-5)
    assert (own - exact).abs().max() > 1e-4


class Operations(TorchDispatchMode):
    """Names of what torch is asked for, and the dtypes of results of a size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names, self.large = size, Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names[func.name().partition(".")[0]] += 1
        if isinstance(out, torch.Tensor) and out.numel() == self.size and not func.is_view:
            self.large.append(func.name())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_expanded_in_one_piece_and_multiplied_by_torch(tiny_model, kind):
    """bitsandbytes' own 4-bit product picks a kernel by the number of rows, and by whether a gradient is wanted."""
    own = bitsandbytes.nn.LinearNF4(64, 48, bias=False, compute_dtype=torch.float32)
    layer = own if kind == "nf4" else bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": load_model(tiny_model).model.transformer.blocks[0].ff_proj.weight[:48]})
    layer = layer.to("cpu")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    if kind == "nf4":
        with Operations(48 * 64) as theirs:
            layer(x.detach())
        assert theirs.names["bitsandbytes::gemm_4bit"] == 1, "control"
    exact = exact_products(torch.nn.Sequential(layer))
    with Operations(48 * 64) as ours:
        exact.eval()(x[:1].detach())
        exact.train()(x).sum().backward()
    assert not [name for name in ours.names if "gemm" in name or "gemv" in name]
    assert ours.large == ["bitsandbytes::dequantize_4bit" if kind == "nf4" else "aten::mul.Tensor"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_per_parameter(kind, tmp_path):
    """What learner.plan counts with, at a size where a map's fixed costs (256 and 16 numbers) don't show."""
    from rollout.models.llada import LLaDAConfig, LLaDAModelLM
    from rollout.models.tokenizer import build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    sizes = dict(d_model=512, n_layers=1, n_heads=4, mlp_hidden_size=1024, vocab_size=160)
    LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=1, eos_token_id=0, pad_token_id=0)).save_pretrained(tmp_path)
    module = load_model(tmp_path, quantization=kind).model.transformer.blocks[0].ff_proj
    tensors = [module.weight.data]
    if kind == "nf4":
        state = module.weight.quant_state
        tensors += [state.absmax, state.state2.absmax]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert nbytes / (512 * 1024) == pytest.approx(BYTES_PER_PARAMETER[kind], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_expanded_weights(base, kind, checkpointing):
    quantized = load_model(base, quantization=kind)
    twin, family, gradients = plain_twin(base, quantized), policy_adapter(base), []
    for model in (quantized, twin, load_model(base)):
        adapted = attach_lora(model, family, LORA).train()
        load_state(adapted, acting_adapter(adapted))
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted(input_ids=random_ids(2, 10), logit_rows=torch.tensor([3, 14])).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter_parameters(adapted).values()]))
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    ours, expected, whole = gradients
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert (ours - whole).norm() > 1e-3 * whole.norm(), "control: the unquantized base's"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_is_the_one_of_an_unquantized_base(base, kind, dtype):
    family = policy_adapter(base)
    quantized = pack(adapter_parameters(attach_lora(load_model(base, dtype, quantization=kind), family, LORA)))
    whole = pack(adapter_parameters(attach_lora(load_model(base, dtype), family, LORA)))
    assert digest(quantized) == digest(whole)
    assert {packed.dtype for packed in quantized.values()} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_replay_parity(base, kind):
    engine = TorchEngine(model_path=base, lora=LORA, max_rows=4, threads=1, quantization=kind)
    assert engine.describe()["quantization"] == kind and engine.describe()["dtype"] == "float32"
    adapter = acting_adapter(engine.model)
    engine.load_adapter(3, adapter, digest(adapter))
    groups = rollout(engine, "random", top_k=20, top_p=0.95)
    differences = []
    for quantization in (kind, None):
        learner = attach_lora(load_model(base, quantization=quantization), engine.family, LORA).train()
        load_state(learner, adapter)
        differences.append(worst_difference(learner, groups, engine.family))
    print(f"{kind}: largest |difference| {differences[0]:.1e}, against the unquantized base {differences[1]:.1e}")
    assert differences[0] <= 1e-5
    assert differences[1] > 1e-4, "control: the unquantized base is another policy"


def test_a_quantized_base_without_adapter_can_be_sampled(tiny_model):
    for kind in KINDS:
        engine = TorchEngine(model_path=tiny_model, lora=None, max_rows=4, threads=1, quantization=kind)
        assert len(rollout(engine, "random")) == 3


@torch.no_grad()
def test_an_adapter_learned_on_four_bits_is_merged_into_the_whole_base(base, tmp_path):
    model = attach_lora(load_model(base, quantization="nf4"), policy_adapter(base), LORA)
    adapter = acting_adapter(model)
    peft_config = model.peft_config["default"].to_dict()
    peft_config = {name: sorted(value) if isinstance(value, set) else value for name, value in peft_config.items()}
    (tmp_path / "adapter").mkdir()
    write_peft_folder(tmp_path / "adapter", adapter, peft_config)
    export_merged(tmp_path / "adapter", tmp_path / "merged", base)
    whole = attach_lora(load_model(base), policy_adapter(base), LORA)
    load_state(whole, adapter)
    merged, ids = load_model(tmp_path / "merged"), random_ids(2, 9)
    torch.testing.assert_close(merged(ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()


# ---- what is refused


def test_zero_stage_3_is_refused():
    with pytest.raises(ConfigError, match=r"model.quantization=nf4 can't be combined with learner.zero_stage=3"):
        load_config(["recipe=sudoku", "model.quantization=nf4", "learner.zero_stage=3"])
    config = load_config(["recipe=sudoku", "model.quantization=nf4", "learner.zero_stage=2"])
    assert config.model.quantization == "nf4"
    check_quantization(config.model, config.learner, config.resources)


def test_a_device_that_cannot_do_it_is_refused():
    with pytest.raises(ConfigError, match="bitsandbytes .* works on cpu, cuda.*, not on meta"):
        require_bitsandbytes("nf4", "meta")


def test_a_missing_package_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    class Missing:
        def find_spec(name, path=None, target=None):
            if name == "bitsandbytes":
                raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    assert main(["recipe=smoke", "model.quantization=nf4", f"run.dir={tmp_path}"]) == 2
    assert "needs the package bitsandbytes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PLAIN_THEN_QUANTIZED = """
import sys
from rollout.process import prepare_process
prepare_process()
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
base = sys.argv[1]
for kind in (None, "nf4", "int8"):
    model = attach_lora(load_model(base, quantization=kind), policy_adapter(base), LoraSpec(r=4, alpha=8.0))
    maps = {type(module.base_layer).__name__ for module in model.modules() if hasattr(module, "lora_A")}
    print(kind, *maps, "bitsandbytes.nn" in sys.modules)
"""


@pytest.mark.slow
def test_a_process_imports_bitsandbytes_for_a_quantized_base_only(tiny_model):
    request = [sys.executable, "-c", PLAIN_THEN_QUANTIZED, tiny_model]
    done = subprocess.run(request, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[:3] == ["None Linear False", "nf4 Linear4bit True", "int8 Linear8bitLt True"], done


@pytest.mark.slow
@pytest.mark.heavy
def test_learner_ranks_learn_on_a_quantized_base(tiny_model):
    with importing_ray(cpus=2):
        for kind, ranks, stage, dtype, checkpointing in (
            ("int8", 1, 0, "float32", False),
            ("nf4", 2, 2, "float32", False),
            ("nf4", 1, 1, "bfloat16", True),  # as on one GPU of 24 GB
        ):
            layout = dict(learner__ranks=ranks, learner__zero_stage=stage, learner__dtype=dtype)
            layout |= dict(learner__activation_checkpointing=str(checkpointing).lower())
            config = settings(**layout, model__quantization=kind)
            group = LearnerGroup(config, tiny_model, adapter=None, shards=None)
            published = group.publish()
            engine = TorchEngine(
                model_path=tiny_model, lora=lora_spec(config), max_rows=8, threads=1, dtype=dtype, quantization=kind
            )
            engine.load_adapter(0, published.state, published.digest)
            report = group.update(put(_rewarded(rollout(engine, "random"))), 0, 1e-3)
            assert report.applied and report.grad_norm > 0
            worst = report.statistics.maxima["log_ratio/abs_max"]
            print(f"{kind}, {ranks} ranks, ZeRO {stage}, {dtype}: un-updated log ratio {worst:.1e}")
            assert worst <= (1e-5 if dtype == "float32" else 0.02)
            after = group.publish()
            assert after.digest != published.digest
            engine.load_adapter(1, after.state, after.digest)
            group.close()


def _rewarded(groups):
    rng = np.random.default_rng(0)
    return [
        dataclasses.replace(group, rewards=rng.random((group.size, 1)).astype(np.float32), reward_names=("right",))
        for group in groups
    ]
