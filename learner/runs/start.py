"""What a run starts from: its directory, its checkpoint, its problems, its adapter."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from learner.runs import checkpoint as checkpoints
from learner.runs.directory import RunDirectory
from learner.settings.arguments import flat
from learner.settings.run import RunConfig
from learner.settings.sections import GroupSection, LoraSection, ModelSection, ResourcesSection, RunPlace, Section
from rewards.errors import CheckpointError, ConfigError
from rewards.task import Problem, Task
from rollout.adapters import AdapterState, read_peft_folder
from rollout.models.encoding import encode_prompt
from rollout.models.quantization import require_bitsandbytes

_OF_A_START = ("run.resume", "run.dashboard", "run.shared")
"""Settings that say nothing about the run itself."""


def open_run(
    run: RunPlace, *, kind: Literal["run", "sft"], label: str
) -> tuple[RunDirectory, checkpoints.Checkpoint | None]:
    """The run's directory, locked, and the checkpoint that it goes on from (None for a new run).

    ``run.resume=auto`` takes the newest good checkpoint of the run named, or of the newest run in ``run.dir`` that has
    one; a run named that ended before its first checkpoint begins again. A path goes on from that checkpoint in its own
    run directory. A run of the other ``kind`` is passed over, or refused when it was named.

    Args:
        label: goes into the name of a run that is given none.

    Raises:
        CheckpointError: when the checkpoint named is damaged, or none of a run's checkpoints is good.
        ConfigError: when the directory is taken, or its run is of the other kind.
    """
    base, resume = Path(run.dir).expanduser(), run.resume
    if resume == "never":
        return RunDirectory.create(base, run.name, label=label, shared=run.shared), None
    if resume != "auto":
        path = Path(resume).expanduser().absolute()
        found = checkpoints.load(path)
        _require_kind(path.parent.parent, kind)
        return RunDirectory.open(path.parent.parent), found
    existing = _newest_run(base, run.name, kind)
    if existing is None:
        if run.name is None or not RunDirectory(base / run.name).config_path.is_file():
            return RunDirectory.create(base, run.name, label=label, shared=run.shared), None
        _require_kind(base / run.name, kind)
        run_dir = RunDirectory.open(base / run.name)
        print(f"{run_dir.path} has no checkpoint yet; the run begins again, from the start", flush=True)
        return run_dir, None
    _require_kind(existing, kind)
    run_dir = RunDirectory.open(existing)
    damaged: list[CheckpointError] = []
    found_or_none = checkpoints.newest_good(run_dir.checkpoints_dir, on_damaged=damaged.append)
    for error in damaged:
        print(f"warning: {error}; taking the checkpoint before it", flush=True)
    if found_or_none is None:
        run_dir.close()
        raise CheckpointError(
            f"{existing} has no good checkpoint to resume from; start a new run with run.resume=never"
        )
    return run_dir, found_or_none


def changed_settings(run_dir: RunDirectory, config: Section) -> list[str]:
    """Settings that differ from those the run was started with, as ``key: old -> new``."""
    try:
        before = json.loads(run_dir.config_path.read_text())
    except (OSError, ValueError) as error:
        return [f"the earlier settings can't be read ({error})"]
    old, new = flat(before), flat(config.model_dump(mode="json"))
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key) and key not in _OF_A_START)
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def task_problems(
    config: RunConfig, task: Task, *, on_event: Callable[[str, str, str], None]
) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, which share no solution.

    Raises:
        DataError: when a file can't be used, or the splits overlap.
    """
    seed, paths = config.run.seed, config.task
    train = task.problems("train", seed=seed, size=paths.train_size, path=paths.train_path)
    test = task.problems("test", seed=seed, size=paths.test_size, path=paths.test_path)
    if task.source("train", paths.train_path) is not None:
        kept = task.without_leaks(train, test)
        if len(kept) < len(train):
            dropped = f"{len(train) - len(kept)} of {len(train)} training problems"
            on_event("info", "leaks", f"{dropped} share a solution with a held-out one and are left out")
        train = kept
    task.check_disjoint(train, test)
    return train, test[: config.evaluation.problems]


def check_quantization(model: ModelSection, learner: GroupSection, resources: ResourcesSection) -> None:
    """Refuses a quantized base where bitsandbytes is missing, or can't do it on a device of the run. Raises
    ConfigError."""
    if model.quantization is None:
        return
    gpus = learner.device == "cuda" or resources.gpus_per_rank > 0 or resources.gpus_per_actor > 0
    require_bitsandbytes(model.quantization, "cuda" if gpus else "cpu")


def check_lengths(
    problems: Iterable[Problem],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_length: int,
    longest: int | None,
) -> None:
    """Refuses prompts that leave no room for a completion, before an actor or rank finds out. Raises ConfigError.

    longest: tokens that a sequence of the model may have; None when it doesn't say.
    """
    if longest is None:
        return
    for problem in problems:
        prompt = len(encode_prompt(tokenizer, task.messages(problem.fields)))
        if prompt + completion_length > longest:
            raise ConfigError(
                f"the prompt of problem {problem.id} has {prompt} tokens, which with "
                f"rollout.sampler.completion_length={completion_length} is more than the {longest} positions of the "
                "model; lower completion_length, leave long problems out, or take a model with a longer context"
            )


def starting_adapter(lora: LoraSection) -> AdapterState | None:
    """The adapter that ``lora.adapter`` names; None for a fresh one.

    Raises:
        ConfigError: when it has another shape than the settings say.
    """
    if lora.adapter is None:
        return None
    state, stored = read_peft_folder(Path(lora.adapter).expanduser())
    if (stored.get("r"), float(stored.get("lora_alpha", 0))) != (lora.r, lora.alpha):
        have = f"r={stored.get('r')}, alpha={stored.get('lora_alpha')}"
        now = f"lora.r={lora.r}, lora.alpha={lora.alpha}"
        raise ConfigError(f"the adapter at {lora.adapter} has {have} and the settings say {now}; make them equal")
    return state


def _newest_run(base: Path, name: str | None, kind: str) -> Path | None:
    if name is not None:
        candidates = [base / name]
    else:
        found = [path for path in base.glob("*") if path.is_dir() and _kind(path) in (None, kind)]
        candidates = sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)
    return next((path for path in candidates if checkpoints.saved(path / "checkpoints")), None)


def _kind(path: Path) -> str | None:
    """Of a run's directory: sft when its settings have that section; None when they can't be read."""
    try:
        return "sft" if "sft" in json.loads(RunDirectory(path).config_path.read_text()) else "run"
    except (OSError, ValueError):
        return None


def _require_kind(path: Path, kind: str) -> None:
    if _kind(path) not in (None, kind):
        right = "main" if kind == "sft" else "sft"
        raise ConfigError(f"{path} is a run of python -m learner.{right} and can only be resumed with that")
