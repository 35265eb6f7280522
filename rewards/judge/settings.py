"""What a judge is asked, where, and with what patience (``task.judge.*``).

The text under a field is its help; it names the unit.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from rewards.errors import ConfigError
from rewards.section import Section

HIGHEST = 100
_MEANING = {"model", "url", "rubric", "lowest", "highest", "weight", "right_from", "fields", "logprobs", "request"}
_NO_MODEL = "task.judge.rubric is set and task.judge.model is not; name the model, or leave both null"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}", re.ASCII)


class JudgeSettings(Section):
    """A judge, and the part of the reward, ``judge``, that it gives."""

    model: str | None = None
    """Name of the judging model, as its server knows it; null: nothing is judged."""
    url: str = "http://127.0.0.1:8000/v1"
    """Address of an OpenAI-compatible server, up to and with /v1 (vLLM, Ollama, a hosted one)."""
    key_variable: str | None = None
    """Name of the environment variable that holds the server's key, where the graders run; null: no key is sent."""
    rubric: str | None = None
    """What makes a completion good, in words, for the judge."""
    lowest: NonNegativeInt = 1
    """Score of the worst completion, a whole number."""
    highest: PositiveInt = 5
    """Score of the best. Up to 9, a score is one token, and log-probabilities are used where the server gives them."""
    weight: PositiveFloat = 1.0
    """Reward of the best score; that of the worst is 0, and between them it is linear."""
    right_from: PositiveFloat | None = None
    """Score from which on a completion counts as right; null: the verdict is the task's own."""
    fields: tuple[str, ...] = ()
    """Fields of the problem that the judge is shown beside the prompt, such as [answer]."""
    logprobs: bool = True
    """Ask for log-probabilities, and take the expected score where they come; false: take the score as written."""
    request: dict[str, JsonValue] = {}
    """More fields of the request, laid over ours; null takes one of ours out: {max_tokens: null, top_p: 0.9}."""
    timeout_s: PositiveFloat = 60.0
    """Seconds for one completion's score, waiting for a free place and all tries included; then it is dropped."""
    try_timeout_s: PositiveFloat = 30.0
    """Seconds for one answer of the server."""
    tries: PositiveInt = 4
    """How often a server is asked at most, which fails, is busy (429, 5xx) or answers with something else."""
    concurrency: PositiveInt = 16
    """Questions in flight at most, from all graders that share cache_dir."""
    cache: bool = True
    """Keep scores on disk, so that the same completion of the same problem is judged once."""
    cache_dir: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    """Folder of kept scores; null: the environment variable UNMASK_CACHE, or ~/.cache/unmask."""

    @property
    def folder(self) -> Path:
        """Absolute folder of kept scores, and of what counts the questions in flight."""
        return (
            Path(self.cache_dir or os.environ.get("UNMASK_CACHE") or "~/.cache/unmask").expanduser().absolute()
            / "judge"
        )

    @property
    def meaning(self) -> dict[str, Any]:
        """What a score depends on, as JSON values; the rest is patience. Empty without a judge."""
        return {} if self.model is None else self.model_dump(mode="json", include=_MEANING)

    def problems(self) -> list[str]:
        """What contradicts itself or can't be used, each as one sentence."""
        if self.model is None:
            return [_NO_MODEL] if self.rubric else []
        problems = [*_url_problems(self.url)]
        if not self.rubric or not self.rubric.strip():
            problems.append("task.judge.rubric is missing; say in words what makes a completion good")
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            # It may be the key itself, so it isn't repeated.
            problems.append("task.judge.key_variable is no name of an environment variable; put the key into one")
        if not self.lowest < self.highest <= HIGHEST:
            problems.append(
                f"task.judge.lowest={self.lowest} and task.judge.highest={self.highest} make no scale; take whole "
                f"numbers from 0 to {HIGHEST}, the lowest first"
            )
        elif self.right_from is not None and not self.lowest < self.right_from <= self.highest:
            problems.append(
                f"task.judge.right_from={self.right_from:g} parts nothing on a scale from {self.lowest} to "
                f"{self.highest}; take a score above the lowest"
            )
        return problems


UNJUDGED = JudgeSettings()


def read_settings(text: str) -> JudgeSettings:
    """A judge's settings from JSON, ``{"model": "...", "rubric": "..."}``. Raises ConfigError."""
    try:
        return JudgeSettings.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ConfigError(f"the judge's settings can't be used: {where}: {first['msg']} (docs/tasks.md)") from None


def _url_problems(url: str) -> list[str]:
    """A password or key in it is not repeated."""
    try:
        parts = urlsplit(url)
        plain = url.isascii() and url.isprintable() and " " not in url
        whole = plain and parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        whole = False
    if whole and (parts.username or parts.password or parts.query or parts.fragment):
        return [
            "task.judge.url holds more than an address; put a key into the variable that task.judge.key_variable names"
        ]
    return [] if whole else ["task.judge.url must be an address such as http://127.0.0.1:8000/v1"]
