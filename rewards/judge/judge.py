"""A judge in one process: what it was asked before is taken from disk."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.judge.cache import Cache
from rewards.judge.client import Client
from rewards.judge.question import digest, request_body
from rewards.judge.reply import Score
from rewards.judge.settings import JudgeSettings
from rewards.parsing import without_special_tokens

_FORMAT = 1
"""Of what kept scores mean; another one finds none of them."""


class Judge:
    """Raises ConfigError as ``Client`` and ``Cache`` do."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._client = Client(settings)
        self._cache = Cache(settings.folder / "scores") if settings.cache else None
        self._runner = asyncio.Runner()

    def score(self, prompt: Sequence[Mapping[str, str]], shown: Mapping[str, Any], completion: str) -> float:
        """Between ``lowest`` and ``highest``; an empty completion has the lowest, and is not judged.

        Args: as ``request_body`` has them.

        Raises:
            JudgeFailed: the judge gave none.
        """
        settings = self._settings
        if not without_special_tokens(completion).strip():
            return float(settings.lowest)
        body = request_body(settings, prompt, shown, completion)
        key = digest([_FORMAT, settings.url, settings.lowest, settings.highest, body])
        if self._cache is not None and (kept := self._cache.get(key)) is not None:
            return kept
        score = self.ask(body).value
        if self._cache is not None:
            self._cache.put(key, score)
        return score

    def ask(self, body: dict[str, Any]) -> Score:
        """The score that the server gives on a request, whatever is on disk. Raises JudgeFailed."""
        return self._runner.run(self._client.score(body))

    def close(self) -> None:
        """Ends what asking needed; a process that ends needn't."""
        self._runner.close()


def try_out(settings: JudgeSettings) -> Score:
    """Asks the judge for the score of a short completion. Raises as ``Judge`` and ``ask`` do."""
    prompt = [{"role": "user", "content": "What is 1 + 1?"}]
    with contextlib.closing(Judge(settings)) as judge:
        return judge.ask(request_body(settings, prompt, dict.fromkeys(settings.fields, "2"), "It is 2."))
