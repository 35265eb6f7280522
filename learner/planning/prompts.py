"""How long prompts are: measured where tokenizer and problems are at hand, assumed otherwise."""

from pathlib import Path
from typing import TYPE_CHECKING

from learner.settings.run import RunConfig
from rewards.errors import UnmaskError, first_line
from rewards.task import Problem, Task, get_task

if TYPE_CHECKING:
    from rollout.models.encoding import EncodedPrompt

ASSUMED = 256
"""Tokens, where they can't be counted without a download."""
_SAMPLE = 64


def prompt_tokens(config: RunConfig) -> tuple[int, str]:
    """(tokens of the longest prompt, how that is known). Nothing is downloaded."""
    path = config.model.path
    if path is not None and not Path(path).expanduser().is_dir():
        return ASSUMED, "assumed; --prompt says better"
    try:
        task = get_task(config.task.name)
        problems = _problems(config, task)
        if not problems:
            return ASSUMED, "assumed; --prompt says better"
        prompts = _encoded(path, task, problems)
    except (UnmaskError, OSError) as error:
        return ASSUMED, f"assumed, since prompts can't be counted here ({first_line(error)})"
    known = f"the longest of {len(prompts)} of the task's"
    if any(prompt.gaps for prompt in prompts):
        known += ", whose gaps may be shorter than a completion is counted"
    return max(len(prompt.ids) for prompt in prompts), known


def _problems(config: RunConfig, task: Task) -> list[Problem]:
    """Some of the task's; none where they would have to be downloaded."""
    source = task.source("train", config.task.train_path)
    if source is not None and not Path(source).expanduser().is_file():
        return []
    size = min(_SAMPLE, config.task.train_size)
    return task.problems("train", seed=config.run.seed, size=size, path=source)[:_SAMPLE]


def _encoded(path: str | None, task: Task, problems: list[Problem]) -> list["EncodedPrompt"]:
    from rollout.models.encoding import encode, load_tokenizer
    from rollout.models.tokenizer import build_tokenizer

    tokenizer = build_tokenizer() if path is None else load_tokenizer(path)
    return [encode(tokenizer, task.prompt(problem.fields)) for problem in problems]
