"""From settings to a listening service: address, uvicorn, and its end."""

import socket
import sys
import threading
from functools import partial

import uvicorn

from rewards.errors import ConfigError
from services.dashboard import audit
from services.dashboard.app import create_app
from services.dashboard.connections import BACKLOG, MAX_CONNECTIONS, Connection, raise_file_limit
from services.dashboard.settings import Settings

GRACE_S = 3
"""Seconds that requests under way get when the service is asked to end."""


def serve(settings: Settings, *, any_port: bool = False, while_stdin: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, or, ``while_stdin``, until standard input ends: a parent's pipe does so with the
    parent, however that dies.

    any_port: take a free port when ``settings.port`` is in use.

    Raises:
        ConfigError: when the address can't be had, or the settings are refused.
    """
    raise_file_limit()
    app = create_app(settings)
    audit.to_stderr()
    with _listener(settings, any_port) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=partial(Connection, crowd=app.state.crowd),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_level="error",  # not of every request that is none
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                limit_concurrency=MAX_CONNECTIONS + 1,  # requests of clients that have gone; the crowd has a limit
                timeout_keep_alive=30,
                callback_notify=app.state.crowd.sweep,
                timeout_notify=0,  # every second
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        if while_stdin:
            threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
        print(f"dashboard: {url(settings.host, listener)}", flush=True)  # the first line: a run waits for it
        print(f"control token: in {app.state.security.place}", flush=True)
        server.run(sockets=[listener])


def url(host: str, listener: socket.socket) -> str:
    """Address of the page."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"


def _listener(settings: Settings, any_port: bool) -> socket.socket:
    ports = [settings.port, 0] if any_port else [settings.port]
    for port in ports:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY on what says that it is TCP
        except OSError as error:
            raise ConfigError(f"--host {settings.host} is no address of this machine: {error.strerror}") from None
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(512)
            return listener
        except OSError as error:
            listener.close()
            reason = error.strerror
    raise ConfigError(f"{settings.host}:{settings.port} can't be listened on: {reason}; give another --port, or 0")


def _end_with_stdin(server: uvicorn.Server) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    server.should_exit = True
