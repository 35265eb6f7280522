"""Whole evaluations as a user starts them, and what they start from."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from learner.evaluation.settings import EvaluateConfig, load_evaluation
from rollout.adapters import adapter_parameters, pack, write_peft_folder
from rollout.engines.torch import TorchEngine
from rollout.models.lora import LoraSpec
from tests.support.real_runs import clean_environment, kill_session

LIMIT_S = 200.0


def settings(*argv: str, run: str | None = None) -> EvaluateConfig:
    return load_evaluation(argv, run)[0]


def write_adapter(folder: Path, model: str) -> None:
    """A PEFT folder whose adapter changes what the model writes."""
    engine = TorchEngine(model_path=model, lora=LoraSpec(2, 4.0), max_rows=1)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in adapter_parameters(engine.model).items()}
    state = pack({name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "base_model_name_or_path": model}
    write_peft_folder(folder, state, config)


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "learner.evaluate", *arguments],
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@contextlib.contextmanager
def started(output: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """An evaluation under way; with the block, whatever is left of it ends."""
    command = [sys.executable, "-m", "learner.evaluate", *arguments]
    with output.open("wb") as file:
        popen = subprocess.Popen(
            command,
            env=clean_environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield popen
    finally:
        kill_session(popen.pid)
        popen.wait(timeout=60)


def results(out: Path) -> dict[str, Any]:
    """results.json without machine figures."""
    report = json.loads((out / "results.json").read_text())
    del report["machine"]
    return report
