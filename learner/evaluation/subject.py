"""What is evaluated: the base model, the adapter and the problems."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.evaluation.settings import NO_ADAPTER, EvaluateConfig
from learner.runs import checkpoint as checkpoints
from learner.runs.directory import RunDirectory
from learner.small_base.base_model import ensure_base, print_progress
from learner.supply.problems import fitting, read_problems, task_problems
from rewards.errors import ConfigError, DataError
from rewards.task import Problem, get_task
from rollout.adapters import AdapterState, digest, read_peft_folder
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.lora import LoraSpec, spec_of_adapter

_SAMPLED_BYTES = 1 << 20
_WHOLE_FILE = 1_000_000_000


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from disk."""

    source: Path
    state: AdapterState
    peft_config: dict[str, Any]
    digest: str


def read_adapter(config: EvaluateConfig, run_dir: Path | None) -> Adapter | None:
    """The adapter that the settings name, or the run's own; None when only the base is evaluated.

    Raises:
        ConfigError: there is none where it should be, or nothing is left to evaluate.
        CheckpointError, DataError: it can't be read.
    """
    if config.adapter == NO_ADAPTER or (config.adapter is None and run_dir is None):
        if not config.base:
            raise ConfigError("base=false and no adapter leave nothing to evaluate; give adapter=FOLDER or --run RUN")
        return None
    folder = run_dir if config.adapter is None else Path(config.adapter).expanduser().absolute()
    assert folder is not None
    if (folder / "state.json").is_file():  # a checkpoint, which has sums of its files
        found = checkpoints.load(folder)
        return Adapter(folder / "adapter", found.adapter, found.peft_config, found.progress.adapter_digest)
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            state, peft_config = read_peft_folder(place)
            return Adapter(place, state, peft_config, digest(state))
    damaged: list[Exception] = []
    newest = checkpoints.newest_good(RunDirectory(folder).checkpoints_dir, on_damaged=damaged.append)
    if newest is not None:
        place = checkpoints.place(RunDirectory(folder).checkpoints_dir, newest.progress.iteration)
        return Adapter(place / "adapter", newest.adapter, newest.peft_config, newest.progress.adapter_digest)
    why = f" ({damaged[0]})" if damaged else ""
    raise ConfigError(
        f"no adapter in {folder}{why}: give the folder of a run, a checkpoint or a PEFT adapter, or adapter=none"
    )


def base_model(config: EvaluateConfig, run_dir: Path | None, adapter: Adapter | None) -> str:
    """Folder or hub name of the base: ``model.path``, or the one that the adapter was trained on, or else the small
    base of these settings, built when the cache doesn't have it."""
    if config.model.path is not None:
        return config.model.path
    named = adapter.peft_config.get("base_model_name_or_path") if adapter is not None else None
    # A run's own small base lies in a cache, which may have been emptied.
    if named and (run_dir is None or Path(named).is_dir()):
        return str(named)
    return str(ensure_base(config, config.model.cache_path, on_progress=print_progress))


def lora_spec(adapter: Adapter, model_path: str) -> LoraSpec:
    """The adapter's shape for the engine. Raises ConfigError when it needs what the engine's LoRA has not."""
    return spec_of_adapter(adapter.state, adapter.peft_config, policy_adapter(model_path), adapter.source)


def evaluated_problems(config: EvaluateConfig, *, on_event: Callable[[str, str, str], None]) -> list[Problem]:
    """The problems to decode; of the held-out split those of a run with these settings. Raises DataError or ConfigError
    when they can't be had, or two share an id."""
    data, task = config.data, get_task(config.task.name)
    seed = config.run.seed if data.seed is None else data.seed
    path = config.task.test_path if data.split == "test" else config.task.train_path
    wanted = data.size or config.evaluation.problems
    # The first that can be solved of as many as the run reads.
    size = max(wanted, config.task.test_size if data.split == "test" else config.task.train_size)
    if data.path is not None:
        path, wanted = str(Path(data.path).expanduser()), data.size or _WHOLE_FILE
        size = wanted
    problems = read_problems(task, data.split, seed=seed, size=size, path=path, on_event=on_event)[:wanted]
    if not problems or len({problem.id for problem in problems}) < len(problems):
        raise DataError(
            f"{len(problems)} problems of task {task.name} must be at least one, with an id of its own each"
        )
    return problems


def problems_that_fit(
    config: EvaluateConfig, problems: list[Problem], model_path: str, *, on_event: Callable[[str, str, str], None]
) -> list[Problem]:
    """Those whose prompt leaves room for a completion, as in a run. Raises ConfigError as ``fitting`` does."""
    kept = fitting(
        problems,
        get_task(config.task.name),
        load_tokenizer(model_path),
        completion_length=config.lengths[0],
        block_length=config.lengths[1],
        longest=policy_adapter(model_path).max_length,
        too_long=config.task.too_long,
        setting="decode.completion_length",
    )
    if len(kept) < len(problems):
        text = f"{len(problems) - len(kept)} of {len(problems)} problems leave no room for a completion"
        on_event("warning", "too_long", f"{text} and are left out")
    return kept


def trained_on(
    config: EvaluateConfig, problems: list[Problem], *, on_event: Callable[[str, str, str], None]
) -> int | None:
    """How many of the problems share their solution with a training problem of these settings; None when the training
    problems can't be had."""
    task = get_task(config.task.name)
    try:
        train, _ = task_problems(config, task, on_event=lambda level, kind, text: None)
    except (ConfigError, DataError) as error:
        on_event("warning", "leaks", f"whether the training problems overlap with these is unknown: {error}")
        return None
    seen = {task.leak_key(problem.fields) for problem in train}
    return sum(task.leak_key(problem.fields) in seen for problem in problems)


def fingerprint_model(model_path: str) -> str:
    """Names the weights in a folder: sizes, first and last MiB of its files; a hub name stands for itself."""
    folder = Path(model_path)
    if not folder.is_dir():
        return model_path
    sha = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
        if path.is_file():
            with open(path, "rb") as file:
                size = path.stat().st_size
                sha.update(f"{path.name}|{size}|".encode() + file.read(_SAMPLED_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                sha.update(file.read())
    return sha.hexdigest()[:16]


def fingerprint_problems(problems: list[Problem]) -> str:
    """Names the problems and their order."""
    text = json.dumps([[problem.id, problem.fields] for problem in problems], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
