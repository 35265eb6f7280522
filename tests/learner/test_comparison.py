"""The plan of a comparison: equal terms, the grid, which cells there are, what is chosen; and what it tells."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from learner.comparison.budget import iterations_for, planned_cost
from learner.comparison.cells import (
    Findings,
    chosen_point,
    findings_path,
    found_cells,
    known_cells,
    ready_cells,
    reported_cells,
    tuning_cells,
)
from learner.comparison.findings import outcomes
from learner.comparison.noise import found_noise
from learner.comparison.outline import outline_text
from learner.comparison.plot import PLOT, plot_comparison
from learner.comparison.processes import RunFailed, Stopped, lock_of_runs, run_module
from learner.comparison.report import comparison_report
from learner.comparison.settings import grid_points, load_comparison, plan_names, run_config
from learner.comparison.table import report_text
from learner.settings.run import dump_config
from rewards.errors import ConfigError, WaitTimeout
from tests.support.compared import all_done, done, plan

# ---- equal terms


@pytest.mark.parametrize(
    "setting",
    [
        "rollout.sampler.temperature=0.5",
        "rollout.sampler.block_length=12",
        "rollout.sampler.top_k=5",
        "rollout.group_size=2",
        "rollout.prompts_per_iteration=2",
        "rollout.grade_timeout_s=9",
        "task.train_size=32",
        "model.base.sft_steps=10",
        "lora.r=2",
        "evaluation.position_rule=random",
        "evaluation.step_divisors=[1]",
    ],
)
def test_a_method_that_changes_what_all_share_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(f"methods={{agrpo: , odd: {{settings: [objective.type=wd1, {setting!r}]}}}}")
    key = setting.partition("=")[0]
    assert str(refused.value).startswith(f"method odd has {key}=") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "setting",
    [
        "objective.psi=2.0",
        "learner.updates_per_batch=3",
        "learner.betas=[0.9, 0.95]",
        "rollout.sampler.position_rule=decoupled_confidence",
        "rollout.sampler.position_temperature=0.5",
    ],
)
def test_a_method_may_be_what_it_is(setting: str) -> None:
    plan(f"methods={{agrpo: , wd1: {{settings: [{setting!r}]}}}}")


def test_a_method_may_be_trained_in_more_steps_and_is_evaluated_as_all_are() -> None:
    own = "rollout.sampler.position_rule=left_to_right, rollout.sampler.steps=24"
    config = plan(f"methods={{agrpo: , slow: {{settings: [objective.type=just_grpo, {own}]}}}}")
    agrpo, slow = (tuning_cells(config, method)[0] for method in ("agrpo", "slow"))
    assert agrpo.step_counts == slow.step_counts == (8, 4, 2)
    assert agrpo.run.evaluation.step_divisors == (1, 2, 4)
    assert slow.run.evaluation.step_divisors == (1, 3, 6, 12), "24, 8, 4 and 2 steps"
    assert planned_cost(slow.run) > 16 * 24, "its rollouts are paid for"


def test_settings_for_all_methods_are_no_difference() -> None:
    config = plan("settings=[rollout.sampler.temperature=0.5]")
    assert all(cell.run.rollout.sampler.temperature == 0.5 for cell in known_cells(config, {}, "tuning"))


@pytest.mark.parametrize(
    "argument, told",
    [
        ("methods={nothing: }", "method nothing: objective.type="),
        ("methods={a b: {settings: [objective.type=wd1]}}", "the name of method 'a b'"),
        ("seeds=[0, 100]", "seed 100 is in tuning_seeds and in seeds"),
        ("seeds=[0, 0]", "names a seed twice"),
        ("methods={agrpo: , wd1: {grid: {objective.psi: [1.0]}}}", "different sizes (agrpo 2, wd1 1)"),
        ("learning_rates=[0.001, 0.0003, 0.001]", "the grid of method agrpo has learner.lr=0.001 twice"),
        ("settings=[run.seed=3]", "run.seed is what a comparison sets"),
        ("methods={wd1: {settings: [run.iterations=3]}}", "run.iterations is what a comparison sets"),
        ("methods={wd1: {grid: {run.seed: [1, 2]}}, agrpo: }", "run.seed is what a comparison sets"),
        ("settings=[learner.lr_schedule=cosine]", "learner.lr_schedule=cosine depends on a run's length"),
        (
            "methods={wd1: {settings: [rollout.sampler.threshold=0.9]}}",
            "wd1 samples with rollout.sampler.threshold=0.9",
        ),
        ("methods={wd1: {settings: [rollout.sampler.steps=4]}}", "can't be cut into the 8, 4, 2 steps"),
        ("settings=[run.iterations=many]", "run.iterations"),
        ("bugdet=3", "unknown key 'bugdet'; did you mean 'budget'?"),
    ],
)
def test_mistakes_are_told(argument: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(argument)
    assert told in str(refused.value)


def test_a_part_of_a_plans_methods() -> None:
    assert list(plan(only=["wd1"]).methods) == ["wd1"]
    with pytest.raises(ConfigError, match="there is no method spg to compare; there are agrpo, wd1"):
        plan(only=["spg"])


@pytest.mark.parametrize("name", plan_names())
def test_shipped_plans_load(name: str) -> None:
    config = load_comparison([f"plan={name}"])
    assert outline_text(config, {}, parallel=2)


# ---- cells


def test_a_method_that_is_named_alone_can_be_given_more() -> None:
    config = plan("methods.agrpo.settings=[objective.k=2]")
    assert config.methods["agrpo"].settings == ("objective.k=2",)


def test_points_that_differ_in_their_sign_have_names_of_their_own() -> None:
    cell = tuning_cells(plan(), "agrpo")[0]
    assert dataclasses.replace(cell, point={"a": -1}).name != dataclasses.replace(cell, point={"a": 1}).name


def test_a_grid_is_every_combination() -> None:
    grid = "methods={wd1: {grid: {learner.lr: [0.001, 0.002], objective.psi: [1.0, 2.0]}}}"
    config = plan(grid, only=["wd1"])
    assert grid_points(config, "wd1") == [
        {"learner.lr": lr, "objective.psi": psi} for lr in (0.001, 0.002) for psi in (1.0, 2.0)
    ]
    cells = tuning_cells(config, "wd1")
    assert [cell.name for cell in cells][1] == "wd1-lr0.001-psi2.0-s100"
    assert cells[1].run.learner.lr == 0.001 and cells[1].run.objective.psi == 2.0  # type: ignore[union-attr]
    assert len({cell.key for cell in cells}) == 4


def test_cells_are_a_function_of_the_settings() -> None:
    keys = [[cell.key for cell in known_cells(plan(*more), {}, "tuning")] for more in ([], [], ["budget=3000"])]
    assert keys[0] == keys[1] != keys[2]


def test_what_only_decides_how_fast_is_no_other_cell() -> None:
    more = "settings=[rollout.actors=2, resources.threads_per_process=2, timeouts.lease=9]"
    assert [cell.key for cell in known_cells(plan(), {}, "tuning")] == [
        cell.key for cell in known_cells(plan(more), {}, "tuning")
    ]


def test_all_methods_get_the_iterations_that_the_budget_pays_for() -> None:
    for cell in known_cells(plan("budget=4000"), {}, "tuning"):
        assert abs(cell.iterations * planned_cost(cell.run) - 4000) <= planned_cost(cell.run) / 2
    assert iterations_for(10, 100) == 1


def test_the_tuning_seed_chooses_and_is_not_reported() -> None:
    config = plan()
    low, high = tuning_cells(config, "agrpo")
    assert reported_cells(config, "agrpo", {}) == []
    assert reported_cells(config, "agrpo", {low.name: done(low, 0.5)}) == [], "the other point may be better"
    found = {low.name: done(low, 0.25), high.name: done(high, 0.5)}
    assert chosen_point(config, "agrpo", found) == {"learner.lr": 0.0003}
    assert [cell.seed for cell in reported_cells(config, "agrpo", found)] == [0, 1]
    assert all(cell.run.learner.lr == 0.0003 for cell in reported_cells(config, "agrpo", found))
    equals = {low.name: done(low, 0.5), high.name: done(high, 0.5)}
    assert chosen_point(config, "agrpo", equals) == {"learner.lr": 0.001}, "the first of equals"


def test_a_point_that_failed_is_not_chosen() -> None:
    config = plan()
    low, high = tuning_cells(config, "agrpo")
    failed = {cell.name: Findings(cell.key, "it diverged", {}) for cell in (low, high)}
    assert chosen_point(config, "agrpo", failed | {low.name: done(low, 0.0)}) == {"learner.lr": 0.001}
    assert chosen_point(config, "agrpo", failed) is None and reported_cells(config, "agrpo", failed) == []


def test_reported_runs_spend_the_budget_that_tuning_left_over() -> None:
    """Completions without signal aren't scored: a run that spent half of its full cost has twice the iterations."""
    config = plan("budget=4000")
    cells = tuning_cells(config, "agrpo")
    found = {cell.name: done(cell, 0.5, spent_share=0.5) for cell in cells}
    (first, _) = reported_cells(config, "agrpo", found)
    assert first.iterations == iterations_for(4000, 0.5 * planned_cost(first.run)) > cells[0].iterations


