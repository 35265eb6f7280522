"""What every request passes before a route sees it: host name, size of its body; the headers of every answer; and the
answer to what nobody expected.

Plain ASGI, so that event streams flow through untouched.
"""

import asyncio
import contextlib
import logging
from collections import Counter

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.dashboard.problems import problem_response
from services.dashboard.rate import Rate
from services.dashboard.security import Security

MAX_BODY_BYTES = 1 << 20
_LINGER_BYTES = 32 << 20
_LINGER_S = 5.0

log = logging.getLogger("services.dashboard")

_faults = Rate(burst=10, every_s=30.0)  # each is a page of log, and anybody may ask again; ``answers`` has their number

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def install(app: FastAPI) -> None:
    """Put the guards around ``app``."""
    app.add_middleware(_Guards, security=app.state.security, answers=app.state.answers)


class _TooLarge(Exception):
    pass


class _Guards:
    def __init__(self, app: ASGIApp, security: Security, answers: Counter[tuple[str, str, int]]) -> None:
        self._app, self._security, self._answers = app, security, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answered = False

        async def tell(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                route = getattr(scope.get("route"), "path", "other")  # the template, of which there are few
                self._answers[scope["method"] if route != "other" else "other", route, message["status"]] += 1
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer[name] = value
                if "cache-control" not in answer:
                    answer["Cache-Control"] = "no-store"
            await send(message)

        taken = 0

        async def take() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY_BYTES:
                raise _TooLarge
            return message

        async def refuse(status: int, detail: str) -> None:
            await problem_response(status, detail, scope["path"], headers={"Connection": "close"})(scope, receive, tell)

        async def refuse_body() -> None:
            await _linger(receive)
            await refuse(413, f"the request's body is larger than {MAX_BODY_BYTES} bytes")

        if not self._security.host_allowed(headers.get("host", "")):
            await refuse(400, "the Host header names another machine; use 127.0.0.1 or localhost")
        elif int(length if (length := headers.get("content-length", "0")).isdecimal() else "0") > MAX_BODY_BYTES:
            await refuse_body()
        else:
            try:
                await self._app(scope, take, tell)
            except _TooLarge:
                if answered:
                    raise
                await refuse_body()
            except Exception as error:
                if answered:
                    raise
                if not _faults.wait_s():
                    log.exception("%s %r", scope["method"], scope["path"])
                await refuse(500, f"{type(error).__name__} in the dashboard; its log has the rest")


async def _linger(receive: Receive) -> None:
    """Take in what a client still sends, within bounds: an answer to one that is cut off while it sends gets lost."""
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while taken < _LINGER_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
