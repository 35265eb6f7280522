"""One line of the log for everything that was asked for with the token, how often it may be asked, and who asks
without it."""

import logging
import re
import threading
from collections import Counter, OrderedDict
from typing import Any

from fastapi import Request

from services.dashboard.problems import ProblemError
from services.dashboard.rate import Rate

log = logging.getLogger("services.dashboard.audit")

_WRONG_TOKENS = 10
_WRONG_EVERY_S = 6.0
_PEERS = 1000
_PATH_CHARACTERS = 200

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


def require(rate: Rate, what: str = "requests at once") -> None:
    """Ends a request that comes too soon with 429."""
    if wait_s := rate.wait_s():
        headers = {"Retry-After": str(int(wait_s) + 1)}
        raise ProblemError(429, f"too many {what}; wait {wait_s:.0f} s", headers=headers)


class WrongTokens:
    """Notes requests without the token: a line of the log a second at most for wrong ones, and one for none at all; and
    429 for an address that goes on with wrong ones. A right token is never refused, or anybody on this machine could
    keep its owner from stopping a run: guessing is what the token's length is against, this is for it to be seen.
    Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines = {what: Rate(burst=1, every_s=1.0) for what in ("wrong token", "no token")}
        self._untold = Counter[str]()
        self._of_peer: OrderedDict[str, Rate] = OrderedDict()

    def note(self, request: Request, *, given: bool) -> None:
        """given: a token came, a wrong one; then the request ends with 429 when its address has sent too many."""
        by, what = who(request), "wrong token" if given else "no token"
        with self._lock:
            self._untold[what] += 1
            if not self._lines[what].wait_s():
                path = request.url.path[:_PATH_CHARACTERS]
                route = getattr(request.scope.get("route"), "operation_id", None)
                told = f"refused, {self._untold[what]} since the last such line"
                record(by, what, told, path=path, route=route)
                self._untold[what] = 0
            if not given:
                return
            rate = self._of_peer.pop(by, None) or Rate(burst=_WRONG_TOKENS, every_s=_WRONG_EVERY_S)
            self._of_peer[by] = rate
            if len(self._of_peer) > _PEERS:
                self._of_peer.popitem(last=False)
        require(rate, "wrong tokens")
