"""Connections and their limits: clients that send nothing, half a request, or don't read their answer hold up nobody.

uvicorn has a limit for the time between two requests alone. Here a request has to arrive within a time, an answer has
to be read, and when too many connections are open those go first that have waited longest for their client.
"""

import asyncio
import contextlib
import fcntl
import resource
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 10.0
"""From accepting a connection, or from the first byte of its next request, until the request is there with its body."""
UNREAD_S = 30.0
"""A client that takes no bytes of its answer for this long is disconnected."""
MAX_CONNECTIONS = 2000
BACKLOG = 256
"""Connections that are accepted at once, before any can be dropped."""
REASONS = ("late", "unread", "crowded", "refused")
"""Of dropped connections: its request did not come; its answer was not taken; others needed its place; all others were
at work."""
_FILES = 65536
_SHARE = 0.75


def raise_file_limit() -> None:
    """Let this process open as many files as it may, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a system that allows less than it says: what is, is enough
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def file_limit() -> int:
    """How many files this process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _FILES if soft == resource.RLIM_INFINITY else soft


def share(most: int) -> int:
    """How many of ``most`` one address may have, so that others have some too."""
    return int(most * _SHARE)


class Crowd:
    """The connections of one service. All methods run on the event loop.

    Args:
        files: how many the process may open; stores need some too.
    """

    def __init__(self, files: int) -> None:
        self.dropped: Counter[str] = Counter()
        """By reason, one of ``REASONS``."""
        self._most = min(MAX_CONNECTIONS, int(files * _SHARE))
        self._open: set[Connection] = set()
        self._of_peer: Counter[str] = Counter()
        self._waiting: dict[Connection, None] = {}  # for their client; the longest first

    def join(self, connection: "Connection") -> None:
        """Take it in, and drop another one for it when there are too many."""
        peer = connection.peer
        self._open.add(connection)
        self._of_peer[peer] += 1
        self._waiting[connection] = None
        if self._of_peer[peer] > share(self._most):
            self._make_room(connection, (each for each in self._waiting if each.peer == peer))
        elif len(self._open) > self._most:
            self._make_room(connection, iter(self._waiting))

    def leave(self, connection: "Connection") -> None:
        if connection in self._open:
            self._open.remove(connection)
            self._waiting.pop(connection, None)
            self._of_peer[connection.peer] -= 1
            if not self._of_peer[connection.peer]:
                del self._of_peer[connection.peer]

    def waits(self, connection: "Connection", waits: bool) -> None:
        """Whether it is its client's turn: to send a request, or to read."""
        if not waits:
            self._waiting.pop(connection, None)
        elif connection in self._open:
            self._waiting.setdefault(connection)

    def drop(self, connection: "Connection", reason: str) -> None:
        self.dropped[reason] += 1
        self.leave(connection)
        connection.transport.abort()

    async def sweep(self) -> None:
        """To be called every second."""
        now = asyncio.get_running_loop().time()
        for connection in list(self._open):
            if (reason := connection.overdue(now)) is not None:
                self.drop(connection, reason)

    def _make_room(self, newest: "Connection", waiting: Iterator["Connection"]) -> None:
        longest = next(waiting)  # the newest itself when all others are at work
        self.drop(longest, "refused" if longest is newest else "crowded")


def _in_kernel(descriptor: int) -> int:
    """Bytes that were written to a socket and that its other side has not taken; megabytes on a slow way."""
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:  # closed just now, or a system that doesn't tell
        return 0


class Connection(H11Protocol):
    """One connection, which belongs to a crowd."""

    def __init__(self, *arguments: Any, crowd: Crowd, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.peer = ""
        self._crowd = crowd
        self._owes_since: float | None = None  # the client, the rest of a request
        self._unread = 0  # bytes, when last looked
        self._read_at = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Of asyncio, as the next five."""
        super().connection_made(transport)
        self.peer = self.client[0] if self.client else ""
        self._owes_since = self.loop.time()
        self._crowd.join(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look(owes=self.conn.their_state in (h11.IDLE, h11.SEND_BODY))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._crowd.waits(self, True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._crowd.waits(self, not self._works())

    def on_response_complete(self) -> None:
        """Of uvicorn, which closes the connection itself when no other request comes."""
        super().on_response_complete()
        self._look(owes=self.conn.their_state is h11.SEND_BODY)

    def overdue(self, now: float) -> str | None:
        """The reason to drop it."""
        unread = self.transport.get_write_buffer_size()
        if unread:
            unread += _in_kernel(self.transport.get_extra_info("socket").fileno())
        if unread == 0 or unread < self._unread:
            self._read_at = now
        self._unread = unread
        if self._owes_since is not None and now - self._owes_since > REQUEST_S:
            return "late"
        return "unread" if now - self._read_at > UNREAD_S else None

    def _look(self, *, owes: bool) -> None:
        if not owes:
            self._owes_since = None
        elif self._owes_since is None:
            self._owes_since = self.loop.time()
        self._crowd.waits(self, not self._works())

    def _works(self) -> bool:
        """Whether it is our turn."""
        return self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused
