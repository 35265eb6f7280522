"""The benchmarks at tiny sizes: what they compare is equal, what they count is right, and they would notice if not."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from learner.bench import choice, gpu, overlap, report, steps
from learner.bench.adapter_holder import AdapterHolder, adapter_shapes
from learner.bench.compare import (
    Update,
    as_plain,
    by_view,
    compare_engine,
    compare_updates,
    draws_of,
    gradient_of,
    off_policy,
    our_update,
)
from learner.bench.measure import matmul_rate, peak_above
from learner.bench.model_free import ModelFreeActor, ModelFreeSettings, prebuilt_group
from learner.bench.plain import plain_update
from learner.bench.policy import BenchEngine, Shape, build_policy, generate
from learner.bench.step_memory import memory_in_fresh_process
from learner.objectives.advantages import group_advantages
from learner.planning.flops import forward_flops, training_flops
from learner.settings.methods.states import AgrpoConfig
from rewards.errors import ConfigError, DataError, WeightMismatch
from rewards.task import Problem
from rollout.adapters import adapter_parameters, digest, pack
from rollout.messages import BASE_WEIGHTS
from rollout.trajectory import GroupSpec, Lease, SamplerSpec, TrajectoryGroup

SHAPE = steps.SMALL[0].shape
K = 6


@pytest.fixture(scope="module")
def policy():
    return build_policy(SHAPE)


@pytest.fixture(scope="module")
def group(policy) -> TrajectoryGroup:
    return generate(BenchEngine(*policy, max_rows=SHAPE.rows), SHAPE)


def both_updates(policy, group: TrajectoryGroup) -> tuple[Update, Update]:
    """Ours and the plain way's, of the same draws."""
    model, family = policy
    model.zero_grad(set_to_none=True)
    plan, scored, loss = our_update(model, family, group, SHAPE, K)
    mine = Update(loss, gradient_of(model), by_view(scored))
    model.zero_grad(set_to_none=True)
    plain_loss, plain_scored = plain_update(
        model,
        SHAPE,
        as_plain(group, SHAPE),
        group_advantages(group.rewards),
        draws_of(plan, SHAPE.rows),
        mask_id=family.mask_token_id,
        config=AgrpoConfig(k=K, timestep_sampling="uniform"),
    )
    return mine, Update(plain_loss, gradient_of(model), {(row, step): logp for row, step, logp in plain_scored})


def test_the_plain_sampler_writes_what_the_engine_writes(policy, group):
    errors = compare_engine(policy[0], group, SHAPE, policy[1], steps=SHAPE.steps)
    assert errors["logp_error"] < 2e-5


def test_another_token_or_support_of_the_engine_would_be_noticed(policy, group):
    ids = group.completion_ids.copy()
    ids[0, 0] += 1
    with pytest.raises(AssertionError, match="other tokens"):
        compare_engine(policy[0], dataclasses.replace(group, completion_ids=ids), SHAPE, policy[1], steps=SHAPE.steps)
    wider = dataclasses.replace(SHAPE, top_k=SHAPE.top_k + 8)
    with pytest.raises(AssertionError):
        compare_engine(policy[0], group, wider, policy[1], steps=SHAPE.steps)


def test_the_plain_update_has_our_log_probs_loss_and_gradient(policy, group):
    mine, plain = both_updates(policy, off_policy(group))
    assert abs(plain.loss) > 1e-3, "a loss near 0 would agree whatever is wrong"
    errors = compare_updates(mine, plain, whole=True)
    assert set(errors) == {"logp_error", "loss_error", "gradient_error"}


def test_a_wrong_update_would_be_noticed(policy, group):
    mine, plain = both_updates(policy, off_policy(group))
    name = next(iter(mine.gradient))
    bent = {**mine.gradient, name: mine.gradient[name] * 1.05}
    for wrong in (mine._replace(gradient=bent), mine._replace(loss=mine.loss * 1.01)):
        with pytest.raises(AssertionError, match="updates differ"):
            compare_updates(wrong, plain, whole=True)
    at = next(iter(plain.logp))
    with pytest.raises(AssertionError, match="log-probs"):
        compare_updates(mine._replace(logp={**mine.logp, at: mine.logp[at] + 1e-3}), plain, whole=False)


