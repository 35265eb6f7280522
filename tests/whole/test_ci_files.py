"""The CI workflow and the pre-commit hooks do what `.ci/run` and `make lint` do, and nothing else."""

import os
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def lint_commands() -> list[str]:
    """What ``make lint`` runs."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    return [line.strip().replace("$(VENV)", ".venv") for line in recipe[1].splitlines()]


def test_pre_commit_runs_the_lint_and_fetches_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == lint_commands() != []
    assert all(hook["language"] == "system" for hook in hooks)


def test_the_workflow_calls_the_script_that_submissions_pass() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"].split()[-1] for step in steps if "run" in step] == [".ci/run"]
    for part in ("heavy", "vllm"):
        others = workflow["jobs"][part]["steps"]
        assert [step["run"].split()[-2:] for step in others if "run" in step] == [[".ci/run", part]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (python,) = (step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
    assert python == "3.11"
