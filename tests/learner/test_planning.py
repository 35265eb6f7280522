"""``learner.plan``: sizes and parameter counts are exact, memory follows what autograd saves, and what can't fit is
refused. The measured comparison is at the end."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from learner import plan
from learner.bench import planned
from learner.bench.planned_cases import CASES, SMALL
from learner.bench.policy import Shape, build_policy
from learner.main import main as learner_main
from learner.planning import activations, hardware, memory, scored, shapes
from learner.planning.activations import Trunk
from learner.planning.check import check_memory
from learner.planning.compute import branched_positions, work_of
from learner.planning.fit import plan_run
from learner.planning.hardware import Hardware
from learner.planning.memory import GIB, actor_memory, rank_memory, trajectory_bytes
from learner.planning.prompts import prompt_tokens
from learner.settings.arguments import recipe_names
from learner.settings.run import load_config
from rewards.errors import ConfigError
from rewards.tasks.sudoku import Sudoku
from rollout.models import masked_lm
from rollout.models.dream import DreamConfig, DreamModel
from rollout.models.few_bits import BYTES_PER_PARAMETER
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from rollout.models.lora import LoraSpec, attach_lora

LLADA = {"d_model": 64, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 96, "vocab_size": 97}
DECODER = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
DREAM = {**DECODER, "num_key_value_heads": 2, "intermediate_size": 96}
MOE = {**DECODER, "num_key_value_heads": 4, "expert_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}
ENCODER = {**DECODER, "intermediate_size": 96, "max_position_embeddings": 64}
AGRPO = (
    "model.path=GSAI-ML/LLaDA-8B-Instruct",
    "lora.r=64",
    "rollout.sampler.completion_length=384",
    "rollout.sampler.block_length=12",
    "rollout.sampler.steps=128",
    "rollout.sampler.top_k=150",
    "objective.k=24",
    "learner.dtype=bfloat16",
    "learner.zero_stage=2",
)


def published(family: str) -> tuple[dict[str, Any], torch.nn.Module]:
    """A small config.json of this family, and its model on the meta device."""
    specials = {"mask_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    with torch.device("meta"):
        if family.startswith("llada"):
            tied = {"weight_tying": True} if family == "llada, tied" else {}
            grouped = {"n_kv_heads": 2, "embedding_size": 128} if family == "llada, grouped" else {}
            config: Any = LLaDAConfig(**LLADA, **tied, **grouped, **specials)
            return config.to_dict(), LLaDAModelLM(config)
        if family == "dream":
            config = DreamConfig(**DREAM, **specials)
            return config.to_dict(), DreamModel(config)
        if family == "moe":
            config = LLaDAMoEConfig(**MOE, **specials)
            return config.to_dict(), LLaDAMoEModelLM(config)
        model_class = masked_lm.model_class(family)
        narrow = {"embedding_size": 24} if family == "albert" else {}
        config = model_class.config_class(**ENCODER, **narrow, pad_token_id=3)
        return config.to_dict(), model_class(config)


@pytest.mark.parametrize(
    "family", ["llada", "llada, tied", "llada, grouped", "dream", "moe", "modernbert", "bert", "roberta", "albert"]
)
def test_parameter_counts_are_exact(family: str) -> None:
    raw, model = published(family)
    counted = shapes.shape_from(raw)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    more = {"own_weights": 2} if family == "albert" else {"layers": counted.layers + 1, "own_weights": None}
    assert dataclasses.replace(counted, **more).parameters != counted.parameters


@pytest.mark.parametrize("family", ["llada", "llada, grouped", "dream", "moe"])
@pytest.mark.parametrize("include_head", [False, True])
def test_adapters_are_counted_as_peft_makes_them(family: str, include_head: bool, tmp_path: Any) -> None:
    raw, model = published(family)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    from rollout.models.family import policy_adapter

    policy = attach_lora(model, policy_adapter(tmp_path), LoraSpec(r=4, alpha=4.0, include_head=include_head))
    made = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert made == shapes.shape_from(raw).adapter_parameters(4, include_head=include_head)


def test_published_models_have_their_published_sizes() -> None:
    count = {name: shapes.shape_from(raw).parameters for name, raw in shapes.PUBLISHED.items() if "BERT" not in name}
    assert count["GSAI-ML/LLaDA-8B-Instruct"] == 8_015_581_184
    assert count["Dream-org/Dream-v0-Instruct-7B"] == 7_615_616_512  # Qwen2.5-7B's
    assert round(count["inclusionAI/LLaDA-MoE-7B-A1B-Base"] / 1e9, 2) == 7.36


def test_missing_and_unknown_sizes_are_one_sentence(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="lacks 'n_layers'"):
        shapes.shape_from({"model_type": "llada", "d_model": 8, "mlp_hidden_size": 8, "n_heads": 1, "vocab_size": 8})
    with pytest.raises(ConfigError, match="model type 'nonsense' is neither"):
        shapes.shape_from({"model_type": "nonsense"})
    with pytest.raises(ConfigError, match="config.json can't be read"):
        shapes.read_config(str(tmp_path))


# ---- what autograd saves


def saved_bytes(model: torch.nn.Module, rows: int, length: int, head_rows: int) -> int:
    """Bytes that a forward keeps for its backward, each storage once, the model's own left out, when the head runs at
    ``head_rows`` positions of each row."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros((rows, length), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        at = torch.arange(rows)[:, None] * length + torch.arange(head_rows)
        output = model(input_ids=ids, logit_rows=at.flatten()).logits
    kept = sum(found.values())
    del output
    return kept


