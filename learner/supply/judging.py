"""Whether a run's judge answers, found out before anything expensive begins."""

import time
from collections.abc import Sequence

from rewards.errors import ConfigError
from rewards.judge.reply import JudgeFailed
from rewards.judge.settings import JudgeSettings
from rewards.task import Problem


def tried_judge(settings: JudgeSettings, problems: Sequence[Problem]) -> str | None:
    """What to tell of a judge that has scored a completion of ours; None where none is named.

    Raises:
        ConfigError: it gave no score, or the problems lack a field that it is to be shown.
    """
    if settings.model is None:
        return None
    for problem in problems:
        if missing := [name for name in settings.fields if name not in problem.fields]:
            raise ConfigError(
                f"task.judge.fields names {missing[0]}, which problem {problem.id} doesn't have; take of "
                f"{', '.join(problem.fields)}"
            )
    from rewards.judge.judge import try_out  # its HTTP library takes a while to load

    begin = time.perf_counter()
    try:
        score = try_out(settings)
    except JudgeFailed as error:
        raise ConfigError(f"{error}; task.judge.url, model and key_variable say who is asked") from None
    how = "expectations by log-probabilities" if score.expected else "numbers as written"
    return (
        f"judge {settings.model} at {settings.url} answers in {time.perf_counter() - begin:.2f} s; its scores are {how}"
    )
