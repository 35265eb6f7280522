"""Reads a judge's reply, and nothing else, for its score.

The reply is a whole number of the scale and nothing else; thinking that the server left before it (a closed ``<think>``
block) is taken off. Where the log-probabilities of that number's token are there, the score is the expectation over the
scale: the probabilities of the tokens that are its numbers, made to add up to one (as G-Eval does, arXiv 2303.16634).
"""

import json
import math
import re
from typing import Any, NamedTuple

from rewards.errors import UnmaskError
from rewards.judge.question import ONE_TOKEN
from rewards.judge.settings import JudgeSettings
from rewards.parsing import shorten

_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_NUMBER = re.compile(r"\s*([0-9]{1,3})\s*", re.ASCII)
_SPACES = " \t\r\n\u2581\u0120\u010a"
"""Around a token's text, also as vocabularies spell them."""
_NO_LOGPROB = -1000.0
"""Of a probability that is 0 as a float; a whole number far below it is none."""


class JudgeFailed(UnmaskError):
    """There is no score for a completion; the message says why."""


class NoReply(JudgeFailed):
    """The server, or something before it, did not answer as such a server does. Asking again may help."""


class Score(NamedTuple):
    """A score, and whether it is an expectation over the scale, and not the number that was written."""

    value: float
    expected: bool


def read_score(settings: JudgeSettings, data: bytes) -> Score:
    """The score in the body of a server's answer.

    Raises:
        NoReply: it is no answer of such a server.
        JudgeFailed: it is, and holds no score of the scale.
    """
    choice = _choice(data)
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if choice.get("finish_reason") == "length":
        raise JudgeFailed(
            f"the judge's reply was cut off ({shorten(content)}); give it more room with "
            "task.judge.request={max_tokens: N}"
        )
    if not isinstance(content, str):
        raise JudgeFailed(f"the judge's reply holds no text but {shorten(content)}")
    thinking = _THINKING.match(content)
    found = _NUMBER.fullmatch(content, thinking.end() if thinking else 0)
    if found is None:
        raise JudgeFailed(f"the judge wrote {shorten(content)} and not one whole number")
    score = int(found[1])
    if not settings.lowest <= score <= settings.highest:
        raise JudgeFailed(f"the judge wrote {score}, which is not from {settings.lowest} to {settings.highest}")
    return _expected(settings, score, choice.get("logprobs"))


def _choice(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        raise NoReply(f"the answer is not JSON: {shorten(data[:80].decode(errors='replace'))}") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NoReply(f"the answer holds no choices: {shorten(answer)}")
    return choices[0]


def _expected(settings: JudgeSettings, written: int, logprobs: Any) -> Score:
    """``written`` where the log-probabilities of its token aren't there."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or settings.highest > ONE_TOKEN or not settings.logprobs:
        return Score(float(written), expected=False)
    token = next((each for each in reversed(tokens) if isinstance(each, dict) and _is(each, written)), None)
    if token is None:
        return Score(float(written), expected=False)
    alternatives = token.get("top_logprobs")
    listed = [each for each in alternatives if isinstance(each, dict)] if isinstance(alternatives, list) else []
    if not any(_is(each, written) for each in listed):
        listed.append(token)
    scale = range(settings.lowest, settings.highest + 1)
    weights = {score: sum(_probability(each) for each in listed if _is(each, score)) for score in scale}
    if (total := sum(weights.values())) <= 0:
        raise JudgeFailed("the log-probabilities give no number of the scale any probability")
    return Score(sum(score * weight for score, weight in weights.items()) / total, expected=True)


def _is(token: dict[str, Any], score: int) -> bool:
    text = token.get("token")
    return isinstance(text, str) and text.strip(_SPACES) == str(score)


def _probability(token: dict[str, Any]) -> float:
    logprob = token.get("logprob")
    if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not logprob <= 0.01:
        raise JudgeFailed(f"the log-probability {shorten(logprob)} is none")
    return math.exp(max(logprob, _NO_LOGPROB))