def test_tuning_comes_first_and_seeds_go_round_the_methods() -> None:
    config = plan()
    assert [cell.role for cell in ready_cells(config, {})] == ["tuning"] * 4
    found = {cell.name: done(cell, 0.5) for cell in known_cells(config, {}, "tuning")}
    assert [(cell.seed, cell.method) for cell in ready_cells(config, found)] == [
        (0, "agrpo"),
        (0, "wd1"),
        (1, "agrpo"),
        (1, "wd1"),
    ]


def test_findings_of_other_settings_are_refused_and_more_seeds_are_not(tmp_path: Path) -> None:
    config = plan()
    cell = tuning_cells(config, "agrpo")[0]
    path = findings_path(tmp_path, cell)
    path.parent.mkdir()
    path.write_text(json.dumps(vars(done(cell, 0.5))))
    assert list(found_cells(config, tmp_path)) == [cell.name]
    assert list(found_cells(plan("seeds=[0, 1, 2]", "methods={agrpo: , espo: }"), tmp_path)) == [cell.name]
    with pytest.raises(ConfigError, match="is a run of other settings than this comparison's"):
        found_cells(plan("settings=[rollout.sampler.temperature=0.5]"), tmp_path)
    whole = path.read_text()
    for broken in (whole[:-10], whole.replace('"solved"', '"sloved"'), "[]"):
        path.write_text(broken)
        assert found_cells(config, tmp_path) == {}, "not whole: it is made from the run again"


