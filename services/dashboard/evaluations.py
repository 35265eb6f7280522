"""Evaluations of a run, as ``learner.evaluate`` leaves them in RUN/evaluations/NAME/results.json; anybody may have
written that file."""

import functools
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from services.dashboard.comparisons import MOST_BYTES, RESULTS, Found
from services.store.files import opened

FOLDER = "evaluations"
MOST_EVALUATIONS = 100


class Rate(Found):
    """A rate over the problems."""

    value: float
    interval: tuple[float, float]
    method: str = ""
    """wilson or bootstrap."""


class PolicyRates(Found):
    """What one policy did in a cell."""

    rates: dict[str, Rate]
    """solve_rate, and pass@k where completions were sampled."""
    solved: int | None = None
    completions: int | None = None
    mean_nfe: float | None = None
    """Forwards of the model for a completion."""
    mean_tokens: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _rates_apart(cls, told: Any) -> Any:
        """In the file rates and figures are side by side."""
        return told | {"rates": _rates(told)} if isinstance(told, dict) and "rates" not in told else told


class EvaluatedCell(Found):
    """One way to decode all problems."""

    label: str
    decoding: str
    """greedy, threshold or sampled."""
    samples: int
    """Completions of a problem."""
    steps: int | None = None
    position_rule: str | None = None
    base: PolicyRates | None = None
    adapter: PolicyRates | None = None
    difference: dict[str, Rate] = {}
    """Adapter minus base on the same problems."""


class Evaluation(Found):
    """The base and the adapter, decoded in several ways."""

    name: str
    """Of its folder."""
    time: float
    """When it was written last."""
    complete: bool
    unfinished: list[str]
    problems: int
    confidence: float | None = None
    """Of the intervals."""
    cells: list[EvaluatedCell]


def evaluations(run: Path) -> list[Evaluation]:
    """Of the run in this folder, the newest first; what is none is left out."""
    try:
        places = sorted(path for path in (run / FOLDER).iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []
    found = [_evaluation(place) for place in places[:MOST_EVALUATIONS]]
    return sorted((each for each in found if each is not None), key=lambda each: each.time, reverse=True)


def _evaluation(place: Path) -> Evaluation | None:
    try:
        with opened(place / RESULTS) as descriptor:
            about = os.fstat(descriptor)
            return _read(place, about.st_ino, about.st_mtime_ns) if about.st_size <= MOST_BYTES else None
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _read(place: Path, inode: int, changed: int) -> Evaluation | None:
    with (
        opened(place / RESULTS) as descriptor,
        open(descriptor, encoding="utf-8", errors="replace", closefd=False) as file,
    ):
        text = file.read(MOST_BYTES)
    try:
        told = json.loads(text)
        confidence = told["statistics"]["confidence"]
        about = {"name": place.name, "time": changed / 1e9, "confidence": confidence}
        return Evaluation.model_validate(told | about)
    except (ValueError, RecursionError, ValidationError, KeyError, TypeError):
        return None


def _rates(told: dict[str, Any]) -> dict[str, Any]:
    """The best reward of k is none: it isn't a share."""
    return {name: value for name, value in told.items() if name == "solve_rate" or name.startswith("pass@")}
