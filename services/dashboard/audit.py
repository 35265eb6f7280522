"""One line of the log for everything that was asked for with the token, and how often it may be asked."""

import logging
import re
import threading
import time
from typing import Any

from fastapi import Request

from services.dashboard.problems import ProblemError

log = logging.getLogger("services.dashboard.audit")

_PASSWORDS = re.compile(r"(://[^\s:/@'\"]*:)[^\s@'\"]+(?=@)|(password=)[^\s&'\"]+")


def to_stderr() -> None:
    """Have the audit lines written to standard error, each with its time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s audit: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def who(request: Request) -> str:
    """Whoever has the token; there is one token, so the address is what tells them apart."""
    return f"dashboard at {request.client.host if request.client else 'unknown'}"


def record(requested_by: str, what: str, outcome: str, **arguments: Any) -> None:
    """The audit line; the time is the log's. What came from outside is quoted, passwords in URLs are left out."""
    line = f"{requested_by}: {what} {arguments!r}: {outcome!r}"
    log.info("%s", _PASSWORDS.sub(r"\1\2***", line))


class Rate:
    """Lets ``burst`` through at once, and one more every ``every_s`` seconds."""

    def __init__(self, *, burst: int, every_s: float) -> None:
        self._burst, self._every_s = burst, every_s
        self._left, self._at = float(burst), time.monotonic()
        self._lock = threading.Lock()

    def require(self) -> None:
        """Ends a request that comes too soon with 429."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self._burst, self._left + (now - self._at) / self._every_s)
            self._at = now
            if self._left >= 1:
                self._left -= 1
                return
            wait_s = (1 - self._left) * self._every_s
        headers = {"Retry-After": str(int(wait_s) + 1)}
        raise ProblemError(429, f"too many requests at once; wait {wait_s:.0f} s", headers=headers)
