"""Checkpoints: everything a run needs to go on as if it had not stopped, in safetensors and JSON.

A checkpoint is a folder ``iteration-000040`` with the adapter in PEFT format, one optimizer shard per rank, and
``state.json``; of a method that learns in phases also ``phase-*`` (its teacher, the running mean of its weights) and
``buffer`` (the groups that it learns from). ``manifest.json`` holds the sha256 of every other file. The folder appears
by one rename, so it is there whole or not at all. Random generators have no state to save: every stream is derived from
its name (``rollout.seeds``), and the names (run seed, group ids, versions) are in the settings and in ``state.json``.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from learner.runs.atomic import atomic_dir
from learner.settings.saved import checkpoints_in, iteration_of
from learner.settings.sections import GroupSection
from rewards.errors import CheckpointError, DataError, WeightMismatch
from rollout.adapters import AdapterState, digest, pack, read_peft_folder, unpack, write_peft_folder
from rollout.trajectory import TrajectoryGroup

FORMAT = 2
_PREFIX = "iteration-"
_PHASE = "phase-"
_BUFFER = "buffer"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an iteration; the JSON part of a checkpoint."""

    iteration: int
    """iterations completed"""
    policy_version: int
    adapter_digest: str
    updates: int
    """optimizer updates taken"""
    nonfinite_in_a_row: int
    ledger: dict[str, Any]
    layout: dict[str, Any]
    """ranks, zero_stage, dtype: an optimizer shard fits no other"""
    best: dict[str, Any]
    """iteration and solve rate of the best evaluation so far; empty before the first"""
    evaluations: dict[str, Any]
    """evaluations that the summary needs, by name (base, ...)"""
    evaluated_at: int
    """iteration of the newest evaluation of trained weights; 0 before the first"""
    train_seconds: float
    identity: dict[str, Any] = field(default_factory=dict)
    """What the run learns, and from what (``learner.runs.identity``); empty in a checkpoint of an older Unmask."""

    @classmethod
    def before_the_first(cls, layout: dict[str, Any], identity: dict[str, Any]) -> "Progress":
        """Where a new run stands."""
        return cls(
            iteration=0,
            policy_version=0,
            adapter_digest="",
            updates=0,
            nonfinite_in_a_row=0,
            ledger={},
            layout=layout,
            best={},
            evaluations={},
            evaluated_at=0,
            train_seconds=0.0,
            identity=identity,
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    progress: Progress
    adapter: AdapterState
    peft_config: dict[str, Any]
    shards: Sequence[bytes]
    phase: Mapping[str, AdapterState] = field(default_factory=dict)
    """Weights beside the trained ones, of a method that learns in phases."""
    buffer: Sequence[TrajectoryGroup] = ()
    """The groups that such a method learns from, by ascending group id."""


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below ``folder`` and return its path; an older one of the same iteration is replaced."""
    path = place(folder, checkpoint.progress.iteration)
    with atomic_dir(path) as inside:
        (inside / "adapter").mkdir()
        write_peft_folder(inside / "adapter", checkpoint.adapter, checkpoint.peft_config)
        for rank, shard in enumerate(checkpoint.shards):
            (inside / f"optimizer-{rank:04d}.safetensors").write_bytes(shard)
        for name, state in checkpoint.phase.items():
            tensors = {parameter: unpack(tensor) for parameter, tensor in state.items()}
            save_file(tensors, inside / f"{_PHASE}{name}.safetensors")
        for group in checkpoint.buffer:
            (inside / _BUFFER).mkdir(exist_ok=True)
            group.save(inside / _BUFFER / f"{group.group_id:08d}.safetensors")
        (inside / "state.json").write_text(json.dumps(asdict(checkpoint.progress), indent=2) + "\n")
        sums = {name: _sha256(inside / name) for name in _files(inside)}
        manifest = {"format": FORMAT, "sha256": sums}
        (inside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return path


def place(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies below ``folder``."""
    return folder / f"{_PREFIX}{iteration:06d}"


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: when it is damaged, naming the file.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {manifest['format']}, this version reads {FORMAT}")
        for name, expected in manifest["sha256"].items():
            if _sha256(path / name) != expected:
                raise CheckpointError(f"{path / name} is damaged (its sha256 is not the recorded one)")
        progress = Progress(**json.loads((path / "state.json").read_text()))
        adapter, peft_config = read_peft_folder(path / "adapter")
        names = sorted(manifest["sha256"])
        shards = [(path / name).read_bytes() for name in names if name.startswith("optimizer-")]
        phase = {
            name.removeprefix(_PHASE).removesuffix(".safetensors"): pack(load_file(path / name))
            for name in names
            if name.startswith(_PHASE)
        }
        buffer = [TrajectoryGroup.load(path / name) for name in names if name.startswith(f"{_BUFFER}/")]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, DataError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from error
    if digest(adapter) != progress.adapter_digest:
        raise CheckpointError(f"the adapter in {path} is not the one that its state.json names")
    ranks = progress.layout.get("ranks")
    if len(shards) != ranks:
        raise CheckpointError(f"{path} holds {len(shards)} optimizer shards of {ranks} ranks")
    return Checkpoint(progress, adapter, peft_config, shards, phase, buffer)


def newest_good(folder: Path, *, on_damaged: Callable[[CheckpointError], None]) -> Checkpoint | None:
    """The newest checkpoint below ``folder`` that reads whole; damaged ones on the way are reported, not hidden."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            on_damaged(error)
    return None


def prune(folder: Path, *, keep: int, best_iteration: int | None) -> list[int]:
    """Delete all but the ``keep`` newest checkpoints and the best one; the iterations of those deleted."""
    paths = checkpoints_in(folder)
    best = place(folder, best_iteration) if best_iteration is not None else None
    old = [path for path in paths[: max(0, len(paths) - keep)] if path != best]
    for path in old:
        shutil.rmtree(path)
    return [iteration_of(path) for path in old]


def later_than(folder: Path, iteration: int) -> list[Path]:
    """The checkpoints of later iterations, oldest first."""
    return [path for path in checkpoints_in(folder) if iteration_of(path) > iteration]


def layout_of(learner: GroupSection) -> dict[str, Any]:
    """The settings that an optimizer shard depends on."""
    return {"ranks": learner.ranks, "zero_stage": learner.zero_stage, "dtype": learner.dtype}


def require_layout(progress: Progress, layout: dict[str, Any]) -> None:
    """Refuse to continue with optimizer shards of another layout.

    Raises:
        CheckpointError: naming the setting that changed.
    """
    for key, value in layout.items():
        if progress.layout.get(key) != value:
            raise CheckpointError(
                f"the checkpoint of iteration {progress.iteration} has learner.{key}={progress.layout.get(key)}, this "
                f"run has {value}; set it back, or start a new run with lora.adapter=<checkpoint>/adapter"
            )


def require_adapter(progress: Progress, held: str) -> None:
    """Refuse to continue with ranks that hold another adapter, by its digest, than the checkpoint's.

    Raises:
        WeightMismatch: naming both.
    """
    if held != progress.adapter_digest:
        raise WeightMismatch(f"the ranks hold adapter {held[:12]}, the checkpoint has {progress.adapter_digest[:12]}")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
