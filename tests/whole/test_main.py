"""The command line of learner.main, as far as it goes without Ray: a real process each time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.settings.arguments import recipe_names
from learner.settings.run import load_config

TIMEOUT_S = 60


def call(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "learner.main", *arguments]
    outside_ray = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        command, cwd=cwd, env=outside_ray | environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def test_help_lists_recipes_options_and_the_main_keys(tmp_path: Path) -> None:
    answer = call(tmp_path, "--help")
    assert answer.returncode == 0 and answer.stderr == ""
    for name in recipe_names():
        assert f"\n  {name} " in answer.stdout
    for option in ("--dry-run", "--print-config", "resume=auto"):
        assert option in answer.stdout
    for key in ("run.iterations=50", "rollout.max_staleness=0", "learner.lr=0.001", "checkpoint.every=10"):
        assert key in answer.stdout
    (timeout,) = [line for line in answer.stdout.splitlines() if line.strip().startswith("timeouts.lease=")]
    assert "Seconds for an actor" in timeout


def test_print_config_gives_the_resolved_settings_and_starts_nothing(tmp_path: Path) -> None:
    answer = call(tmp_path, "recipe=smoke", "--print-config", "run.dir=here", "learner.lr=3e-4")
    assert answer.returncode == 0 and answer.stderr == ""
    printed = json.loads(answer.stdout)
    assert printed == load_config(["recipe=smoke", "run.dir=here", "learner.lr=3e-4"]).model_dump(mode="json")
    assert printed["learner"]["lr"] == 3e-4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (["learner.lrr=1"], ["unknown key 'learner.lrr'", "learner.lr"]),
        (["run.iterations=many"], ["run.iterations", '"many"', "whole number"]),
        (["rollout.sampler.steps=7"], ["rollout.sampler.steps=7", "take one of"]),
        (["recipe=nothing"], ["there is no recipe 'nothing'", "smoke"]),
        (["sudoku"], ["'sudoku'", "recipe=sudoku"]),
        (["--dry-rum"], ["--dry-rum", "--help"]),
        (["task.train_path=/nowhere/train.csv"], ["task.train_path=/nowhere/train.csv: there is no such file"]),
        (
            ["rollout.buffer_groups=1", "rollout.sampler.temperature=0"],
            ["rollout.sampler.temperature=0", "rollout.buffer_groups=1"],
        ),
    ],
)
def test_a_mistake_ends_with_2_and_a_sentence_each(tmp_path: Path, arguments: list[str], fragments: list[str]) -> None:
    answer = call(tmp_path, *(arguments if "recipe=nothing" in arguments else ["recipe=smoke", *arguments]))
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    for fragment in fragments:
        assert fragment in answer.stderr
    mistakes = 2 if len(arguments) == 2 else 1
    assert len(answer.stderr.splitlines()) == mistakes, answer.stderr
    assert list(tmp_path.iterdir()) == [], "something was started"


def test_relative_paths_inside_a_job_are_refused_before_anything_starts(tmp_path: Path) -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    answer = call(tmp_path, "recipe=smoke", "run.dir=runs", **job)
    assert answer.returncode == 2
    assert "run.dir=runs is relative" in answer.stderr and "absolute" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_resume_is_short_for_run_resume(tmp_path: Path) -> None:
    def resume(*arguments: str) -> str:
        return load_config(["recipe=smoke", f"run.dir={tmp_path}", *arguments]).run.resume

    assert resume("resume=/a/b") == resume("run.resume=/a/b") == "/a/b"
    assert resume() == "never"
    assert resume("resume=/a/b", "run.resume=never") == "never", "the last one wins"
    assert resume("resume=auto") == "never", "without a run that could go on, a new one starts"
