"""Whole runs, from the command line to what they leave behind."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from learner.reporting.metrics_file import read_rows
from learner.runs.directory import RunDirectory
from learner.settings.run import load_config, load_dumped
from rollout.adapters import adapter_parameters, digest, pack, read_peft_folder
from services.store import schema
from tests.support import store_rows
from tests.support.real_runs import (
    SETTINGS,
    Runs,
    assert_ledger_balances,
    iterations,
    newest_state,
    rows,
    saved_iterations,
    training_rows,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]


# ---- what a finished run leaves behind


@pytest.fixture
def store(undisturbed: RunDirectory) -> Iterator[sa.Engine]:
    engine = schema.open_engine(undisturbed.store_url, create=False)
    yield engine
    engine.dispose()


def test_plain_lines_tell_the_run_where_there_is_no_terminal(undisturbed: RunDirectory) -> None:
    told = (undisturbed.path / "output.txt").read_text()
    assert "\x1b" not in told and "\r" not in told
    for iteration in range(1, 7):
        assert re.search(
            rf"^iteration {iteration}/6  reward -?\d\.\d+  solve \d\.\d+  [\d,]+ tokens/s  ETA ", told, re.M
        )
    for steps in ("m = 8", "m/2 = 4", "m/4 = 2"):
        assert re.search(rf"^ +{steps} +\d\.\d+ +\d\.\d+ +[+-]\d\.\d+$", told, re.M), "the closing table"
    assert f"everything is in {undisturbed.path}" in told


def test_the_resolved_settings_are_kept(runs: Runs, undisturbed: RunDirectory) -> None:
    given = load_config([*SETTINGS, "rollout.actors=2", f"run.dir={runs.folder}", "run.name=undisturbed"])
    assert load_dumped(undisturbed.config_path) == given


def test_metrics_hold_every_iteration_once_and_the_evaluations(undisturbed: RunDirectory) -> None:
    assert iterations(undisturbed) == [1, 2, 3, 4, 5, 6]
    evaluated = [row["iteration"] for row in rows(undisturbed) if "eval/m/solve_rate" in row]
    assert evaluated == [0, 2, 4, 6]
    assert all(row["eval/problems"] > 0 for row in rows(undisturbed) if "eval/m/solve_rate" in row)
    assert all(row["machine/to_go_s"] >= 0 for row in training_rows(undisturbed))
    assert_ledger_balances(undisturbed)
    rollout = load_config(SETTINGS).rollout
    drawn = rollout.prompts_per_iteration * rollout.group_size * rollout.sampler.steps
    for row in training_rows(undisturbed):
        assert 0 < row["forward_equivalents"] - 3 * row["views"] <= drawn
        assert row["updates/applied"] == 1
        assert row["staleness/max"] == 0
        assert row["log_ratio/unupdated_abs_max"] < 1e-4, "learner and actors disagree"
        assert 0 <= row["time/lease/load_s"] < row["time/lease/generate_s"] and row["time/lease/grade_wait_s"] >= 0
        components = sum(row[f"reward/{name}"] for name in ("length", "permutation", "clues", "cells"))
        assert row["reward/mean"] == pytest.approx(components)
    assert any(row["grad_norm"] > 0 for row in training_rows(undisturbed)), "nothing to learn from in this run"


def test_store_tells_the_same_as_the_files(undisturbed: RunDirectory, store: sa.Engine) -> None:
    (run,) = store_rows.list_runs(store)
    assert (run["id"], run["status"], run["starts"], run["lost_rows"]) == ("undisturbed", "finished", 1, 0)
    assert run["summary"] == json.loads(undisturbed.summary_path.read_text())
    assert run["config"] == json.loads(undisturbed.config_path.read_text())

    names = sorted(training_rows(undisturbed)[0].keys() - {"iteration"})
    in_store = store_rows.metric_series(store, "undisturbed", names)
    assert in_store == {name: [(row["iteration"], row[name]) for row in training_rows(undisturbed)] for name in names}

    events = store_rows.list_events(store, "undisturbed")
    kinds = Counter(event["kind"] for event in events)
    told = {"begun": 1, "start": 1, "evaluation": 4, "checkpoint": 6, "finished": 1}
    assert {kind: kinds[kind] for kind in told} == told
    (begun,) = [event for event in events if event["kind"] == "begun"]
    assert "learner.main" in begun["text"] and begun["data"]["versions"]["torch"] and begun["data"]["code"]["digest"]
    assert not [event for event in events if event["level"] != "info"]

    with store.connect() as connection:
        workers = {row["worker_id"]: row for row in connection.execute(sa.select(schema.workers)).mappings()}
        saved = connection.execute(sa.select(schema.checkpoints.c.iteration)).scalars().all()
    assert workers.keys() == {"rollout-0", "rollout-1", "learner-0"}
    assert all(worker["pid"] and worker["restarts"] == 0 for worker in workers.values())
    assert sorted(saved) == saved_iterations(undisturbed), "without those that checkpoint.keep deleted"
    assert len(saved) < 6


def test_samples_can_be_played_back(undisturbed: RunDirectory, store: sa.Engine) -> None:
    from safetensors.numpy import load

    samples = store_rows.list_samples(store, "undisturbed")
    kinds = Counter((sample["iteration"], sample["kind"]) for sample in samples)
    assert kinds == {(0, "base"): 4} | {(i, "trained"): 4 for i in (2, 4, 6)} | {(i, "train"): 4 for i in range(1, 7)}
    base, trained = ({s["problem_id"] for s in samples if s["kind"] == kind} for kind in ("base", "trained"))
    assert len(base) == 4 and base == trained, "the same problems each time"
    learnt = 0
    for sample in samples:
        assert "Puzzle: " in sample["prompt"] and sample["correct"] in (False, True)
        assert sample["reward"] == pytest.approx(sum(sample["rewards"].values()))
        trajectory = store_rows.sample_trajectory(store, sample["id"])
        assert trajectory is not None
        arrays = load(trajectory)
        assert arrays["unmask_step"].shape == (24,)
        if sample["kind"] == "train" and sample["data"]["advantage"]:
            learnt += 1
            assert arrays["view_count"].sum() == 4, "k draws"
            old = arrays["logp"][arrays["new_position"]]
            assert arrays["new_logp"] == pytest.approx(old, abs=1e-4), "one update a batch: the weights that drew it"
    assert learnt
    texts = read_rows(undisturbed.samples_path)
    assert [row["iteration"] for row in texts] == [sample["iteration"] for sample in samples]


def test_the_completions_that_it_kept_are_graded_as_it_graded_them(undisturbed: RunDirectory) -> None:
    command = [sys.executable, "-m", "rewards.grade", "--task", "sudoku"]
    stdin = undisturbed.samples_path.read_bytes()
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120)
    kept, graded = read_rows(undisturbed.samples_path), [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and done.stderr.startswith(b"%d graded, " % len(kept))
    for before, after in zip(kept, graded, strict=True):
        assert (after["id"], after["correct"]) == (before["id"], before["correct"])
        assert after["components"] == pytest.approx(before["rewards"])


def test_summary_compares_base_and_trained(undisturbed: RunDirectory) -> None:
    summary = json.loads(undisturbed.summary_path.read_text())
    for name in ("base", "trained"):
        rates = summary[name]["greedy"]
        assert list(rates) == ["m", "m/2", "m/4"]
        assert all(0 <= rate <= 1 for rate in rates.values())
    assert 0 < summary["train_seconds"] < 300
    assert summary["iterations"] == 6 and summary["held_out_problems"] == 8


def test_plots_are_pictures(undisturbed: RunDirectory) -> None:
    plots = sorted(undisturbed.plots_dir.iterdir())
    assert len(plots) >= 6
    for path in plots:
        assert path.suffix == ".png" and path.read_bytes().startswith(b"\x89PNG"), path


def test_checkpoints_are_bounded(undisturbed: RunDirectory) -> None:
    assert saved_iterations(undisturbed) == [4, 5, 6]
    assert newest_state(undisturbed)["iteration"] == 6
    assert not list(undisturbed.checkpoints_dir.glob(".*")), "something half-written"


def test_adapter_is_the_last_one_published_and_peft_loads_it(undisturbed: RunDirectory) -> None:
    from peft import PeftModel

    from rollout.models.loading import load_model

    published = newest_state(undisturbed)["adapter_digest"]
    written, peft_config = read_peft_folder(undisturbed.adapter_dir)
    assert digest(written) == published
    base = peft_config["base_model_name_or_path"]
    model = PeftModel.from_pretrained(load_model(base), undisturbed.adapter_dir)
    loaded = pack(adapter_parameters(model))
    assert digest(loaded) == published
    assert any(tensor.data.any() for name, tensor in loaded.items() if "lora_B" in name), "it was never trained"


# ---- other ways to run


def test_dry_run_shows_rollouts_and_statistics_and_leaves_nothing(runs: Runs) -> None:
    before = {path.name for path in runs.folder.iterdir()}
    told = runs.train("dry", "--dry-run")
    assert told.count("\nprompt: ") == told.count("\ncompletion: ") == 2
    assert len(re.findall(r"^right: (True|False); reward -?\d\.\d+ \(length \d", told, re.M)) == 2
    assert "first batch (4 groups of 4):" in told
    for name in ("reward/mean", "solve_rate", "views", "groups/no_signal_share"):
        assert re.search(rf"^  {name} +-?[\d.e+-]+$", told, re.M), name
    left = {path.name for path in runs.folder.iterdir()} - before
    assert all(name.endswith(".out") for name in left), left


def test_two_ranks_see_the_rollouts_that_one_rank_sees(runs: Runs, undisturbed: RunDirectory) -> None:
    runs.train("ranks", "learner.ranks=2", "learner.zero_stage=2", "run.iterations=2")
    first, one_rank = training_rows(runs["ranks"])[0], training_rows(undisturbed)[0]
    rollouts = [name for name in one_rank if name.startswith(("reward/", "solve_rate", "entropy", "completion"))]
    assert len(rollouts) >= 6
    assert {name: first[name] for name in rollouts} == {name: one_rank[name] for name in rollouts}
    assert first["grad_norm"] == pytest.approx(one_rank["grad_norm"], rel=1e-4)
    assert first["views"] == one_rank["views"]
    assert len(list((runs["ranks"].checkpoints_dir / "iteration-000002").glob("optimizer-*.safetensors"))) == 2


def test_several_updates_on_a_batch_from_the_adapter_of_an_earlier_run(runs: Runs, undisturbed: RunDirectory) -> None:
    runs.train(
        "second-stage",
        f"lora.adapter={undisturbed.adapter_dir}",
        "learner.updates_per_batch=2",
        "run.iterations=2",
    )
    found = training_rows(runs["second-stage"])
    assert [row["updates/applied"] for row in found] == [2, 2]
    assert newest_state(runs["second-stage"])["updates"] == 4
    # The second update's ratios are those of a policy that has moved; a single one on the same batch has ratio 1.
    assert found[0]["ratio/max"] > 1.001 > training_rows(undisturbed)[0]["ratio/max"]
    # Rollouts of the first iteration come from the earlier run's adapter: same problems, same seeds, other completions.
    assert found[0]["entropy"] != training_rows(undisturbed)[0]["entropy"]
    assert found[0]["log_ratio/rms"] > 0


def test_adapter_of_another_shape_is_refused(runs: Runs, undisturbed: RunDirectory) -> None:
    told = runs.train("shape", f"lora.adapter={undisturbed.adapter_dir}", "lora.r=8", status=2)
    assert "r=4" in told and "lora.r=8" in told and "Traceback" not in told


# ---- refusals


def test_second_writer_of_a_run_is_refused(runs: Runs, undisturbed: RunDirectory) -> None:
    told = runs.train("undisturbed", status=2)
    assert "exists already" in told and "resume" in told and "Traceback" not in told
    with RunDirectory.open(undisturbed.path):  # we are the one who writes it now
        told = runs.train("undisturbed", "resume=auto", status=2)
    assert "is being written by process" in told and "Traceback" not in told
    assert "run failed" not in told
    assert saved_iterations(undisturbed) == [4, 5, 6]


@pytest.mark.parametrize(
    "setting, fragment",
    [
        ("model.path=.", "no model at .: there is no config.json"),
        ("resources.ray_address=127.0.0.1:1", "no Ray answers at 127.0.0.1:1"),
    ],
)
def test_what_is_not_there_is_named_in_a_sentence(runs: Runs, setting: str, fragment: str) -> None:
    name = "absent-" + setting.partition("=")[0].replace(".", "-")
    with runs.started(name, setting) as run:
        status = run.wait()
    told = run.output()
    assert status in (1, 2) and "Traceback" not in told, told
    error = told[told.index("error: ") :]
    assert fragment in error
