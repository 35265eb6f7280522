"""Asks the judge's server, with patience that ends.

A connection is used for one question: a server that lies about the length of an answer must not leave its rest to the
next one. Redirects are not followed, as the key would go along.
"""

import asyncio
import contextlib
import os
import random
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from rewards.errors import ConfigError, first_line
from rewards.judge.folders import make_private
from rewards.judge.places import place
from rewards.judge.question import digest
from rewards.judge.reply import JudgeFailed, NoReply, Score, read_score
from rewards.judge.settings import JudgeSettings
from rewards.parsing import shorten

MAX_BODY = 2**20
"""Bytes of an answer; one with log-probabilities has a few thousand."""

_FIRST_PAUSE_S = 0.5
_UNICODE = re.compile(r"\\+u([0-9a-fA-F]{4})")
_BUSY = (408, 425, 429)
_REFUSALS = (401, 403)


class _Busy(NoReply):
    """The server asks for a pause of so many seconds, or for none in particular."""

    def __init__(self, message: str, pause_s: float | None) -> None:
        super().__init__(message, pause_s)
        self.pause_s = pause_s

    def __str__(self) -> str:
        return str(self.args[0])


class Client:
    """One judge's server.

    Raises:
        ConfigError: the key isn't in its environment variable, or can't be sent; the folder can't be written.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._key = _key(settings.key_variable)
        self._places = settings.folder / "in-flight" / digest(settings.url)[:16]
        make_private(self._places)
        self._http = httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            limits=httpx2.Limits(max_keepalive_connections=0),
            timeout=None,  # a time limit for all of an answer stands around each question
        )

    async def score(self, body: dict[str, Any]) -> Score:
        """The score that the judge gives on a request, within ``timeout_s`` seconds.

        Raises:
            JudgeFailed: there is none; the message says what the last try ended with.
        """
        settings, last = self._settings, "no place was free"
        try:
            async with asyncio.timeout(settings.timeout_s) as limit, place(self._places, settings.concurrency):
                last = "it has not answered"
                for number in range(1, settings.tries + 1):
                    try:
                        return self._read(await self._answer(body))
                    except NoReply as error:
                        last = f"{error} (try {number} of {settings.tries})"
                        if number < settings.tries:
                            await _pause(error, number, left_s=_left_s(limit))
                raise JudgeFailed(last)
        except TimeoutError:
            last = f"no score within {settings.timeout_s:g} s; {last}"
        except JudgeFailed as error:
            last = str(error)
        raise JudgeFailed(self._told(last))  # out here, where no other error hangs on to it that may name the key

    async def _answer(self, body: dict[str, Any]) -> bytes:
        limit_s = self._settings.try_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._exchange(body)
        except TimeoutError:
            raise NoReply(f"no answer within {limit_s:g} s") from None
        except httpx2.TransportError as error:
            raise NoReply(f"{type(error).__name__}: {first_line(error)}") from None

    async def _exchange(self, body: dict[str, Any]) -> bytes:
        url = self._settings.url.rstrip("/") + "/chat/completions"
        async with self._http.stream("POST", url, json=body) as response:
            data = bytearray()
            async for piece in response.aiter_raw():
                data += piece
                if len(data) > MAX_BODY:
                    raise NoReply(f"the answer is longer than {MAX_BODY} bytes")
            status = response.status_code
            if status == 200:
                return bytes(data)
            if status in _REFUSALS:  # what a server says of a key may hold parts of it
                named = self._settings.key_variable
                raise JudgeFailed(f"status {status}: {f'it refuses the key in {named}' if named else 'it wants a key'}")
            told = f"status {status}: {self._shown(bytes(data))}"
            if status in _BUSY or status >= 500:
                raise _Busy(told, _retry_after(response.headers.get("Retry-After")))
            raise JudgeFailed(told)

    def _read(self, data: bytes) -> Score:
        try:
            return read_score(self._settings, data)
        except JudgeFailed as error:
            if not self._repeats_key(data):
                raise
            failed = type(error)("its answer is no score, and repeats the key, so that it can't be shown")
        raise failed

    def _shown(self, data: bytes) -> str:
        """The begin of an answer. What repeats the key isn't cut, where a part of it could be left."""
        if self._repeats_key(data):
            return "an answer that repeats the key"
        return shorten(data[:1000].decode(errors="replace"), 200)

    def _repeats_key(self, data: bytes) -> bool:
        """Whether the key stands in it, as it is or with any of its characters escaped, as JSON may have them."""
        plain = _UNICODE.sub(lambda found: chr(int(found[1], 16)), data.decode(errors="replace")).replace("\\", "")
        return bool(self._key) and self._key.replace("\\", "") in plain

    def _told(self, what: str) -> str:
        """With the judge's name, and without the key."""
        whole = f"judge {self._settings.model} at {self._settings.url}: {what}"
        return whole.replace(self._key, "***") if self._key else whole


def _key(variable: str | None) -> str:
    """Raises ConfigError without a word of the key."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {variable} (task.judge.key_variable) is empty or not set; put the judge's key "
            "into it before Ray starts, on every machine with actors"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"the key in {variable} (task.judge.key_variable) holds characters that no key has; correct it"
        )
    return key


async def _pause(error: NoReply, number: int, *, left_s: float) -> None:
    """Before another try: as long as the server asks for, else twice as long each time, with some chance in it so that
    many graders don't come back together. Raises JudgeFailed when the server asks for more than is left."""
    asked_s = error.pause_s if isinstance(error, _Busy) else None
    if asked_s is not None and asked_s >= left_s:
        raise JudgeFailed(f"{error}: it asks for a pause of {asked_s:g} s, and {max(0.0, left_s):.0f} s are left")
    await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (number - 1) * (0.5 + random.random()) if asked_s is None else asked_s)


def _left_s(limit: asyncio.Timeout) -> float:
    end = limit.when()
    assert end is not None, "the limit was set"
    return end - asyncio.get_running_loop().time()


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110, 10.2.3); None for anything else."""
    if value is None:
        return None
    if value.strip().isdecimal() and len(value) < 10:
        return float(value)
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