TRUNK = Shape(50, d_model=64, layers=3, heads=4, mlp=160, prompt=16, completion=16, block=16, steps=16, lora_r=8)


def head_and_tables(shape: Shape, head_rows: int) -> int:
    """What isn't the blocks': the scored rows' norm, and the rotary tables, also at those rows where they are few."""
    turned = shape.length + (head_rows if head_rows <= shape.length else 0)
    return head_rows * (4 * shape.d_model + 4) + 2 * 4 * turned * shape.d_model // shape.heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_rows", [2, 20])
@pytest.mark.parametrize("changes", [{}, {"layers": 1}, {"d_model": 96, "mlp": 64}, {"lora_r": 2}, {"prompt": 40}])
def test_kept_activations_are_what_autograd_saves(dtype: torch.dtype, changes: dict[str, int], head_rows: int) -> None:
    shape = dataclasses.replace(TRUNK, **changes)
    model, _ = build_policy(shape, dtype=dtype)
    trunk = Trunk(shape.model, 3, shape.length, shape.lora_r, dtype.itemsize, head_rows=3 * head_rows)
    assert saved_bytes(model.train(), 3, shape.length, head_rows) == activations.kept(
        trunk, checkpointing=False
    ) + head_and_tables(shape, 3 * head_rows)


def test_a_forgotten_tensor_would_be_seen() -> None:
    model, _ = build_policy(TRUNK)
    wider = Trunk(dataclasses.replace(TRUNK.model, mlp=TRUNK.mlp + 1), 3, TRUNK.length, TRUNK.lora_r, 4, head_rows=6)
    everywhere = Trunk(TRUNK.model, 3, TRUNK.length, TRUNK.lora_r, 4)
    saved = saved_bytes(model.train(), 3, TRUNK.length, 2)
    for wrong in (wider, everywhere):
        assert saved != activations.kept(wrong, checkpointing=False) + head_and_tables(TRUNK, 6)


@pytest.mark.parametrize(
    "family, limit", [("dream", 0.02), ("moe", 0.05), ("modernbert", 0.1), ("bert", 0.1), ("albert", 0.1)]
)
def test_kept_activations_of_the_other_families(family: str, limit: float, tmp_path: Any) -> None:
    raw, meta = published(family)
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = type(meta)(meta.config)
    named = {"dream": r".*_proj", "moe": r".*self_attn\.._proj"}
    regex = named[family] if family in named else ".*" + masked_lm.ARCHITECTURES[family].lora_regex
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(model, LoraConfig(r=8, target_modules=regex), autocast_adapter_dtype=False)
    shape = shapes.shape_from(raw)
    for head_rows in (2, 24):
        expected = activations.kept(Trunk(shape, 4, 48, 8, 4, head_rows=4 * head_rows), checkpointing=False)
        assert saved_bytes(policy.train(), 4, 48, head_rows) == pytest.approx(expected, rel=limit)