@pytest.mark.slow
def test_the_runs_of_known_results_are_not_run_again(tmp_path: Path) -> None:
    """A committed comparison gets more seeds, or another method, for the price of these alone."""
    config = plan("seeds=[0]")
    found = {cell.name: done(cell, 0.5) for cell in known_cells(config, {}, "tuning")}
    found |= {cell.name: done(cell, 0.75) for cell in known_cells(config, found, "reported")}
    path, out = tmp_path / "results.json", tmp_path / "out"
    path.write_text(json.dumps(comparison_report(config, found)))
    again = found_cells(plan("seeds=[0]", f"known={path}"), out)
    assert again == found and comparison_report(config, again) == comparison_report(config, found)
    more = plan("seeds=[0, 1]", "methods={agrpo: , wd1: , espo: }", f"known={path}")
    waiting = [cell.name for cell in ready_cells(more, found_cells(more, out))]
    assert waiting and not set(waiting) & set(found)
    with pytest.raises(ConfigError, match="of other settings than this comparison's; set them back"):
        found_cells(plan("seeds=[0]", f"known={path}", "settings=[rollout.sampler.temperature=0.5]"), out)
    own = tuning_cells(config, "agrpo")[0]
    findings_path(out, own).parent.mkdir(parents=True)
    findings_path(out, own).write_text(json.dumps(vars(done(own, 0.25))))
    assert found_cells(plan("seeds=[0]", f"known={path}"), out)[own.name] == done(own, 0.25), "the folder's own first"
    for no_comparison in ({"cells": {}}, {"cells": [], "machine": {"cells": []}}):  # the second: of learner.evaluate
        path.write_text(json.dumps(no_comparison))
        with pytest.raises(ConfigError, match="is not the results.json of a comparison"):
            found_cells(plan(f"known={path}"), out)


