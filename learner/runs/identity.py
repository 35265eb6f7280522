"""What makes a run itself. A run that goes on must learn the same thing from the same: the base that its adapter
belongs to, the adapter's shape, the problems, the seed that split them, the method; of one that learns in phases also
what its buffer and weights were made with; the thresholds that a learned law is of. All else may change, and is told.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learner.runs import checkpoint as checkpoints
from learner.settings.arguments import flat
from learner.settings.run import RunConfig
from learner.settings.saved import saved_settings
from rewards.errors import CheckpointError, ConfigError
from rewards.section import Section
from rewards.task import Problem
from rollout.models.family import read_config

_FIXED = (
    *("run.seed", "task.name", "objective.type", "model.quantization"),
    *("lora.r", "lora.alpha", "lora.include_head", "lora.target_modules", "lora.adapter"),
)
_OF_A_BUFFER = ("rollout.prompts_per_iteration", "rollout.group_size", "rollout.sampler.", "learner.updates_per_batch")
"""Of a method that learns in phases: how the groups of its buffer, and its updates, were numbered and drawn."""
_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
_WHOLE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
ANEW = "or start a new run with lora.adapter=<checkpoint>/adapter"
"""How a refusal of a resume ends."""


def fixed_settings(config: Section) -> dict[str, Any]:
    """The settings that a run keeps, by dotted key."""
    settings, kept = flat(config.model_dump(mode="json")), [*_FIXED, "model.base."]
    if isinstance(config, RunConfig):
        kept += [f"objective.{name}" for name in config.objective.fixed]
        kept += ["rollout.sampler.threshold"] if config.objective.learns_thresholds() else []
        kept += _OF_A_BUFFER if config.objective.phases() is not None else ()
    sections = tuple(key for key in kept if key.endswith("."))
    return {key: value for key, value in settings.items() if key in kept or key.startswith(sections)}


def require_fixed_settings(run: Path, progress: checkpoints.Progress, config: Section) -> None:
    """Refuse to go on with other settings than the run was started with, where they would make it another run.

    Raises:
        ConfigError: one sentence (one line) per setting.
    """
    before = flat(saved_settings(run)) | progress.identity
    problems = [
        f"{key}={json.dumps(now)} would make {run.name} another run, which was started with {json.dumps(before[key])}; "
        f"leave it as it was, {ANEW}"
        for key, now in fixed_settings(config).items()
        if key in before and before[key] != now
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def require_same(progress: checkpoints.Progress, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another base or other problems than the checkpoint was made with.

    Raises:
        CheckpointError: naming which.
    """
    held = progress.identity
    if held.get("base", identity["base"]) != identity["base"]:
        raise CheckpointError(
            f"the base model's files are not those that the checkpoint of iteration {progress.iteration} was trained "
            f"on; restore them, {ANEW}"
        )
    if held.get("data", identity["data"]) != identity["data"]:
        raise CheckpointError(
            f"the training data are not those that the checkpoint of iteration {progress.iteration} was trained on "
            f"(task.train_path, task.train_size, or what the file holds); restore them, {ANEW}"
        )


def require_small_base(progress: checkpoints.Progress, name: str) -> None:
    """Refuse to go on where the settings ask for another small base, by its name, before that is built.

    Raises:
        ConfigError: naming both.
    """
    held = progress.identity.get("small_base") or name
    if held != name:
        raise ConfigError(
            f"these settings ask for the small base {name}, and the run was started on {held}; leave "
            f"rollout.sampler.completion_length and what makes the training problems as they were, {ANEW}"
        )


def base_digest(model_path: str) -> str:
    """Names the model in a folder by its weights, sizes and tokenizer; a name of the hub stands for itself, at the
    commit that it means now. Raises ConfigError when there is no readable config.json."""
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        return f"{model_path}@{read_config(model_path).get('_commit_hash')}"
    sha = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *(folder / name for name in _FILES)]):
        if path.is_file():
            sha.update(f"{path.name}|".encode() + _content(path))
    return sha.hexdigest()


def problems_digest(problems: Sequence[Problem]) -> str:
    """Names the problems and their order."""
    text = json.dumps([[problem.id, problem.fields] for problem in problems], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def evaluation_digest(config: RunConfig, held_out: Sequence[Problem]) -> str:
    """Names what an evaluation measures: two with the same can be compared."""
    section, judge = config.evaluation, config.task.judge
    how: list[Any] = [config.rollout.sampler.steps, sorted(section.step_divisors), section.position_rule]
    how += [judge.meaning] if judge.right_from is not None and judge.meaning else []  # the verdicts are the judge's
    return hashlib.sha256(json.dumps([problems_digest(held_out), how]).encode()).hexdigest()


def _content(path: Path) -> bytes:
    if path.name == "config.json":  # every version of transformers writes its own number into it
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("transformers_version", None)
        return json.dumps(values, sort_keys=True).encode()
    size, sha = path.stat().st_size, hashlib.sha256()
    sha.update(f"{size}|".encode())
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        # As many bytes of a large file, spread over it: reading all of it would take longer than loading it.
        count = _WHOLE_BYTES // _PIECE_BYTES
        for piece in range(count):
            file.seek((size - _PIECE_BYTES) * piece // (count - 1))
            sha.update(file.read(_PIECE_BYTES))
    return sha.digest()