# ---- processes, hardware, fit


GPU = Hardware("cuda", 8, 80 * GIB, "H100", "a test")
ON_GPUS = ("resources.gpus_per_rank=0.6", "resources.gpus_per_actor=0.4", "learner.ranks=8", "rollout.actors=8")


def planned_run(*settings: str, on: Hardware = GPU) -> Any:
    config = load_config([*AGRPO, *ON_GPUS, *settings])
    return plan_run(config, shapes.model_shape(config), on, prompt=256, prompt_source="a test")


def items(process: Any) -> dict[str, int]:
    return {item.name: item.bytes for item in (*process.resident, *process.kept, *process.moments)}


def test_items_of_a_rank_at_llada_8b() -> None:
    rank = items(planned_run().rank)
    adapter = 167_772_160
    assert rank["base weights"] == 2 * 8_015_581_184
    assert rank["adapter"] == 2 * adapter
    assert rank["AdamW's moments"] == 8 * adapter // 8
    assert rank["fp32 masters"] == 4 * adapter // 8
    assert rank["gradients"] == 4 * adapter // 8
    assert items(planned_run("learner.zero_stage=1").rank)["gradients"] == 4 * adapter
    assert items(planned_run("learner.zero_stage=3").rank)["base weights"] == 2 * 8_015_581_184 // 8
    quantized = items(planned_run("model.quantization=nf4").rank)["base weights"]
    maps = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    assert quantized == int(maps * BYTES_PER_PARAMETER["nf4"]) + 2 * (8_015_581_184 - maps)


def test_named_target_modules_are_counted() -> None:
    queries = planned_run('lora.target_modules=["q_proj"]').model.adapter_parameters(64)
    assert queries == 32 * 64 * 2 * 4096


@pytest.mark.parametrize(
    "less, more",
    [
        (("learner.views_per_forward=4",), ("learner.views_per_forward=8",)),
        (("learner.activation_checkpointing=true",), ()),
        (("learner.zero_stage=2",), ("learner.zero_stage=1",)),
        (("model.quantization=nf4",), ()),
        (("lora.r=8",), ()),
        (("rollout.sampler.completion_length=192", "rollout.sampler.steps=64"), ()),
    ],
)
def test_a_rank_needs_less(less: tuple[str, ...], more: tuple[str, ...]) -> None:
    assert planned_run(*less).rank.peak < planned_run(*more).rank.peak


def test_an_actor_needs_more_for_more_rows_and_for_rules_that_look_at_whole_blocks() -> None:
    settings = ("evaluation.position_rule=random", "rollout.sampler.block_length=384")
    small = planned_run(*settings, "rollout.max_rows=4").actor.peak
    assert small < planned_run(*settings, "rollout.max_rows=8").actor.peak
    assert (
        small < planned_run(*settings, "rollout.max_rows=4", "rollout.sampler.position_rule=low_confidence").actor.peak
    )
    assert small < planned_run(settings[1], "rollout.max_rows=4").actor.peak  # greedy evaluation by confidence


def test_the_largest_forwards_fit_and_one_more_does_not() -> None:
    found = planned_run("learner.activation_checkpointing=true")
    model, config = found.model, found.config
    for largest, budget, need in (
        (
            found.largest_views,
            found.rank_budget,
            lambda n: rank_memory(config, model, device="cuda", prompt=256, views=n),
        ),
        (
            found.largest_rows,
            found.actor_budget,
            lambda n: actor_memory(config, model, device="cuda", prompt=256, rows=n),
        ),
    ):
        assert largest >= 1 and need(largest).peak <= budget.bytes
    tight = planned_run("learner.activation_checkpointing=true", on=dataclasses.replace(GPU, memory=48 * GIB))
    n, budget = tight.largest_views, tight.rank_budget.bytes
    assert rank_memory(config, model, device="cuda", prompt=256, views=n).peak <= budget
    assert rank_memory(config, model, device="cuda", prompt=256, views=n + 1).peak > budget


