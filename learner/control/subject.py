"""What a run learns, and on which base: loaded, and compared with what it was started with, before Ray starts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from learner.control.opening import FoundRun
from learner.ranks.rank import lora_spec
from learner.runs import checkpoint as checkpoints
from learner.runs import identity
from learner.runs.start import require_adapter_fits, starting_adapter
from learner.settings.run import RunConfig
from learner.small_base.base_model import base_name, ensure_base, print_progress
from learner.supply.judging import tried_judge
from learner.supply.problems import fitting, task_problems
from learner.supply.window import Supply
from rewards.errors import ConfigError
from rewards.task import Problem, Task
from rollout.adapters import AdapterState
from rollout.models.encoding import load_tokenizer
from rollout.models.family import PolicyAdapter, policy_adapter


@dataclass(frozen=True)
class Subject:
    """What a run learns."""

    task: Task
    train: list[Problem]
    held_out: list[Problem]
    adapter: AdapterState | None
    """What the ranks start with; None for a fresh adapter."""
    told: list[tuple[str, str, str]] = field(default_factory=list)
    """Events that came before there was a reporter: level, kind, text."""


@dataclass(frozen=True)
class Grounds:
    """A subject and the base model that learns it."""

    subject: Subject
    model_path: str
    family: PolicyAdapter
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, Any]


def subject_of(config: RunConfig, found: FoundRun) -> Subject:
    """Problems and adapter of a run.

    Raises:
        ConfigError, CheckpointError: the settings would make a run that goes on another one, or the judge that they
            name gives no score.
        DataError: the problems, or the adapter, can't be used.
    """
    if found.resumed is not None:
        identity.require_fixed_settings(found.run_dir.path, found.resumed.progress, config)
        checkpoints.require_layout(found.resumed.progress, checkpoints.layout_of(config.learner))
        _require_new_groups(config, found.resumed.progress)
    told: list[tuple[str, str, str]] = []
    task = config.task.load()
    for setting, part in config.objective.reward_parts().items():
        if part not in task.components:
            raise ConfigError(
                f"objective.{setting}={part} is no component of {config.task.name}'s reward; take one of "
                f"{', '.join(task.components)}"
            )
    train, held_out = task_problems(config, task, on_event=lambda *event: told.append(event))
    if (judge := tried_judge(config.task.judge, [*train, *held_out])) is not None:
        told.append(("info", "judge", judge))
    if found.resumed is not None:
        return Subject(task, train, held_out, found.resumed.adapter, told)
    return Subject(task, train, held_out, starting_adapter(config.lora, config.learner.dtype), told)


def grounds_of(config: RunConfig, subject: Subject, found: FoundRun) -> Grounds:
    """The subject on its base, which is built where the cache doesn't have it.

    Raises:
        ConfigError, CheckpointError: the base is another one than a run that goes on was started with; the problems, or
            the adapter to start from, don't fit it.
        WaitTimeout: see ``ensure_base``.
    """
    resumed = found.resumed
    if resumed is not None and config.model.path is None:
        identity.require_small_base(resumed.progress, base_name(config))
    path = config.model.path or str(ensure_base(config, config.model.cache_path, on_progress=print_progress))
    family, tokenizer = policy_adapter(path), load_tokenizer(path)
    subject = _that_fits(config, subject, family, tokenizer)
    is_now = {
        **identity.fixed_settings(config),
        "base": identity.base_digest(path),
        "small_base": None if config.model.path else Path(path).name,
        "data": identity.problems_digest(subject.train),
        "evaluated": identity.evaluation_digest(config, subject.held_out),
    }
    if resumed is not None:
        identity.require_same(resumed.progress, is_now)
    elif subject.adapter is not None:
        require_adapter_fits(config.lora, subject.adapter, path, lora_spec(config))
    return Grounds(subject, path, family, tokenizer, is_now)


def _require_new_groups(config: RunConfig, progress: checkpoints.Progress) -> None:
    """Refuses fewer groups an iteration where the next ones would be numbered, and so drawn, as earlier ones were.
    Raises ConfigError."""
    if not progress.ledger:
        return
    n, issued = config.rollout.prompts_per_iteration, progress.ledger["last_iteration"] + 1
    used = progress.ledger["last_group_id"] + 1
    if Supply(n, config.objective.phases()).group_ids(issued).start < used:
        raise ConfigError(
            f"rollout.prompts_per_iteration={n} would draw groups again that the {issued} iterations so far drew; take "
            f"{-(-used // issued)} or more, {identity.ANEW}"
        )


def _that_fits(
    config: RunConfig, subject: Subject, family: PolicyAdapter, tokenizer: PreTrainedTokenizerBase
) -> Subject:
    """Without the problems that are too long, as ``task.too_long`` says."""
    kept = []
    for what, problems in (("training", subject.train), ("held-out", subject.held_out)):
        kept.append(
            fitting(
                problems,
                subject.task,
                tokenizer,
                completion_length=config.rollout.sampler.completion_length,
                block_length=config.rollout.sampler.block_length,
                longest=family.max_length,
                too_long=config.task.too_long,
            )
        )
        if left_out := len(problems) - len(kept[-1]):
            text = f"{left_out} of {len(problems)} {what} problems leave no room for a completion and are left out"
            subject.told.append(("warning", "too_long", text))
    train, held_out = kept
    return replace(subject, train=train, held_out=held_out)
