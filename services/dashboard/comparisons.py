"""Comparisons of methods, as ``learner.compare`` leaves them in a results.json; anybody may have written that file."""

import functools
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from services.store.files import opened

RESULTS = "results.json"
MOST_BYTES = 64 << 20
MOST_COMPARISONS = 200


class Found(BaseModel):
    """What all parts share: field docstrings are descriptions, what isn't shown is left out, numbers are finite."""

    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=())


class Estimate(Found):
    """A mean over seeds and problems."""

    value: float
    interval: tuple[float, float]
    by_seed: list[float]


class Curve(Found):
    """Evaluations on the way, means over seeds."""

    forward_equivalents: list[float] = []
    solve_rate: dict[str, list[float]] = {}
    """By number of denoising steps."""


class Tuning(Found):
    """The runs that chose the method's settings."""

    spent: float
    """Forward-equivalents."""


class GradientNoise(Found):
    """Of a method's gradient, where it was measured and found."""

    value: float | None = None
    """Noise over signal of an update; null: the signal was lost in so few batches, or it failed."""
    interval: tuple[float | None, float | None] | None = None
    """Without an end where too few batches were drawn."""
    signal_fe: float | None = None
    """Forward-equivalents for as much signal as noise."""


def _texts(point: Any) -> Any:
    return {key: json.dumps(value) for key, value in point.items()} if isinstance(point, dict) else point


class Method(Found):
    """One of the methods."""

    point: Annotated[dict[str, str] | None, BeforeValidator(_texts)]
    """The settings that were chosen, as JSON by key; null while they aren't, or when all failed."""
    runs: list[str]
    """The runs that are reported, by name."""
    iterations: list[int]
    spent: float | None
    """Forward-equivalents of a run."""
    tuning: Tuning
    solve_rate: dict[str, Estimate]
    """By number of denoising steps."""
    difference: dict[str, Estimate]
    """From the reference method, on the same seeds and problems."""
    base: dict[str, float]
    curve: Curve
    failed: dict[str, str]
    """Why, by run."""
    gradient_noise: GradientNoise | None = None


class Machine(Found):
    """What depends on the machine."""

    train_s: float
    curve_s: list[float]
    peak_rank_bytes: int | None
    equal_seconds: float
    """Of the quickest method's training."""
    solve_rate_at_equal_seconds: float


class Machines(Found):
    """By method."""

    methods: dict[str, Machine]


class Protocol(Found):
    """What all methods share."""

    budget: float
    """Forward-equivalents of each run."""
    seeds: list[int]
    tuning_seeds: list[int]
    problems: int
    """Held-out problems of a seed."""


class Comparison(Found):
    """Methods under one protocol."""

    settings: Protocol
    reference: str
    complete: bool
    unfinished: list[str]
    methods: dict[str, Method]
    machine: Machines


def comparison_files(runs: Path) -> dict[str, Path]:
    """By name, those of the folder itself and of the folders in it; each may turn out to be something else's."""
    folders = [runs, *sorted(folder for folder in runs.glob("*") if folder.is_dir() and not folder.is_symlink())]
    found = {folder.absolute().name: folder / RESULTS for folder in reversed(folders) if (folder / RESULTS).is_file()}
    return dict(list(found.items())[:MOST_COMPARISONS])


def read_comparison(path: Path) -> Comparison | None:
    """None for a file that is no comparison's, or isn't there any more."""
    try:
        with opened(path) as descriptor:
            about = os.fstat(descriptor)
            return _read(path, about.st_ino, about.st_mtime_ns) if about.st_size <= MOST_BYTES else None
    except OSError:
        return None


@functools.lru_cache(maxsize=8)
def _read(path: Path, inode: int, changed: int) -> Comparison | None:
    """Once for each state of the file: it holds every problem's outcome, and is asked for again and again."""
    with opened(path) as descriptor, open(descriptor, encoding="utf-8", errors="replace", closefd=False) as file:
        text = file.read(MOST_BYTES)
    try:
        return Comparison.model_validate(json.loads(text))
    except (ValueError, RecursionError, ValidationError):
        return None