def test_the_first_change_is_the_cheapest_that_helps() -> None:
    fits = planned_run("learner.activation_checkpointing=true", "learner.views_per_forward=4")
    assert fits.fits and not fits.changes
    found = planned_run()
    assert not found.fits
    assert found.changes[0].settings == ("learner.activation_checkpointing=true",)
    assert found.changes[-1].fits
    tiny = planned_run(on=dataclasses.replace(GPU, memory=2 * GIB))
    assert not tiny.fits and any("GPUs" in setting for setting in tiny.changes[-1].settings)


def test_taking_the_changes_makes_it_fit() -> None:
    tight = dataclasses.replace(GPU, memory=40 * GIB)
    found = planned_run(on=tight)
    taken = [setting for change in found.changes for setting in change.settings]
    assert found.changes[-1].fits and planned_run(*taken, on=tight).fits
    assert not planned_run(*taken[:-1], on=tight).fits


def test_one_change_that_is_enough_stands_alone() -> None:
    for ahead, enough in (("0", "resources.one_process=true"), ("1", "model.quantization=nf4")):
        found = planned_run(
            "learner.activation_checkpointing=true", "learner.views_per_forward=4", "rollout.max_rows=16",
            f"rollout.max_staleness={ahead}", on=dataclasses.replace(GPU, memory=24 * GIB),
        )  # fmt: skip
        assert [change.settings for change in found.changes] == [(enough,)]


def test_too_few_gpus_are_a_problem() -> None:
    found = planned_run("learner.activation_checkpointing=true", on=dataclasses.replace(GPU, gpus=4))
    assert any("ask for 8 GPUs, and there are 4" in problem for problem in found.problems)


def test_work_of_the_published_recipe() -> None:
    work = planned_run().work
    assert (work.completions, work.views) == (128, 128 * 24)
    assert work.published == 335_544_320
    assert work.learner.recompute < work.learner.forward < work.learner.backward
    more = planned_run("learner.activation_checkpointing=true").work
    assert more.learner.recompute > more.learner.forward * 0.98
    assert planned_run("objective.beta=0.1").work.reference.forward > 0


def test_work_of_what_is_measured_before_every_update() -> None:
    """Four copies once per batch, with and without adapter; and four of each of two updates, without the base."""
    dmpo = [setting for setting in AGRPO if not setting.startswith("objective.")]
    dmpo += ["objective.type=dmpo", "learner.updates_per_batch=2"]
    configs = [load_config([*dmpo, *more]) for more in ((), ("objective.centering=unbiased",))]
    once, again = (work_of(config, shapes.model_shape(config), prompt=256).reference.forward for config in configs)
    assert again == pytest.approx(2 * once)


def test_asynchronous_iterations_take_as_long_as_their_slower_half() -> None:
    whole = ("resources.gpus_per_rank=1", "resources.gpus_per_actor=1")
    together, apart = planned_run("rollout.max_staleness=1", *whole).time, planned_run(*whole).time
    assert together.iteration == max(apart.rollout, apart.learn) < apart.iteration == apart.rollout + apart.learn


def test_trajectories_are_no_larger_than_real_ones(tmp_path: Any) -> None:
    from learner.bench.model_free import prebuilt_group

    config = load_config([*AGRPO])
    group = prebuilt_group(size=8, prompt=256, completion=384, block=12, steps=128, kept=150, vocabulary=126_464)
    assert trajectory_bytes(config, 256) == pytest.approx(group.nbytes, rel=0.01)