def test_a_merged_draw_is_repeated_in_the_plain_way(policy, group):
    plan, _, _ = our_update(*policy, group, SHAPE, K)
    draws = draws_of(plan, SHAPE.rows)
    assert [len(row) for row in draws] == [K] * SHAPE.rows
    assert sum(len(forward) for forward in plan.forwards[0]) < K * SHAPE.rows, (
        "no draw was merged: the test shows nothing"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_torch_counts(checkpointing):
    shape = dataclasses.replace(SHAPE, mlp=96)
    model, _ = build_policy(shape)
    ids = torch.zeros((2, shape.length), dtype=torch.int64)
    rows = torch.arange(3)
    # Of the last block's queries each has a place in both rows.
    places = 4.0 * 3 * shape.length * shape.d_model
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    # The math kernel is made of products that torch counts; it keeps the scores, so it doesn't compute them again.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids=ids, logit_rows=rows).logits.sum()
        forward = forward_flops(shape.model, **shape.sizes, rows=2, head_rows=3).forward
        assert counter.get_total_flops() == forward + places
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    counted = training_flops(shape.model, **shape.sizes, rows=2, head_rows=3, checkpointing=checkpointing)
    scores_again = 2.0 * (2 * shape.length * (shape.layers - 1) + 3) * shape.length * shape.d_model
    expected = counted.backward + counted.recompute - scores_again + places * (3 if checkpointing else 2)
    assert counter.get_total_flops() == expected
    assert counter.get_total_flops() != forward


def test_memory_sees_an_array_that_is_freed_again():
    size = 64 << 20
    seen = peak_above(lambda: np.ones(size, dtype=np.uint8).sum())
    assert abs(seen - size) < 4 << 20
    assert peak_above(lambda: None) < 1 << 20
    # Untouched pages aren't resident: what was only asked for doesn't count.
    assert peak_above(lambda: np.empty(size, dtype=np.uint8)) < 1 << 20


@pytest.mark.slow
@pytest.mark.heavy
def test_memory_of_a_step_is_measured_in_a_fresh_process():
    shape = Shape(20_000, d_model=32, layers=1, heads=2, mlp=32, rows=8, lora_r=2)
    logits = shape.rows * shape.length * shape.vocabulary * 4
    ours, plain = (memory_in_fresh_process(shape, way, 0) for way in ("ours", "plain"))
    assert plain > logits > 3 * ours
    assert memory_in_fresh_process(shape, "plain", 4) > logits


def test_matmul_rate_is_a_rate():
    assert 1e7 < matmul_rate(size=64) < 1e15


def test_small_steps_have_all_columns(tmp_path):
    result = steps.run(small=True)
    path = report.store(tmp_path, result)
    stored = json.loads(path.read_text())
    assert set(stored) == {"benchmark", "small", "machine", "rows", "tables", "bars"}
    assert {"cpu", "cores", "torch", "threads", "load_average", "when", "commit", "gpu"} <= set(stored["machine"])
    assert [row["step"] for row in stored["rows"]] == ["engine", "learner k=2", "learner k=6"]
    for columns in stored["tables"].values():
        assert all(set(columns) <= set(row) for row in stored["rows"])
    text = report.render(result)
    for title in stored["tables"]:
        assert text.count(title) == 1
    assert text.count("learner k=6") == len(stored["tables"])


def test_small_choice_has_all_columns():
    result = choice.run(small=True)
    assert [row["step"] for row in result["rows"]] == ["engine", "learner k=2"]
    for columns in result["tables"].values():
        assert all(set(columns) == set(row) for row in result["rows"])
    # Blocks of 8, 2 positions a step: 8, 6, 4 and 2 candidates, 2.5 times what is revealed.
    assert result["rows"][0]["head rows"] == "2.5 x"


def test_bars_say_what_was_missed():
    row = {"V": 126_464, "step": "engine", "time ratio": 7.9, "memory ratio": 20.0, "reference / ours": 30.0}
    time, memory, reference = steps.bars([row])
    assert (time["met"], memory["met"], reference["met"]) == (False, True, True)
    shown = report.render({**_result(), "bars": [time, memory]})
    assert "MISSED" in shown and "met" in shown


def test_results_go_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_into(page, report.render(_result()))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "### made up" in text
    page.write_text("no marks")
    with pytest.raises(DataError, match="no place for results"):
        report.write_into(page, "x")
    assert page.read_text() == "no marks"


def test_stored_results_come_back_in_the_order_of_the_page(tmp_path):
    assert report.load(tmp_path) == []
    for name in ("overlap", "steps"):
        report.store(tmp_path, {**_result(), "benchmark": name})
    (tmp_path / "variance.json").write_text("another's")
    assert [found["benchmark"] for found in report.load(tmp_path)] == ["steps", "overlap"]


def test_the_documentation_has_the_marks():
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    assert page.index(report.BEGIN) < page.index(report.END)


def test_a_prebuilt_group_has_the_size_of_llada_8b():
    group = prebuilt_group(size=8, prompt=256, completion=384, block=12, steps=128, kept=150, vocabulary=126_464)
    assert group.unmask_step.max() == 127
    assert (np.bincount(group.unmask_step[0]) == 3).all()
    assert group.support_ids is not None and group.support_ids.size == 8 * 384 * 150
    assert group.nbytes < 2.2e6


def test_a_model_free_actor_returns_the_lease_whole():
    sizes = {"size": 2, "prompt": 3, "completion": 8, "block": 4, "steps": 4, "kept": 2, "vocabulary": 30}
    specs = tuple(GroupSpec(i, Problem("p", {}), 2, 0) for i in (5, 6))
    actor = ModelFreeActor("a", ModelFreeSettings(sizes))
    actor.start()
    sampler = SamplerSpec(8, 4, 4, "random", 0.6, 2, 1.0)
    about, *groups = actor.run_lease(Lease(9, specs), sampler, BASE_WEIGHTS)
    assert about.lease_id == 9 and [g.group_id for g in groups] == [5, 6]
    assert [each.group_id for each in about.groups] == [5, 6]
    for group in groups:
        group.validate()


def test_an_adapter_holder_checks_what_it_loads(policy):
    shapes = adapter_shapes(d_model=SHAPE.d_model, mlp=SHAPE.mlp, layers=SHAPE.layers, r=SHAPE.lora_r)
    real = adapter_parameters(policy[0])
    assert shapes == {name: tuple(p.shape) for name, p in real.items()}
    state = pack({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    holder = AdapterHolder(shapes)
    holder.take(state, digest(state), digest)
    with pytest.raises(WeightMismatch):
        holder.take(state, "0" * 64, digest)


def test_overlap_leaves_the_first_iteration_out():
    rows = [
        {"time/iteration_s": s, "time/rollout_wait_s": s / 2, "time/update_s": s / 4} for s in (100.0, 2.0, 4.0, 3.0)
    ]
    found = overlap.summarise(
        rows, {"actors": 4.0, "ranks": 2.0}, {"actors": 2, "ranks": 1}, completions=10, wall_s=8.0
    )
    assert found["ms per completion"] == pytest.approx(300.0)
    assert found["iteration s"] == 3.0 and found["rollout wait s"] == 1.5
    assert found["actors idle"] == pytest.approx(0.75) and found["ranks idle"] == pytest.approx(0.75)


def test_the_gpu_script_runs_small_on_the_cpu():
    result = gpu.run(small=True)
    engine, learner = result["rows"]
    assert set(gpu.TABLES["Engine"]) == set(engine) and set(gpu.TABLES["Learner"]) == set(learner)
    assert 0 < engine["predicted GB"] < learner["predicted GB"] < 0.1
    assert engine["tokens/s"] > 0 and learner["share"] > 0 and learner["recompute TF"] > learner["forward TF"] * 0.9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_that_there_is_no_gpu():
    with pytest.raises(ConfigError, match="no GPU"):
        gpu.run()


@pytest.mark.slow
@pytest.mark.heavy
def test_the_control_path_runs_small(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "learner.bench.control", "--small", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    passing, publishing = json.loads((tmp_path / "control.json").read_text())["rows"]
    assert passing["groups/s"] > 0 and passing["groups"] == 8
    assert publishing["all loaded s"] >= publishing["publish s"] > 0


def _result() -> dict:
    machine = {"gpu": None, "cpu": "c", "cores": 2, "torch": "2", "threads": 1, "load_average": 0.0}
    return {
        "benchmark": "made up",
        "small": False,
        "machine": {**machine, "when": "now", "commit": ""},
        "rows": [{"a": 1.0, "b": None}],
        "tables": {"T": ["a", "b"]},
        "bars": [],
    }
