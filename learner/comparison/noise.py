"""The noise of each method's gradient, measured in processes of their own (``learner.bench.gradient_noise``)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner.comparison.cells import Cell, Found, reported_cells
from learner.comparison.processes import RunFailed, run_module
from learner.comparison.settings import ComparisonConfig
from learner.runs.atomic import atomic_write_text

Noise = dict[str, dict[str, Any]]
"""By method, what the command found; ``failed`` alone where it found nothing."""


def measure_noise(config: ComparisonConfig, out: Path, found: Found, stop: Callable[[], bool], lock: int) -> None:
    """Of the methods that are tuned and have independent batches, where it isn't there yet.

    Raises:
        Stopped: asked to stop.
    """
    known = found_noise(config, out, found)
    for method, cell in _measurable(config, found).items():
        if method in known and "failed" not in known[method]:
            continue
        print(f"{method}: the noise of its gradient, {config.gradient_batches} batches", flush=True)
        file, log = out / "noise" / f"{method}.tmp.json", out / "logs" / f"{method}-noise.log"
        arguments = [*cell.arguments, "--batches", str(config.gradient_batches), "--out", str(file)]
        try:
            file.parent.mkdir(exist_ok=True)
            run_module(
                "learner.bench.gradient_noise", arguments, log=log, lock=lock, limit_s=config.run_limit_s, stop=stop
            )
            figures = json.loads(file.read_text(encoding="utf-8"))
            file.unlink()
        except RunFailed as error:
            figures = {"failed": str(error)}
        atomic_write_text(_path(out, method), json.dumps({"key": cell.key, **figures}, indent=1) + "\n")


def found_noise(config: ComparisonConfig, out: Path, found: Found) -> Noise:
    """What is there of these settings and as many batches."""
    noise: Noise = {}
    for method, cell in _measurable(config, found).items():
        try:
            figures = json.loads(_path(out, method).read_text(encoding="utf-8"))
            if figures.pop("key") == cell.key and figures.get("batches", config.gradient_batches) == (
                config.gradient_batches
            ):
                noise[method] = figures
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return noise


def _measurable(config: ComparisonConfig, found: Found) -> dict[str, Cell]:
    """By method, the cell whose settings and base count; empty where nothing is to be measured."""
    if not config.gradient_batches:
        return {}
    cells = {method: reported_cells(config, method, found)[:1] for method in config.methods}
    return {method: first[0] for method, first in cells.items() if first and first[0].run.objective.phases() is None}


def _path(out: Path, method: str) -> Path:
    return out / "noise" / f"{method}.json"