@pytest.mark.parametrize("method", ["egspo", "dispo"])
def test_branches_take_room_in_the_object_store_and_logits_of_all_that_is_masked(method: str) -> None:
    sizes = [setting for setting in AGRPO if not setting.startswith("objective.")]
    config, plain = (load_config([*sizes, f"objective.type={each}"]) for each in (method, "diffu_grpo"))
    branches = config.objective.branches(config.rollout.sampler.spec())
    assert branches is not None
    shape = (config.rollout.group_size, branches.states, branches.fills)
    arrays = [np.zeros(shape[:2], np.int16), np.zeros((*shape, 384), np.int32), np.zeros(shape, bool)]
    if method == "dispo":
        arrays.append(np.zeros((*shape, 384), np.float32))
    more = trajectory_bytes(config, 256) - trajectory_bytes(plain, 256)
    assert more == sum(array.nbytes for array in arrays)
    model = shapes.model_shape(plain)
    drawing = [
        next(
            item.bytes for item in actor_memory(each, model, device="cuda", prompt=256).moments if "tokens" in item.name
        )
        for each in (config, plain)
    ]
    everything = config.rollout.max_rows * 384 * model.vocabulary * 2
    if method == "egspo":
        assert drawing[0] - drawing[1] == everything
    else:  # one drawn step of each row: most rows have it late, when little is masked
        assert 0.02 * everything < drawing[0] - drawing[1] < 0.2 * everything
    head = branched_positions(config)
    assert head == pytest.approx(384 * (128 + 1) / 2 if method == "egspo" else 384 / 6)
    assert branched_positions(plain) == 0


