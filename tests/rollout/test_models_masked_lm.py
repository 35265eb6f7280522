"""Masked LMs of transformers as policies: the published weights and names, the same logits, no pad seen, no dropout."""

import functools
import json
import re

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.export import export_merged
from learner.supply.problems import fitting
from rewards.errors import ConfigError
from rewards.task import Problem, get_task
from rollout.adapters import adapter_parameters, digest, load_state, pack, write_peft_folder
from rollout.engines.torch import TorchEngine
from rollout.models import masked_lm
from rollout.models.encoding import encode_prompt, load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from tests.learner.test_scorer import rollout, worst_difference
from tests.support.hand_made import acting_adapter
from tests.support.small_masked_lms import (
    CLS,
    LIKE_ROBERTA,
    LONGEST,
    MASK,
    PAD,
    SEP,
    SIZES,
    masked_tokenizer,
    write_masked_lm,
)

LORA = LoraSpec(r=4, alpha=8.0)
MAPS_PER_LAYER = {"modernbert": 4, "eurobert": 7}  # the others: query, key, value, output, and the MLP's two


DISTINCT = sorted(set(masked_lm.ARCHITECTURES) - {"camembert", "xlm-roberta"})  # RoBERTa under other names


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a checkpoint of this model type once: (model type, folder, the model that transformers wrote there)."""

    @functools.cache
    def write(model_type):
        folder = tmp_path_factory.mktemp(model_type)
        return model_type, folder, write_masked_lm(folder, model_type)

    return write


@pytest.fixture(params=DISTINCT)
def checkpoint(request, written):
    return written(request.param)


@pytest.fixture(params=sorted(masked_lm.ARCHITECTURES))
def any_checkpoint(request, written):
    return written(request.param)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_every_family_is_tested():
    assert set(SIZES) == set(masked_lm.ARCHITECTURES)


@torch.no_grad()
def test_a_published_checkpoint_loads_whole_and_gives_transformers_logits(any_checkpoint):
    model_type, folder, original = any_checkpoint
    family = policy_adapter(folder)
    _, loading = family.model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    model, ids = load_model(folder), random_ids(2, 30)
    assert not model.training and list(model.state_dict()) == list(original.state_dict())
    torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=1e-5, rtol=0)
    mask = torch.ones(2, 30).long()
    mask[1, 22:] = 0  # padded on the right, as these models are used elsewhere
    real = mask.bool()
    theirs = original(ids.where(real, torch.tensor(PAD)), attention_mask=mask).logits
    torch.testing.assert_close(model(ids, mask).logits[real], theirs[real], atol=1e-5, rtol=0)
    assert (original(ids).logits[1, :22] - theirs[1, :22]).abs().max() > 1e-2  # control: the mask matters
    assert family.family == model_type and type(model).__name__ == type(original).__name__


@torch.no_grad()
def test_bfloat16_logits_are_transformers(checkpoint):
    _, folder, _ = checkpoint
    ids = random_ids(2, 20)
    logits = load_model(folder, "bfloat16")(ids).logits
    theirs = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")(ids).logits
    assert logits.dtype == torch.float32, "theirs are rounded after the last product too"
    torch.testing.assert_close(logits.bfloat16(), theirs, atol=0, rtol=2**-7)  # one step, where a sum lies at an edge
    assert (logits.bfloat16() == theirs).float().mean() > 0.98


@torch.no_grad()
def test_logit_rows_are_rows_of_the_full_logits_and_the_head_sees_no_others(checkpoint):
    _, folder, _ = checkpoint
    model, ids, rows, seen = load_model(folder), random_ids(3, 9), torch.tensor([26, 0, 10, 10, 7]), []
    full = model(ids).logits.flatten(0, 1)
    model.get_submodule(policy_adapter(folder).head_name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[:-1])
    )
    torch.testing.assert_close(model(ids, logit_rows=rows).logits, full[rows], atol=1e-5, rtol=0)
    assert not torch.allclose(model(ids, logit_rows=rows.flip(0)).logits, full[rows])
    assert seen == [(5,), (5,)]


@torch.no_grad()
def test_left_pads_are_not_seen_and_shift_no_position(checkpoint):
    model_type, folder, original = checkpoint
    model, ids = load_model(folder), random_ids(2, 24)
    padded = torch.cat([random_ids(2, 7, seed=1), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 7), torch.ones(2, 24)], dim=1).long()
    expected = model(ids).logits
    torch.testing.assert_close(model(padded, mask).logits[:, 7:], expected, atol=1e-5, rtol=0)
    assert (model(padded).logits[:, 7:] - expected).abs().max() > 0.1, "control: pads seen"
    shift = (original(padded, attention_mask=mask).logits[:, 7:] - expected).abs().max()
    absolute = masked_lm.ARCHITECTURES[model_type].positions != "relative"
    assert (shift > 0.1) == absolute, "control: transformers' class counts absolute positions from the first pad"


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(checkpoint):
    _, folder, _ = checkpoint
    model, first, second = load_model(folder), random_ids(1, 14), random_ids(1, 11, seed=2)
    packed = torch.cat([torch.full((1, 3), PAD), first, second], dim=1)
    numbers = torch.tensor([[0] * 3 + [1] * 14 + [2] * 11])
    logits = model(packed, numbers).logits
    torch.testing.assert_close(logits[:, 3:17], model(first).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[:, 17:], model(second).logits, atol=1e-5, rtol=0)
    together = model(packed, (numbers > 0).long()).logits
    assert (together[:, 3:17] - logits[:, 3:17]).abs().max() > 0.05, "control: one sequence"


@torch.no_grad()
def test_a_packed_row_may_be_longer_than_a_sequence(checkpoint):
    """Two sequences, each as long as the positions allow, and twice as many pads."""
    _, folder, _ = checkpoint
    length = policy_adapter(folder).max_length
    model, ids = load_model(folder), random_ids(1, 4 * length)
    numbers = torch.arange(1, 5).repeat_interleave(length).where(torch.arange(4 * length) < 2 * length, 0)[None]
    last = slice(length, 2 * length)
    torch.testing.assert_close(model(ids, numbers).logits[:, last], model(ids[:, last]).logits, atol=1e-5, rtol=0)


def test_a_row_of_pads_only_gives_finite_logits_and_gradients(checkpoint):
    _, folder, _ = checkpoint
    model, ids = load_model(folder).train(), random_ids(2, 20)
    mask = torch.tensor([[1], [0]]).expand(2, 20)
    logits = model(ids, mask).logits
    assert logits.isfinite().all()
    logits[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("checkpoint", ["roberta"], indirect=True)
def test_a_pad_token_that_the_policy_wrote_is_a_token(checkpoint):
    _, folder, original = checkpoint
    model, ids = load_model(folder), random_ids(1, 12)
    ids[0, 4] = PAD
    counted = torch.arange(PAD + 1, PAD + 13)[None]
    expected = original(ids, position_ids=counted).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    assert (original(ids).logits - expected).abs().max() > 0.1, "control: RoBERTa takes it for a pad"


def test_training_drops_nothing_out_and_only_layers_train(checkpoint):
    _, folder, original = checkpoint
    model, ids = load_model(folder), random_ids(2, 12)
    expected = model(ids).logits
    assert torch.equal(model.train()(ids).logits, expected)
    training = [module for module in model.modules() if module.training and module is not model]
    assert len(training) == 3 and all(isinstance(module, GradientCheckpointingLayer) for module in training)
    assert not any(module.training for module in model.eval().modules())
    dropped = original.train()(ids).logits
    original.eval()
    assert (dropped - expected).abs().max() > 1e-3, "control: transformers' class drops out"


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient(checkpoint):
    _, folder, _ = checkpoint
    gradients, forwards = [], []
    for checkpointing in (False, True):
        model = attach_lora(load_model(folder), policy_adapter(folder), LORA)
        load_state(model, acting_adapter(model))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls: list[int] = []
        first = next(m for m in model.train().modules() if isinstance(m, GradientCheckpointingLayer))
        first_map = next(m for m in first.modules() if isinstance(m, LoraLayer))
        first_map.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=random_ids(2, 8), logit_rows=torch.tensor([3, 9])).logits.square().sum().backward()
        gradients.append([p.grad for p in adapter_parameters(model).values()])
        forwards.append(len(calls))
    assert forwards == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)


def test_lora_names_are_the_linear_maps_of_the_layers(any_checkpoint):
    model_type, folder, _ = any_checkpoint
    model, family = load_model(folder), policy_adapter(folder)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = [name + "." for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {name for name in linear if name.startswith(tuple(layers))}
    assert {name for name in linear if re.fullmatch(family.lora_regex, name)} == inside
    assert len(inside) == 3 * MAPS_PER_LAYER.get(model_type, 6)
    assert family.head_name in linear - inside
    adapted = {name.split(".lora_")[0] for name in adapter_parameters(attach_lora(model, family, LORA))}
    assert adapted == inside


@torch.no_grad()
def test_adapter_and_merged_model_go_back_to_plain_transformers_and_peft(checkpoint, tmp_path):
    _, folder, original = checkpoint
    model, ids = attach_lora(load_model(folder), policy_adapter(folder), LORA), random_ids(2, 16)
    load_state(model, acting_adapter(model, scale=0.2))
    logits = model(input_ids=ids).logits
    assert (logits - original(ids).logits).abs().max() > 0.05  # control: the adapter does something
    peft_config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config["default"].to_dict().items()
    }
    (adapter := tmp_path / "adapter").mkdir()
    write_peft_folder(adapter, pack(adapter_parameters(model)), peft_config)
    plain = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="sdpa")
    torch.testing.assert_close(PeftModel.from_pretrained(plain, adapter)(input_ids=ids).logits, logits)
    export_merged(adapter, tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=0)
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "merged"))
    assert before == after
    assert policy_adapter(tmp_path / "merged") == policy_adapter(folder)


@pytest.mark.parametrize(
    ("checkpoint", "rule"),
    [("modernbert", "random"), ("bert", "low_confidence"), ("roberta", "random")],
    indirect=["checkpoint"],
)
def test_replay_parity(checkpoint, rule):
    _, folder, original = checkpoint
    engine = TorchEngine(model_path=str(folder), lora=LORA, max_rows=4, threads=1)
    adapter = acting_adapter(engine.model)
    engine.load_adapter(3, adapter, digest(adapter))
    groups = rollout(engine, rule, top_k=20, top_p=0.95)
    learner = attach_lora(load_model(folder), engine.family, LORA).train()
    assert worst_difference(learner, groups, engine.family) > 1e-2, "control: the base instead of the adapter"
    load_state(learner, adapter)
    parity = worst_difference(learner, groups, engine.family)
    print(f"largest |difference| {parity:.1e}")
    assert parity <= 1e-5


# ---- tokenizers, and what is refused


def test_without_a_chat_template_the_prompt_is_the_first_text_of_a_pair(checkpoint):
    model_type, folder, _ = checkpoint
    tokenizer, family = load_tokenizer(folder), policy_adapter(folder)
    assert tokenizer.chat_template is None
    ids = encode_prompt(tokenizer, [{"role": "system", "content": "ab "}, {"role": "user", "content": "c d"}])
    between = [SEP, SEP] if model_type in LIKE_ROBERTA else [SEP]
    assert ids == [CLS, *tokenizer.convert_tokens_to_ids(list("ab\n\nc d")), *between]
    assert (family.mask_token_id, family.eos_token_id, family.pad_token_id) == (MASK, SEP, PAD)
    assert tokenizer.decode([*ids, MASK, SEP, PAD], skip_special_tokens=True) == "ab\n\nc d"


def test_a_special_token_written_out_in_a_prompt_is_text():
    tokenizer = masked_tokenizer("bert")
    assert encode_prompt(tokenizer, [{"role": "user", "content": "[MASK]"}]).count(MASK) == 0
    assert tokenizer("[MASK]")["input_ids"].count(MASK) == 1  # control


def test_a_tokenizer_that_marks_nothing_writes_the_text_alone():
    tokenizer = masked_tokenizer("bert", sep_token=None)
    tokenizer.backend_tokenizer.post_processor = None
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "ab"}])
    assert tokenizer.decode(ids) == "ab"


@pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)
def test_tokenizers_without_what_a_policy_needs_are_refused(checkpoint, tmp_path):
    _, folder, _ = checkpoint
    config = json.loads((folder / "config.json").read_text())
    for without, message in (({"mask_token": None}, "no mask token"), ({"sep_token": None}, "no EOS or separator")):
        masked_tokenizer("bert", **without).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=message):
            policy_adapter(tmp_path)
    masked_tokenizer("bert").save_pretrained(tmp_path)
    policy_adapter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": MASK}))
    with pytest.raises(ConfigError, match="mask token at 4, beyond the model's vocabulary of 4"):
        policy_adapter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    with pytest.raises(ConfigError, match="is_decoder"):
        policy_adapter(tmp_path)


@pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)
def test_a_checkpoint_without_its_head_is_refused(checkpoint, tmp_path):
    """What a download of an encoder or a discriminator is: transformers would make the head up."""
    _, folder, _ = checkpoint
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("cls.")}, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConfigError, match=r"weights of a bert model.*lacks: cls\.predictions"):
        load_model(tmp_path)


def test_other_masked_lms_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    with pytest.raises(ConfigError, match=r"'deberta-v2'; the known families are: .*bert.*modernbert"):
        policy_adapter(tmp_path)


@torch.no_grad()
def test_the_longest_sequence_is_what_the_positions_hold(any_checkpoint):
    model_type, folder, _ = any_checkpoint
    longest = policy_adapter(folder).max_length
    assert longest == (LONGEST - PAD - 1 if model_type in LIKE_ROBERTA else LONGEST)
    model = load_model(folder)
    assert model(random_ids(1, longest)).logits.isfinite().all()
    if masked_lm.ARCHITECTURES[model_type].positions != "relative":
        with pytest.raises((IndexError, RuntimeError), match="index out of range|out of bounds"):  # control: one more
            model(random_ids(1, longest + 1))


def test_prompts_that_leave_no_room_are_refused_before_the_start():
    task, tokenizer = get_task("countdown"), masked_tokenizer("bert")
    problems = [
        Problem("short", {"numbers": [3, 5], "target": 8}),
        Problem("long", {"numbers": [10] * 9, "target": 90}),
    ]
    short, long = (len(encode_prompt(tokenizer, task.messages(problem.fields))) for problem in problems)
    assert long > short
    fitting(problems, task, tokenizer, completion_length=LONGEST - long, longest=LONGEST)
    with pytest.raises(ConfigError, match=f"problem long has {long} tokens.*completion_length={LONGEST - long + 1}"):
        fitting(problems, task, tokenizer, completion_length=LONGEST - long + 1, longest=LONGEST)
    fitting(problems, task, tokenizer, completion_length=1000, longest=None)
