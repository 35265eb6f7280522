"""docs/extending.md's example of an objective, added to a copy of the product; and who names a method."""

import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from learner.settings.methods.states import AgrpoConfig
from learner.settings.objectives import ObjectiveConfig

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("learner", "rollout", "rewards", "services")
UNION = "learner.settings.objectives"
VARIANTS = [
    variant
    for variant in typing.get_args(typing.get_args(ObjectiveConfig)[0])
    if not issubclass(variant, AgrpoConfig)  # the house's own, which the benchmarks measure
]

USE = """
import dataclasses
import numpy as np
import torch
from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import build_batch
from learner.objectives import make_objective
from learner.ranks.plan import plan_update
from learner.settings.run import load_config
from tests.support.hand_made import random_group

config = load_config(["recipe=smoke", "objective.type=one_pass"])
objective = make_objective(config.objective)
groups = [random_group(0), random_group(1)]
plan = plan_update(groups, objective=objective, run_seed=1, update_index=0, eos_ids=(1,), ranks=2, views_per_forward=3)
theta = torch.zeros(8, 10, requires_grad=True)
for forward in (forward for rank in plan.forwards for forward in rank if not forward.is_pad):
    batch = build_batch(forward.views, groups, mask_id=99, pad_id=98, law=objective.needs.law)
    logp_N = theta.log_softmax(1)[batch.position, batch.targets]
    loss, figures = objective.loss(PolicyScores(Scores(logp_N, logp_N)), batch)
    (loss / plan.normaliser).backward()
assert theta.grad.abs().sum() > 0
print(plan.normaliser, plan.statistics["views"])
"""


def example() -> tuple[str, str]:
    """The variant and the file of docs/extending.md."""
    section = (REPOSITORY / "docs" / "extending.md").read_text().partition("## An objective")[2].partition("\n## ")[0]
    variant, file = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return variant, file


def test_the_worked_example_is_short():
    assert sum(len(part.splitlines()) for part in example()) < 60


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the product with the example's two parts in it."""
    copy = tmp_path_factory.mktemp("extended")
    for package in (*PACKAGES, "tests"):
        leave_out = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(REPOSITORY / package, copy / package, ignore=leave_out)
    variant, file = example()
    (copy / "learner" / "objectives" / "one_pass.py").write_text(file)
    settings = copy / "learner" / "settings"
    one_step = settings / "methods" / "one_step.py"
    one_step.write_text(f"{one_step.read_text()}\n\n{variant}")
    union = settings / "objectives.py"
    text = union.read_text()
    assert text.count("import CoupledGrpoConfig") == text.count("Annotated[\n    AgrpoConfig") == 1
    text = text.replace("import CoupledGrpoConfig", "import OnePassConfig, CoupledGrpoConfig")
    union.write_text(text.replace("Annotated[\n    AgrpoConfig", "Annotated[\n    AgrpoConfig | OnePassConfig"))
    return copy


def run(copy: Path, *command: str) -> str:
    finished = subprocess.run(
        [sys.executable, *command], cwd=copy, env={"PYTHONPATH": str(copy), "PATH": ""}, text=True, capture_output=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_the_worked_example_runs_with_two_files_touched(extended):
    assert "with objective.type=one_pass: REINFORCE" in run(extended, "-m", "learner.main", "--help")
    assert "one_pass with 1 views of each" in run(
        extended, "-m", "learner.plan", "recipe=smoke", "objective.type=one_pass"
    )
    assert run(extended, "-c", USE).split()[0] == "8.0"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_no_other_file_of_the_product_names_a_method(variant):
    """The settings and the method's own file do; so do its recipe, the reader of its recordings, and the settings of a
    method that can be added to it; and so do the plan's measured cases."""
    module, _, name = variant.method.partition(":")
    words = re.compile(rf"\b({variant.__name__}|{name}|{variant.model_fields['type'].default})\b")
    settings = {Path(*module.split(".")).with_suffix(".py") for module in (variant.__module__, UNION)}
    own = {Path(*module.split(".")).with_suffix(".py"), *settings}
    naming = {
        path.relative_to(REPOSITORY)
        for package in ("learner", "rollout")
        for path in (REPOSITORY / package).rglob("*.py")
        if words.search(path.read_text())
    }
    exempt = ("learner/verif", "learner/settings/methods", "learner/bench/planned_cases.py")
    assert not {path for path in naming - own if not str(path).startswith(exempt)}
    assert own <= naming