@pytest.mark.parametrize(
    "text, size", [("80GiB", 80 * GIB), ("24GB", 24 * 10**9), ("512 MiB", GIB // 2), ("1.5g", 15 * 10**8), ("100", 100)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert hardware.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1GB", "0", "3XB"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an amount"):
        hardware.parse_memory(text)


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("L40S", "L40S"),
        ("Voodoo 2", None),
    ],
)
def test_known_gpus(name: str, key: str | None) -> None:
    assert hardware.known_gpu(name) == key


class Mine(Sudoku):
    """A user's task whose problems are generated."""

    name = "mine"


@pytest.mark.parametrize("task", ["sudoku", "countdown", "countdown_in_order", f"{__name__}:Mine"])
def test_prompts_of_generated_problems_are_counted(task: str) -> None:
    tokens, source = prompt_tokens(load_config(["recipe=sudoku", f"task.name={task}"]))
    assert 10 < tokens < 120 and source.startswith("the longest of")


def test_gaps_are_told_to_be_counted_whole(tiny_model: str) -> None:
    gapped = load_config(["recipe=sudoku", "task.name=tests.support.gapped:Gapped", f"model.path={tiny_model}"])
    assert prompt_tokens(gapped)[1].endswith("of the task's, whose gaps may be shorter than a completion is counted")


def test_prompts_that_would_be_downloaded_are_assumed() -> None:
    assert prompt_tokens(load_config([*AGRPO]))[1].startswith("assumed")  # the tokenizer
    assert prompt_tokens(load_config(["recipe=sudoku", "task.name=gsm8k"])) == (256, "assumed; --prompt says better")


# ---- the command and the refusal


def test_the_command_prints_a_plan(capsys: Any) -> None:
    assert (
        plan.main([*AGRPO, *ON_GPUS, "learner.activation_checkpointing=true", "--gpus", "8", "--memory", "80GiB"]) == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("it fits\n\nmodel "), "the verdict comes first"
    for piece in ("base weights", "AdamW's moments", "activations", "without checkpointing: peak", "it fits", "assumed",
                  "335.5 MB of adapter", "largest learner.views_per_forward", "iterations:"):  # fmt: skip
        assert piece in out


def test_the_command_says_what_to_change(capsys: Any) -> None:
    assert plan.main([*AGRPO, *ON_GPUS, "--gpus", "8", "--gpu", "4090"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "change first: " in out and "resources.one_process=true" in out


def test_json_holds_the_same(capsys: Any) -> None:
    assert plan.main([*AGRPO, *ON_GPUS, "--gpus", "8", "--memory", "80GiB", "--json", "--prompt", "100"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["fits"] is False and data["changes"][0]["settings"] == ["learner.activation_checkpointing=true"]
    assert data["memory"]["rank"]["peak"] > data["memory"]["rank"]["budget"]
    assert data["model"]["parameters"] == 8_015_581_184 and data["model"]["prompt_tokens"] == 100


def test_settings_without_gpus_are_dealt_out(capsys: Any) -> None:
    assert plan.main(["recipe=sudoku", "--gpus", "2", "--memory", "1GiB"]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("DOES NOT FIT: ") and "resources.gpus_per_rank=0.667" in told.err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gpus", "8"], "--gpus needs --memory"),
        (["--gpus", "8", "--gpu", "Voodoo"], "is none of"),
        (["--gpu", "H100"], "--gpu needs --gpus"),
        (["--memory", "x"], "is not an amount"),
        (["--memory", "1GiB", "--utilisation", "40"], "--utilisation 40 is not a share"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["run.nonsense=1"], "nonsense"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], says: str, capsys: Any) -> None:
    assert plan.main(["recipe=sudoku", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.startswith("sft")])
@pytest.mark.slow
def test_every_recipe_can_be_planned(recipe: str, capsys: Any) -> None:
    assert plan.main([f"recipe={recipe}", "--gpus", "8", "--memory", "80GiB"]) == 0
    assert "it fits" in capsys.readouterr().out


def test_this_machine_runs_the_sudoku_recipe(capsys: Any) -> None:
    assert plan.main(["recipe=sudoku"]) == 0
    assert "this machine" in capsys.readouterr().out


def test_what_cannot_fit_is_refused_with_the_table() -> None:
    config = load_config(["recipe=sudoku"])
    machine = Hardware("cpu", 0, GIB, None, "a test")
    with pytest.raises(ConfigError, match="this run does not fit") as refused:
        check_memory(config, machine)
    for piece in ("base weights", "all processes", "there are 1.00 GiB", "change first", "check_memory=false"):
        assert piece in str(refused.value)
    assert check_memory(config, dataclasses.replace(machine, memory=64 * GIB)) is None
    assert check_memory(load_config(["recipe=sudoku", "resources.check_memory=false"]), machine) is None


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            ["rollout.prompts_per_iteration=3000000"],
            "an update takes .* timeouts.update is 1800; lower rollout.prompts",
        ),
        (["rollout.group_size=4096", "timeouts.lease=0.5"], "a lease of 2 groups takes .* rollout.group_size=4096"),
    ],
)
def test_what_cannot_be_done_in_time_is_refused_in_a_sentence(settings: list[str], says: str, capsys: Any) -> None:
    machine = Hardware("cpu", 0, 64 * GIB, None, "a test")
    with pytest.raises(ConfigError, match=says) as refused:
        check_memory(load_config(["recipe=smoke", *settings]), machine)
    assert len(str(refused.value).splitlines()) == 1
    given = [*settings, "timeouts.update=1e9", "timeouts.lease=1e9"]
    assert check_memory(load_config(["recipe=smoke", *given]), machine) is None, "the control: the remedy"
    assert plan.main(["recipe=smoke", *settings]) == 1
    assert capsys.readouterr().out.startswith("TAKES TOO LONG: ")


def test_groups_that_are_too_large_are_refused_before_anything(capsys: Any) -> None:
    for main in (plan.main, learner_main):
        assert main(["recipe=smoke", "rollout.group_size=100000"]) == 2
        told = capsys.readouterr()
        assert "rollout.group_size=100000 is more than 4096" in told.err and "prompts_per_iteration" in told.err
        assert told.out == "" and len(told.err.splitlines()) == 1


def test_unknown_memory_is_a_warning_not_a_refusal() -> None:
    config = load_config([*AGRPO, *ON_GPUS])
    assert "is unknown" in str(check_memory(config, Hardware("cuda", 8, None, None, "a test")))
    unknown = config.model_copy(update={"model": config.model.model_copy(update={"path": "/nowhere"})})
    assert "was not checked" in str(check_memory(unknown, GPU))


def test_main_refuses_before_it_starts_anything(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    settings = ["recipe=sudoku", f"run.dir={tmp_path}/runs", f"model.cache_dir={tmp_path}/cache"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # A real machine with too little memory is hard to come by: a run that is too large for this one.
    big = ["rollout.actors=40", "model.base.d_model=8192", "model.base.mlp_hidden=65536", "model.base.n_layers=48"]
    assert learner_main([*settings, *big]) == 2
    err = capsys.readouterr().err
    assert "this run does not fit" in err and "base weights" in err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_ray_cluster_is_asked_for_its_gpus() -> None:
    from learner.runs.local_ray import local_ray

    with local_ray(num_cpus=1, num_gpus=2, resources={"accelerator_type:H100": 1}):
        found = hardware.ray_cluster(load_config([*AGRPO, *ON_GPUS]))
        assert (found.device, found.gpus, found.gpu, found.memory) == ("cuda", 2, "H100", 80 * GIB)
        on_cpus = hardware.ray_cluster(load_config(["recipe=sudoku"]))
        assert on_cpus.device == "cpu" and (on_cpus.memory or 0) >= (hardware.machine_memory() or 0) > 0


# ---- measured


def test_small_measurements_have_all_columns() -> None:
    parts = planned.predicted(SMALL["engine"])
    assert len(parts) == 1 and min(parts.values()) > 0
    learner = planned.predicted(SMALL["learner"])
    assert set(learner) >= {"activations", "gradients", "AdamW's moments"} and len(learner) == 4


def as_if_restricted(**sizes: Any) -> int:
    return restricted(**{**sizes, "restricted": True})


def of_tokens_alone(**sizes: Any) -> int:
    return restricted(**sizes, itemsize=4, restricted=False)


restricted = activations.scoring
CONTROLS: dict[str, tuple[Any, str, Any]] = {
    "whole law": (activations, "scoring", as_if_restricted),
    "laws and a teacher's": (activations, "scoring_laws", of_tokens_alone),
    "laws and the base's": (activations, "scoring_laws", of_tokens_alone),
    "scored choices": (activations, "scoring_positions", lambda **sizes: 0),
    "drawn branches": (memory, "_filled", lambda config, rows: (0, 0)),
    "greedy branches": (memory, "_filled", lambda config, rows: (0, 0)),
    "adapter": (memory, "_step", lambda config, model: memory.Item("optimizer step", 0)),
    "fills": (scored, "_positions", lambda cost, views, above, size: cost.scored * views),
    "masks and complements": (scored, "_positions", lambda cost, views, above, size: cost.most or cost.scored),
    "independent masks": (activations, "scoring", as_if_restricted),
}
"""What the plan would say without the part that a case is about: where it is, and what stands in its place."""


@pytest.mark.parametrize("name", CONTROLS)
def test_each_measured_case_is_of_a_part_without_which_the_plan_is_wrong(name: str, monkeypatch: Any) -> None:
    whole = sum(planned.predicted(CASES[name]).values())
    monkeypatch.setattr(*CONTROLS[name])
    assert sum(planned.predicted(CASES[name]).values()) < whole * 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "one block's forward", "restricted law", "scored choices",
        *(
            pytest.param(name, marks=pytest.mark.heavy)
            for name in (
                "one block's forward, narrow MLP", "activations", "checkpointing", "whole law", "laws and a teacher's",
                "drawn branches",
            )
        ),
    ],
)  # fmt: skip
def test_measured_peaks_are_within_15_percent(name: str, monkeypatch: Any) -> None:
    row = planned.measured_row(CASES[name])
    assert row["measured MB"] >= 200
    assert abs(row["error %"]) <= 15
    if name in CONTROLS:
        monkeypatch.setattr(*CONTROLS[name])
        assert sum(planned.predicted(CASES[name]).values()) / 1e6 < 0.85 * row["measured MB"]


def test_programs_of_a_code_task_are_counted_and_no_run_is_refused_for_them(capsys: Any) -> None:
    assert plan.main(["recipe=sudoku", "--memory", "8GiB", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)["memory"]
    code = ["task.name=mbpp", "rollout.grade_timeout_s=18", "rollout.actors=2", "rollout.graders_per_actor=3"]
    assert plan.main(["recipe=sudoku", *code, "--memory", "8GiB", "--prompt", "100"]) == 0
    assert "programs in the sandbox, at most" in capsys.readouterr().out
    assert plan.main(["recipe=sudoku", *code, "--memory", "8GiB", "--prompt", "100", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["memory"]
    assert without["sandboxed"] == 0 and counted["sandboxed"] == 2 * 3 * 9 * (512 << 20) < counted["nodes"]
