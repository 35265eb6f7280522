"""Which run a resume goes on with, and with which settings."""

import json
import os
import shutil
from pathlib import Path

import pytest

from learner.finetuning.settings import load_sft_config
from learner.runs.start import open_run
from learner.settings.run import check_paths, dump_config, load_config
from learner.settings.saved import futile_resume, run_to_resume, starts
from learner.settings.sections import RunPlace
from rewards.errors import CheckpointError, ConfigError


def begun(folder: Path, *arguments: str, time: float | None = None, recipe: dict | None = None) -> Path:
    """A run's folder as its start leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(dump_config(load_config([*arguments, f"run.dir={folder.parent}"])))
    if time is not None:
        line = {"time": time} | ({"recipe": "smoke", "recipe_settings": recipe} if recipe else {})
        (folder / "starts.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def newest(base: Path) -> str | None:
    run = run_to_resume(RunPlace(dir=str(base), resume="auto"), "run")
    return run.name if run is not None else None


# ---- which run


def test_auto_takes_the_run_that_was_started_last_whoever_looked_at_it_since(tmp_path: Path) -> None:
    for time, name in ((1000.0, "z-first"), (3000.0, "a-last"), (2000.0, "m-second")):
        begun(tmp_path / name, time=time)
    assert newest(tmp_path) == "a-last"
    for name in ("z-first", "m-second"):  # a dashboard, an evaluation, a copied file, an editor
        (tmp_path / name / "store.sqlite-wal").touch()
        (tmp_path / name / "store.sqlite-wal").unlink()
        (tmp_path / name / "evaluations").mkdir()
        os.utime(tmp_path / name / "config.json")
    assert newest(tmp_path) == "a-last"
    with (tmp_path / "z-first" / "starts.jsonl").open("a") as file:  # the control: it is started once more
        file.write(json.dumps({"time": 4000.0}) + "\n" + '{"time": 5000')
    assert newest(tmp_path) == "z-first"


def test_without_a_record_of_its_starts_a_run_is_as_old_as_its_settings(tmp_path: Path) -> None:
    for age, name in ((30, "older"), (20, "newer"), (10, "foreign")):
        folder = begun(tmp_path / name)
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"sft": {}}))  # of learner.sft, whatever its age
    (tmp_path / "older" / "evaluations").mkdir()
    (tmp_path / "no-run").mkdir()
    assert newest(tmp_path) == "newer" and newest(tmp_path / "nowhere") is None


def test_copies_of_one_run_are_told_apart_by_what_was_written_last_or_by_name(tmp_path: Path) -> None:
    folder = begun(tmp_path / "mine", time=1000.0)
    shutil.copytree(folder, tmp_path / "backup")  # with its times, as cp -a
    with pytest.raises(ConfigError, match="backup, mine in .* are copies of one run; say with run.name"):
        newest(tmp_path)
    place = RunPlace(dir=str(tmp_path), name="mine", resume="auto")
    assert run_to_resume(place, "run") == tmp_path / "mine"
    os.utime(tmp_path / "backup" / "config.json", (2e9, 2e9))
    assert newest(tmp_path) == "backup"


def test_a_path_means_the_run_that_it_lies_in(tmp_path: Path) -> None:
    folder = begun(tmp_path / "mine")
    (folder / "checkpoints" / "iteration-000002").mkdir(parents=True)
    for path in (folder, folder / "checkpoints" / "iteration-000002", folder / "checkpoints" / "iteration-000009"):
        assert run_to_resume(RunPlace(resume=str(path)), "run") == folder
    with pytest.raises(ConfigError, match="lies in no run's folder"):
        run_to_resume(RunPlace(resume=str(tmp_path)), "run")
    with pytest.raises(ConfigError, match="no such checkpoint; there are iteration-000002"):
        open_run(RunPlace(resume=str(folder / "checkpoints" / "iteration-000009")), kind="run", label="x")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        open_run(RunPlace(resume=str(folder / "checkpoints" / "iteration-000002")), kind="run", label="x")


# ---- with which settings


def test_a_run_goes_on_with_its_own_settings_and_what_the_command_line_names(tmp_path: Path) -> None:
    folder = begun(tmp_path / "mine", "recipe=smoke", "learner.ranks=2", "learner.lr=0.5", "run.iterations=7")
    dirs = f"run.dir={tmp_path}"
    for arguments in (["resume=auto"], ["run.name=mine", "run.resume=auto"], [f"resume={folder}"]):
        config = load_config([dirs, *arguments, "run.iterations=9"])
        assert (config.learner.ranks, config.learner.lr, config.run.iterations) == (2, 0.5, 9)
        assert config.model.base.d_model == 32, "of the recipe that it was started with, not of the default one"
        assert config.run.resume == str(folder), "the run, and no other one that is started meanwhile"
    new = load_config([dirs, "run.name=other", "resume=auto"])  # there is none of that name: a new run
    assert new.run.resume == "never" and new.learner.ranks == 1 and new.run.name == "other"
    assert load_config([dirs, "run.name=mine"]).learner.ranks == 1, "the control: no resume"


def test_what_belongs_to_a_start_is_not_taken_from_the_one_before(tmp_path: Path) -> None:
    folder = begun(tmp_path / "a" / "mine", "run.dashboard=true", "run.shared=true", "run.name=first")
    moved = tmp_path / "b" / "renamed"
    moved.parent.mkdir()
    folder.rename(moved)
    config = load_config([f"run.dir={moved.parent}", "resume=auto"])
    assert (config.run.dashboard, config.run.shared, config.run.name) == (False, False, None)
    assert config.run.dir == str(moved.parent) and config.run.resume == str(moved)


def test_a_recipe_is_heard_when_a_run_is_started_and_never_again(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learner:\n  lr: 0.25\n")
    begun(tmp_path / "mine", f"recipe={recipe}", time=1.0, recipe={"learner": {"lr": 0.25}})
    arguments = [f"run.dir={tmp_path}", "resume=auto"]
    assert load_config([f"recipe={recipe}", *arguments]).learner.lr == 0.25
    recipe.write_text("learner:\n  lr: 0.125\n")
    with pytest.raises(ConfigError, match=r"not what .* was started with \(learner.lr: 0.25 -> 0.125\).*leave"):
        load_config([f"recipe={recipe}", *arguments])
    with pytest.raises(ConfigError, match="recipe=countdown is not what"):
        load_config(["recipe=countdown", *arguments])
    assert load_config([*arguments, "learner.lr=0.125"]).learner.lr == 0.125


def test_settings_that_can_not_be_read_are_one_sentence(tmp_path: Path) -> None:
    folder = begun(tmp_path / "mine")
    for text, sentence in (("{", "not a saved configuration"), ("[]", "holds no settings")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            load_config([f"run.dir={tmp_path}", "run.name=mine", "resume=auto"])
    (folder / "config.json").write_text(json.dumps({"run": {}, "learner": {"lrr": 1}}))
    with pytest.raises(ConfigError, match="unknown key 'learner.lrr'"):
        load_config([f"run.dir={tmp_path}", "run.name=mine", "resume=auto"])


def test_a_fine_tuning_run_needs_no_data_and_model_named_again(tmp_path: Path) -> None:
    first = load_sft_config(["data.train=d.jsonl", "model.path=m", "sft.epochs=5", f"run.dir={tmp_path}"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(dump_config(first))
    again = load_sft_config([f"run.dir={tmp_path}", "resume=auto"])
    assert (again.data, again.model, again.sft) == (first.data, first.model, first.sft)
    with pytest.raises(ConfigError, match="data.train is missing"):
        load_sft_config([f"run.dir={tmp_path / 'elsewhere'}", "resume=auto"])


def test_the_adapter_that_a_run_was_begun_with_may_be_gone(tmp_path: Path) -> None:
    begun(tmp_path / "mine", "lora.adapter=/no/longer/there")
    check_paths(load_config([f"run.dir={tmp_path}", "resume=auto"]), in_job=False)
    with pytest.raises(ConfigError, match="lora.adapter"):  # the control
        check_paths(load_config(["lora.adapter=/no/longer/there"]), in_job=False)


def test_a_folder_that_only_looks_like_what_was_set_aside_is_none(tmp_path: Path) -> None:
    folder = begun(tmp_path / "mine")
    (folder / "set-aside").mkdir()
    (folder / "set-aside" / "config.json").write_text("{}")
    assert futile_resume(folder) is None and starts(folder) == []
    assert load_config([f"run.dir={tmp_path}", "resume=auto"]).run.resume == str(folder)
