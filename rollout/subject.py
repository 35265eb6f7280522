"""Who writes in ``rollout.generate``: the run that is meant, its base, its adapter, its sampler, its problems.

A run's settings are read from its config.json as plain JSON, for they are the learner's.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewards.errors import ConfigError, first_line
from rewards.judge.judged import load_task
from rewards.judge.settings import read_settings
from rewards.task import Problem, Task
from rollout.adapters import AdapterState, head_tensors, pack, read_peft_folder, unpack, without_head
from rollout.models.few_bits import Quantization
from rollout.sampling.schedule import tokens_per_step
from rollout.trajectory import SamplerSpec, sampler_of

NO_ADAPTER = "none"
DEFAULT_SAMPLER = SamplerSpec(
    completion_length=128, block_length=32, steps=128, position_rule="low_confidence", temperature=0.0
)
"""LLaDA's own, where no run says another."""

_CHECKPOINT = re.compile(r"iteration-[0-9]+")


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from disk."""

    folder: Path
    state: AdapterState
    peft_config: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is loaded, and how it writes unless it is told otherwise."""

    model: str
    adapter: Adapter | None
    """In ``dtype``; None for the bare base."""
    dtype: str | None
    """The run's, or the adapter's; None when nobody says."""
    quantization: Quantization | None
    sampler: SamplerSpec
    config: Mapping[str, Any] | None
    """The run's settings, if there is a run."""


def read_subject(run: str | None, adapter: str | None, model: str | None) -> Subject:
    """What ``--run``, ``--adapter`` and ``--model`` name; one of them is given.

    Raises:
        ConfigError: when something that they name isn't there.
        DataError: when the adapter can't be read.
    """
    run_dir = None if run is None else Path(run).expanduser().absolute()
    given = None if adapter in (None, NO_ADAPTER) else Path(str(adapter)).expanduser().absolute()
    if run_dir is None and given is not None:
        run_dir = _run_around(given)
    config = None if run_dir is None else _read_config(run_dir)
    place = given or (run_dir if adapter is None else None)
    found = None if place is None else _read_adapter(place)
    named, dtype, quantization = model, None, None
    if config is not None:
        try:
            named, dtype = named or config["model"]["path"], config["learner"]["dtype"]
            quantization = config["model"]["quantization"]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{run_dir}/config.json is not of a run (no {first_line(error)})") from error
    if named is None:  # the small base, whose place its adapters name
        of_the_run = found if found is not None or run_dir is None else _read_adapter(run_dir)
        named = of_the_run.peft_config.get("base_model_name_or_path") if of_the_run is not None else None
    if found is not None:
        dtype = dtype or next((tensor.dtype for tensor in without_head(found.state).values()), None)
        if dtype is not None:
            adapter_only, head = without_head(found.state), head_tensors(found.state)
            state = pack({name: unpack(tensor).to(getattr(torch, dtype)) for name, tensor in adapter_only.items()})
            found = dataclasses.replace(found, state={**state, **head})
    return Subject(_base(named, run_dir or given), found, dtype, quantization, _sampler(config), config)


def changed(sampler: SamplerSpec, changes: Mapping[str, Any]) -> SamplerSpec:
    """``sampler`` with those of the changes that are not None. Raises ConfigError when they don't fit together."""
    sampler = dataclasses.replace(sampler, **{name: value for name, value in changes.items() if value is not None})
    tokens_per_step(sampler.completion_length, sampler.block_length, sampler.steps)
    return sampler


def held_out_problem(config: Mapping[str, Any], number: int) -> tuple[Task, Problem]:
    """The run's task and its held-out problem of this number, from 0. Raises ConfigError or DataError."""
    about = config.get("task")
    if about is None:
        raise ConfigError("--problem needs a task, and the run has none: it was fine-tuned; give a prompt")
    task = load_task(about["name"], read_settings(json.dumps(about.get("judge", {}))))
    path = about["test_path"]
    problems = task.problems("test", seed=config["run"]["seed"], size=about["test_size"], path=path)
    if task.source("test", path) is not None:  # the run leaves out those without a solution
        problems = [problem for problem in problems if task.solvable(problem.fields)]
    if number >= len(problems):
        raise ConfigError(f"--problem {number} is none of the run's {len(problems)} held-out problems, counted from 0")
    return task, problems[number]


def _run_around(folder: Path) -> Path | None:
    """The run that an adapter lies in, at most as deep as its checkpoints' adapters."""
    for place in (folder, *list(folder.parents)[:3]):
        if (place / "config.json").is_file() and (place / "checkpoints").is_dir():
            return place
    return None


def _read_config(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no run at {run_dir}: config.json is not there; give the folder of a run") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run_dir}/config.json can't be read: {first_line(error)}") from error


def _read_adapter(folder: Path) -> Adapter:
    """That of a run, whose newest checkpoint stands in for one that hasn't finished; of a checkpoint; or the folder's
    own."""
    checkpoints = [path for path in folder.glob("checkpoints/iteration-*") if _CHECKPOINT.fullmatch(path.name)]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name.removeprefix("iteration-")), reverse=True)
    for place in (folder, folder / "adapter", *(path / "adapter" for path in newest_first)):
        if (place / "adapter_config.json").is_file():
            return Adapter(place, *read_peft_folder(place))
    raise ConfigError(
        f"no adapter in {folder}: give the folder of a run that has a checkpoint, a checkpoint, an adapter in PEFT "
        "format, or --adapter none"
    )


def _base(named: str | None, source: Path | None) -> str:
    if not named:
        raise ConfigError(f"{source} doesn't name its base; give it with --model")
    path = Path(named).expanduser()
    if (path.is_absolute() or named.startswith(".")) and not path.is_dir():
        raise ConfigError(
            f"the base {named} is not there; give it with --model (python -m learner.evaluate --run RUN builds a small "
            "base again)"
        )
    return str(path) if path.is_dir() else named


def _sampler(config: Mapping[str, Any] | None) -> SamplerSpec:
    """A run's, greedily and in the order of its evaluations; a fine-tuning has none."""
    if config is None or "rollout" not in config:
        return DEFAULT_SAMPLER
    sampler = sampler_of(config["rollout"]["sampler"])
    return sampler.greedy(steps=sampler.steps, position_rule=config["evaluation"]["position_rule"])
