"""GPUs that a machine hasn't are refused before there is a folder, a Ray or a download."""

from pathlib import Path

import pytest
import torch

from learner.control import launch
from learner.control.controller import Controller
from learner.finetuning import run as finetuning
from learner.finetuning.settings import load_sft_config as load_sft
from learner.runs.session import check_local_gpus
from learner.settings.arguments import recipe_names
from learner.settings.run import load_config, required_resources
from rewards.errors import ConfigError

GPU_RECIPES = [name for name in recipe_names() if required_resources(load_config([f"recipe={name}"]))[1] > 0]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("recipe", GPU_RECIPES)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_recipe_that_needs_gpus_is_refused_at_once(recipe: str, dry_run: bool, tmp_path: Path) -> None:
    config = load_config([f"recipe={recipe}", f"run.dir={tmp_path / 'runs'}"])
    with pytest.raises(
        ConfigError, match=r"more GPUs \(\d+, .* than this machine has \(none\); .*resources\.ray_address"
    ):
        launch.run(config, look=Controller.dry_run if dry_run else None)
    assert list(tmp_path.iterdir()) == []


def test_so_is_a_fine_tuning(tmp_path: Path) -> None:
    config = load_sft(["recipe=sft_d1_s1k", f"run.dir={tmp_path / 'runs'}"])
    with pytest.raises(ConfigError, match=r"more GPUs \(4, .* than this machine has \(none\)"):
        finetuning.run(config)
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_had_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_local_gpus(None, 0.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check_local_gpus(None, 8.0)
    with pytest.raises(ConfigError, match=r"more GPUs \(8\.5, .* than this machine has \(8\);"):
        check_local_gpus("local", 8.5)
    check_local_gpus("auto", 64.0)  # a cluster's are its own
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_local_gpus(None, 64.0)
