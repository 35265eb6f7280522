"""The problems of a run: read or generated, and what is left out of them, counted and told."""

import json
from collections.abc import Callable, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from learner.settings.run import RunConfig
from rewards.errors import ConfigError, DataError
from rewards.task import InfillTask, Problem, Split, Task
from rollout.models.encoding import encode
from rollout.spans import positions_needed

_NAMES: dict[Split, str] = {"train": "training", "test": "held-out"}


def task_problems(
    config: RunConfig, task: Task, *, on_event: Callable[[str, str, str], None]
) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, which share no solution. Of those that are read, the ones without any solution
    are left out, and repeated ones are counted.

    Raises:
        DataError: when a file can't be used, or the splits overlap.
    """
    paths, seed = config.task, config.run.seed
    if (decided := task.verdicts_by()) is not None:
        on_event("info", "verdicts", f"right is {decided}")
    train = read_problems(task, "train", seed=seed, size=paths.train_size, path=paths.train_path, on_event=on_event)
    test = read_problems(task, "test", seed=seed, size=paths.test_size, path=paths.test_path, on_event=on_event)
    if task.source("train", config.task.train_path) is not None:
        kept = task.without_leaks(train, test)
        if len(kept) < len(train):
            dropped = f"{len(train) - len(kept)} of {len(train)} training problems"
            on_event("info", "leaks", f"{dropped} share a solution with a held-out one and are left out")
        train = kept
    task.check_disjoint(train, test)
    return train, test[: config.evaluation.problems]


def fitting(
    problems: Sequence[Problem],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_length: int,
    block_length: int | None = None,
    longest: int | None,
    too_long: Literal["refuse", "drop"] = "refuse",
    setting: str = "rollout.sampler.completion_length",
) -> list[Problem]:
    """The problems whose prompt leaves room for a completion, and whose gaps have room in one.

    Args:
        block_length: None for one block.
        longest: tokens that a sequence of the model may have; None when it doesn't say.
        too_long: what is done when there are others (``task.too_long``).
        setting: the key that ``completion_length`` comes from.

    Raises:
        ConfigError: there are others, and they are refused or nothing else is left; before an actor or rank finds out.
    """
    if longest is None and not isinstance(task, InfillTask):
        return list(problems)
    kept = []
    for problem in problems:
        prompt = encode(tokenizer, task.prompt(problem.fields))
        tokens, written = len(prompt.ids), completion_length
        if prompt.gaps:
            written = positions_needed(prompt.gaps, block_length or completion_length, completion_length)
        fault = None
        if written > completion_length:
            fault = (
                f"the gaps of problem {problem.id} take {written} positions, and {setting} is {completion_length}; "
                "raise it (each gap begins a block of its own)"
            )
        elif longest is not None and tokens + written > longest:
            fault = (
                f"the prompt of problem {problem.id} has {tokens} tokens, which with "
                f"{setting}={completion_length} is more than the {longest} positions of the model; lower "
                "completion_length, set task.too_long=drop to leave such problems out, or take a model with a longer "
                "context"
            )
        if fault is None:
            kept.append(problem)
        elif too_long == "refuse":
            raise ConfigError(fault)
    if problems and not kept:
        room = "" if longest is None else f" in the {longest} positions of the model"
        raise ConfigError(
            f"none of {len(problems)} prompts leaves room for {setting}={completion_length}{room}; change "
            "completion_length, or take a model with a longer context"
        )
    return kept


def read_problems(
    task: Task, split: Split, *, seed: int, size: int, path: str | None, on_event: Callable[[str, str, str], None]
) -> list[Problem]:
    """A split's first ``size`` problems, without those that have no solution; these and repeated ones are counted.
    Generated problems have neither.

    Raises:
        DataError: they can't be read, or none has a solution.
    """
    problems = task.problems(split, seed=seed, size=size, path=path)
    if task.source(split, path) is None:
        return problems
    what = f"of {len(problems)} {_NAMES[split]} problems"
    solvable = [problem for problem in problems if task.solvable(problem.fields)]
    if not solvable:
        raise DataError(f"none {what} has a solution; give others")
    if len(solvable) < len(problems):
        on_event("warning", "unsolvable", f"{len(problems) - len(solvable)} {what} have no solution and are left out")
    different = {json.dumps(task.messages(problem.fields)) for problem in solvable}
    if len(different) < len(solvable):
        text = f"{len(solvable) - len(different)} {what} ask what another one asks, and are drawn like all others"
        on_event("warning", "duplicates", text)
    return solvable