def test_a_run_that_was_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    """It would go on with them, and be reported as a run of the comparison's."""
    config = plan()
    cell = tuning_cells(config, "agrpo")[0]
    folder = tmp_path / cell.name
    folder.mkdir()
    place = [f"run.dir={tmp_path}", f"run.name={cell.name}", "run.resume=auto", "rollout.actors=1"]
    (folder / "config.json").write_text(dump_config(run_config([*cell.arguments, *place])))
    assert found_cells(config, tmp_path) == {}, "it goes on"
    for change in ("settings=[rollout.sampler.temperature=0.5]", "settings=[learner.max_grad_norm=3]", "budget=3000"):
        with pytest.raises(ConfigError, match="is a run of other settings than this comparison's"):
            found_cells(plan(change), tmp_path)


# ---- the report


@pytest.mark.slow
def test_report_of_nothing_of_a_part_and_of_all(tmp_path: Path) -> None:
    config = plan("statistics.resamples=200")
    found = all_done(config, {"agrpo": 0.75, "wd1": 0.5})
    empty, whole = comparison_report(config, {}), comparison_report(config, found)
    assert not empty["complete"] and len(empty["unfinished"]) == 6 and "Not done yet" in report_text(empty)
    plot_comparison(empty, tmp_path)
    assert not (tmp_path / PLOT).exists()
    assert whole["complete"] and whole["unfinished"] == [] and whole["reference"] == "agrpo"
    assert whole["methods"]["wd1"]["solve_rate"]["8"]["value"] == 0.5
    assert whole["methods"]["wd1"]["difference"]["8"]["value"] == -0.25
    assert whole["methods"]["wd1"]["base"]["4"] == 0.125
    text = report_text(whole)
    assert text.index("| `agrpo` | lr 0.001 | 0.750 [") < text.index("| `wd1` |") and "| the base |" in text
    assert "-0.250 [" in text and "512 MiB" in text and "on 8 held-out problems a seed" in text
    json.dumps(whole, allow_nan=False)
    plot_comparison(whole, tmp_path)
    assert (tmp_path / PLOT).stat().st_size > 10_000
    assert comparison_report(config, dict(reversed(found.items()))) == whole, "the order of runs changes nothing"


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_the_others_stay() -> None:
    config = plan("statistics.resamples=200")
    found = all_done(config, {"agrpo": 0.75, "wd1": 0.5})
    bad = reported_cells(config, "wd1", found)[1]
    report = comparison_report(config, found | {bad.name: Findings(bad.key, "the disk is full", {})})
    assert report["methods"]["wd1"]["seeds"] == [0] and report["methods"]["agrpo"]["seeds"] == [0, 1]
    assert f"- `{bad.name}`: the disk is full" in report_text(report) and report["complete"]


# ---- the noise of gradients


