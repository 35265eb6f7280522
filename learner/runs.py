"""What a run starts from: its directory, its checkpoint, its problems, its adapter."""

import json
from collections.abc import Callable
from pathlib import Path

from learner import checkpoint as checkpoints
from learner.config import RunConfig
from learner.rundir import RunDirectory
from rewards.errors import CheckpointError, ConfigError
from rewards.task import Problem, Task
from rollout.adapters import AdapterState, read_peft_folder


def open_run(config: RunConfig) -> tuple[RunDirectory, checkpoints.Checkpoint | None]:
    """The run's directory, locked, and the checkpoint that it goes on from (None for a new run).

    ``run.resume=auto`` takes the newest good checkpoint of the run named, or of the newest run in ``run.dir`` that has
    one; a run named that ended before its first checkpoint begins again. A path goes on from that checkpoint in its own
    run directory.

    Raises:
        CheckpointError: when the checkpoint named is damaged, or none of a run's checkpoints is good.
        ConfigError: when the directory is taken.
    """
    base, resume = Path(config.run.dir).expanduser(), config.run.resume
    if resume == "never":
        return RunDirectory.create(base, config.run.name, label=config.task.name), None
    if resume != "auto":
        path = Path(resume).expanduser().absolute()
        found = checkpoints.load(path)
        return RunDirectory.open(path.parent.parent), found
    existing = _newest_run(base, config.run.name)
    if existing is None:
        if config.run.name is None or not RunDirectory(base / config.run.name).config_path.is_file():
            return RunDirectory.create(base, config.run.name, label=config.task.name), None
        run_dir = RunDirectory.open(base / config.run.name)
        print(f"{run_dir.path} has no checkpoint yet; the run begins again, from the start", flush=True)
        return run_dir, None
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


def changed_settings(run_dir: RunDirectory, config: RunConfig) -> list[str]:
    """Settings that differ from those the run was started with, as ``key: old -> new``."""
    try:
        before = json.loads(run_dir.config_path.read_text())
    except (OSError, ValueError) as error:
        return [f"the earlier settings can't be read ({error})"]
    old, new = _flat(before), _flat(config.model_dump(mode="json"))
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key) and key != "run.resume")
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
    if paths.train_path is not None:
        kept = task.without_leaks(train, test)
        if len(kept) < len(train):
            dropped = f"{len(train) - len(kept)} of {len(train)} training problems"
            on_event("info", "leaks", f"{dropped} share a solution with a held-out one and are left out")
        train = kept
    task.check_disjoint(train, test)
    return train, test[: config.evaluation.problems]


def starting_adapter(config: RunConfig) -> AdapterState | None:
    """The adapter that ``lora.adapter`` names; None for a fresh one.

    Raises:
        ConfigError: when it has another shape than the settings say.
    """
    if config.lora.adapter is None:
        return None
    state, stored = read_peft_folder(Path(config.lora.adapter).expanduser())
    if (stored.get("r"), float(stored.get("lora_alpha", 0))) != (config.lora.r, config.lora.alpha):
        have = f"r={stored.get('r')}, alpha={stored.get('lora_alpha')}"
        now = f"lora.r={config.lora.r}, lora.alpha={config.lora.alpha}"
        raise ConfigError(
            f"the adapter at {config.lora.adapter} has {have} and the settings say {now}; make them equal"
        )
    return state


def _newest_run(base: Path, name: str | None) -> Path | None:
    if name is not None:
        candidates = [base / name]
    else:
        candidates = sorted((p for p in base.glob("*") if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    return next((path for path in candidates if checkpoints.saved(path / "checkpoints")), None)


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
