"""The recipes for GPUs, on the GPUs that they name: they fit, and pay for no memory that they don't need. And what a
checkpoint takes in the memory of a node."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.planning import shapes
from learner.planning.changes import first_change
from learner.planning.fit import plan_run
from learner.planning.hardware import GPUS, Hardware
from learner.planning.memory import GIB, PROCESS_ALLOWANCE, ProcessMemory, rank_memory
from learner.planning.report import as_json, render
from learner.settings.arguments import recipe_names
from learner.settings.run import load_config

NODES = {"llada_gsm8k_24gb": Hardware("cuda", 1, 24 * GIB, "4090", "a test")}
EIGHT = Hardware("cuda", 8, 80 * GIB, "H100", "a test")
RECIPES = [name for name in recipe_names() if name.startswith(("llada_", "dream_"))]


def planned(recipe: str, *settings: str) -> Any:
    config = load_config([f"recipe={recipe}", *settings])
    on = NODES.get(recipe, EIGHT)
    return plan_run(config, shapes.model_shape(config), on, prompt=256, prompt_source="a test")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_computes_activations_twice_only_where_it_must(recipe):
    as_shipped = planned(recipe)
    learner = as_shipped.config.learner
    assert as_shipped.config.resources.gpus_per_rank > 0 and as_shipped.fits, as_shipped.problems
    assert learner.zero_stage <= 1, "from stage 2 on the gradient crosses the ranks after every backward"
    fits_without = planned(recipe, "learner.activation_checkpointing=false").fits
    assert learner.activation_checkpointing != fits_without


def test_the_recipe_for_24_gb_expands_its_base_once_for_eight_views():
    """Each forward, recompute and backward expands the 4-bit weights anew, however many rows it has."""
    as_shipped, singly = planned("llada_gsm8k_24gb"), planned("llada_gsm8k_24gb", "learner.views_per_forward=1")
    assert as_shipped.config.model.quantization == "nf4" and as_shipped.fits
    assert as_shipped.config.learner.views_per_forward == 8
    assert as_shipped.rank.peak > singly.rank.peak, "control: the plan knows of it, and it fits all the same"


def test_rank_and_actor_of_one_gpu_take_turns_in_a_synchronous_run():
    turns, together = planned("llada_gsm8k"), planned("llada_gsm8k", "rollout.max_staleness=1")
    whole = planned("llada_gsm8k", "resources.gpus_per_rank=1", "resources.gpus_per_actor=1")
    assert (turns.time.rollout, turns.time.learn) == pytest.approx((whole.time.rollout, whole.time.learn))
    assert together.time.rollout == pytest.approx(turns.time.rollout / 0.4)
    assert together.time.learn == pytest.approx(turns.time.learn / 0.6)


def test_a_checkpoint_counts_once_a_node_however_many_processes_map_it():
    plan = planned("llada_gsm8k")
    own = 16 * PROCESS_ALLOWANCE + plan.work.buffered
    assert plan.mapped_bytes == 2 * plan.model.parameters and plan.node_bytes == plan.mapped_bytes + own
    quantized = planned("llada_gsm8k", "model.quantization=nf4")
    assert quantized.mapped_bytes == plan.mapped_bytes, "it is quantized on the GPU"


def test_on_cpus_weights_of_the_files_dtype_count_once_and_copies_each():
    config = load_config(["recipe=sudoku", "model.base.d_model=2048", "rollout.actors=3"])
    shape, machine = shapes.model_shape(config), Hardware("cpu", 0, 64 * GIB, None, "a test")
    mapped, copied = (
        plan_run(config, dataclasses.replace(shape, dtype=dtype), machine, prompt=27, prompt_source="a test")
        for dtype in ("float32", "bfloat16")
    )
    weights = 4 * shape.parameters
    assert mapped.rank.peak == copied.rank.peak and mapped.actor.peak == copied.actor.peak
    assert copied.cpu_bytes - mapped.cpu_bytes == 3 * weights, "four processes"
    assert mapped.actor_budget.bytes is not None and copied.actor_budget.bytes is not None
    assert mapped.actor_budget.bytes > copied.actor_budget.bytes


def test_plain_attention_keeps_its_scores():
    fused, plain = planned("llada_gsm8k"), planned("llada_gsm8k", "learner.deterministic=true")
    kept = [{item.name: item.bytes for item in plan.rank.kept}["activations"] for plan in (fused, plain)]
    # Of 31 blocks at every token; of the last one where 4 views ask for 3 each, which have a place in every view's row.
    assert kept[1] - kept[0] == (31 * (4 * 640) + 4 * 12) * 2 * 2 * 32 * 640
    assert "plain attention" in "".join(plain.assumptions) and plain.actor.peak >= fused.actor.peak


PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
PLAIN, TWO_VIEWS = "model.quantization=null", "learner.activation_checkpointing=false learner.views_per_forward=2"
SHARING = (
    ("A100", "recipe=llada_gsm8k"),
    ("4090", "recipe=llada_gsm8k_24gb"),
    ("4090", f"recipe=llada_gsm8k_24gb {PLAIN}"),
    ("4090", f"recipe=llada_gsm8k_24gb {TWO_VIEWS}"),
    ("4090", f"recipe=llada_gsm8k_24gb {PLAIN} {TWO_VIEWS}"),
)
"""Runs whose ranks and actors share GPUs: on which, and their arguments."""


def row_of_sharing(gpu: str, arguments: str, prompt: int = 256) -> str:
    """A row of the table in docs/planning.md of one process for rank and actor."""
    config = load_config(arguments.split())
    memory = int(GPUS[gpu].memory_gib * GIB)
    shape, on = shapes.model_shape(config), Hardware("cuda", config.learner.ranks, memory, gpu, "a test")
    plan = plan_run(config, shape, on, prompt=prompt, prompt_source="a test")
    actor = plan.actor
    base = next(item.bytes for item in actor.resident if item.name == "base weights")

    def said(needed: Callable[[ProcessMemory], int]) -> str:
        views = config.learner.views_per_forward
        size = needed(rank_memory(config, shape, device="cuda", prompt=prompt, views=views))
        most = 0
        while needed(rank_memory(config, shape, device="cuda", prompt=prompt, views=most + 1)) <= memory:
            most += 1
        fits = f"{most} views" if size <= memory else "doesn't fit"
        return f"{size / GIB:.1f} GiB; {fits}"

    together = config.resources.model_copy(update={"one_process": True})
    one = plan_run(config.model_copy(update={"resources": together}), shape, on, prompt=prompt, prompt_source="a test")
    in_one = f"{one.rank.peak / GIB:.1f} GiB; {one.largest_views} views"
    assert one.time.run == plan.time.run
    cells = (said(lambda rank: rank.peak + actor.peak), in_one, said(lambda rank: rank.peak + actor.peak - base))
    return f"| `{arguments}` | {gpu} | {' | '.join(cells)} | {plan.time.run / 3600:.1f} |"


def test_what_does_not_fit_in_two_processes_is_told_that_it_does_in_one():
    """LLaDA-8B as published, in bfloat16, on 24 GB."""
    changed = planned("llada_gsm8k_24gb", "model.quantization=null")
    assert not changed.fits and [change.settings for change in changed.changes] == [("resources.one_process=true",)]
    apart = planned("llada_gsm8k_24gb", "model.quantization=null", "rollout.max_staleness=1", "rollout.actors=1")
    told = [setting for change in apart.changes for setting in change.settings]
    assert told and "resources.one_process=true" not in told, "control: an asynchronous run can't"
    one = planned("llada_gsm8k_24gb", "model.quantization=null", "resources.one_process=true")
    assert one.fits and one.rank == one.actor and one.rank_budget == one.actor_budget
    text, told = render(one), json.loads(as_json(one))
    assert "learner rank and rollout actor" in text and "\nrollout actor" not in text
    assert told["memory"]["rank"] == told["memory"]["actor"]


def test_memory_of_one_process_is_a_ranks_and_an_adapter_while_it_learns():
    """What is drawn finds nothing kept: with rows enough it is drawing that needs most."""
    for rows, drawing in (("8", False), ("256", True)):
        settings = ("model.quantization=null", f"rollout.max_rows={rows}")
        apart, one = (planned("llada_gsm8k_24gb", *settings, *more) for more in ((), ("resources.one_process=true",)))
        adapter = next(item.bytes for item in apart.actor.resident if item.name == "adapter")
        resident = sum(item.bytes for item in apart.rank.resident) + adapter
        assert sum(item.bytes for item in one.rank.resident) == resident
        assert one.rank.dynamic == max(apart.rank.dynamic, apart.actor.dynamic)
        assert (apart.actor.dynamic > apart.rank.dynamic) == drawing, "else both cases are one"


def test_what_a_full_gpu_is_told_to_change_first_is_of_the_process_that_both_are():
    config = load_config(["recipe=llada_gsm8k_24gb", "model.quantization=null", "resources.one_process=true"])
    apart = load_config(["recipe=llada_gsm8k_24gb", "rollout.max_rows=1"])
    for process in ("learner rank", "rollout actor"):
        change = first_change(config, shapes.model_shape(config), prompt=256, process=process)
        assert change is not None and change.process == "learner rank and rollout actor"
        change = first_change(apart, shapes.model_shape(apart), prompt=256, process=process)
        assert change is None or "resources.one_process=true" not in change.settings, "what it needs then isn't known"


def test_no_stage_is_named_that_one_process_refuses():
    """A large adapter: ZeRO 2 and a 4-bit base are enough, and 3 can't be had."""
    settings = ("resources.one_process=true", "learner.activation_checkpointing=true", "lora.r=1024")
    config = load_config(["recipe=llada_gsm8k", *settings])
    on = dataclasses.replace(EIGHT, memory=32 * GIB)
    changes = plan_run(config, shapes.model_shape(config), on, prompt=256, prompt_source="a test").changes
    told = [setting for change in changes for setting in change.settings]
    assert "learner.zero_stage=3" not in told and "model.quantization=nf4" in told and changes[-1].fits


def test_the_page_tells_what_one_process_for_rank_and_actor_would_need():
    page = PAGE.read_text(encoding="utf-8")
    for gpu, arguments in SHARING:
        assert row_of_sharing(gpu, arguments) in page
        assert row_of_sharing(gpu, arguments, prompt=320) not in page, "control: other figures"