def test_noise_is_of_the_settings_and_batches_that_it_was_measured_with(tmp_path: Path) -> None:
    config = plan("gradient_batches=24", "statistics.resamples=200")
    found = all_done(config, {"agrpo": 0.75, "wd1": 0.5})
    figures = {
        "batches": 24,
        "value": 3.5,
        "interval": [2.0, None],
        "signal_fe": 7000.0,
        "signal_fe_interval": [4e3, None],
    }
    lost = {**figures, "value": None, "interval": [9.0, None]} | {"signal_fe_interval": [18e3, None]}
    del lost["signal_fe"]
    (tmp_path / "noise").mkdir()
    for method, measured in (("agrpo", figures), ("wd1", lost)):
        key = reported_cells(config, method, found)[0].key
        (tmp_path / "noise" / f"{method}.json").write_text(json.dumps({"key": key, **measured}))
    noise = found_noise(config, tmp_path, found)
    assert noise == {"agrpo": figures, "wd1": lost}
    text = report_text(comparison_report(config, found, noise))
    assert "| noise / signal | times FE of an update |" in text
    assert "| 3.5 [2, unbounded] | 7e+03 [4e+03, unbounded] |" in text and "| above 9 | above 1.8e+04 |" in text
    assert "noise / signal" not in report_text(comparison_report(config, found))
    assert found_noise(plan(), tmp_path, found) == {}, "nothing was asked for"
    assert found_noise(plan("gradient_batches=48"), tmp_path, found) == {}
    other = plan("gradient_batches=24", "settings=[rollout.sampler.temperature=0.5]")
    assert found_noise(other, tmp_path, all_done(other, {"agrpo": 0.75, "wd1": 0.5})) == {}
    (tmp_path / "noise" / "agrpo.json").write_text("{")
    assert list(found_noise(config, tmp_path, found)) == ["wd1"], "not whole: it is measured again"


# ---- processes


def never() -> bool:
    return False


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that may be run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fine.py").write_text("import sys; print(sys.argv[1:])")
    (tmp_path / "bad.py").write_text("import sys; print('working'); sys.exit('error: no room')")
    (tmp_path / "killed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "slow.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    return tmp_path


def test_a_process_is_run_to_its_end_and_its_last_words_are_kept(programs: Path) -> None:
    log = programs / "log"
    with lock_of_runs(programs / "lock", wait_s=1.0, stop=never) as lock:
        run_module("fine", ["a", "b"], log=log, lock=lock, limit_s=20.0, stop=never)
        assert log.read_text() == "['a', 'b']\n"
        with pytest.raises(RunFailed, match="^no room$"):
            run_module("bad", [], log=log, lock=lock, limit_s=20.0, stop=never)
        with pytest.raises(RunFailed, match="^exit status -9$|ended with exit status -9"):  # its own words, not bad's
            run_module("killed", [], log=log, lock=lock, limit_s=20.0, stop=never)
        with pytest.raises(RunFailed, match="longer than 0.1 s"):
            run_module("slow", [], log=log, lock=lock, limit_s=0.1, stop=never)
        with pytest.raises(Stopped):
            run_module("slow", [], log=log, lock=lock, limit_s=20.0, stop=lambda: True)


def test_the_next_start_waits_for_runs_that_were_left_behind(programs: Path) -> None:
    with lock_of_runs(programs / "lock", wait_s=1.0, stop=never) as lock:
        orphan = subprocess.Popen([sys.executable, "-m", "slow"], pass_fds=(lock,), stdout=subprocess.DEVNULL)
    try:
        with (
            pytest.raises(WaitTimeout, match="have not ended within 0.2 s"),
            lock_of_runs(programs / "lock", wait_s=0.2, stop=never),
        ):
            pass
    finally:
        orphan.kill()
        orphan.wait(timeout=10)
    began = time.monotonic()
    with lock_of_runs(programs / "lock", wait_s=10.0, stop=never):
        assert time.monotonic() - began < 5


def test_outcomes_are_numbers() -> None:
    assert np.array_equal(outcomes("0110"), [0.0, 1.0, 1.0, 0.0])
