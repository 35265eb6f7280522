"""What somebody without the token can do to the dashboard over its port: silent and slow clients, and guesses."""

import asyncio
import contextlib
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from services.dashboard import connections
from services.dashboard.annotations import Annotations
from services.dashboard.changes import AllRuns
from services.dashboard.connections import BACKLOG, Connection, Crowd
from services.dashboard.index import RunIndex
from services.dashboard.settings import Settings
from services.dashboard.stream import Hub
from services.store.catalog import Catalog
from tests.support.dashboards import Dashboard, dashboard, eventually, write_run

HALF_A_HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Half: "


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Started as from a shell that allows few files."""
    runs = tmp_path_factory.mktemp("runs")
    write_run(runs, "one", iterations=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with dashboard(runs) as service:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield service
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connected(port: int, *said: bytes, source: str = "127.0.0.1") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0))
    for each in said:
        client.sendall(each)
    return client


def closed(client: socket.socket) -> bool:
    """Whether the other side has closed it."""
    client.settimeout(0)
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


# ---- many connections


def test_a_crowd_of_silent_connections_stops_nothing(service: Dashboard) -> None:
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200  # of this process
    assert room > 1100, "this machine allows a process too few files for the test"
    with contextlib.ExitStack() as open_ones:
        for number in range(min(3000, room)):
            half = [HALF_A_HEAD] if number % 2 else []
            open_ones.enter_context(connected(service.port, *half))
        with httpx.Client(base_url=service.url, timeout=15, trust_env=False) as late_comer:
            assert late_comer.get("/healthz").status_code == 200
            assert late_comer.get("/api/v1/runs/one").status_code == 200
            headers = {"Authorization": f"Bearer {service.token}"}
            asked = late_comer.post("/api/v1/runs/one/actions", json={"action": "stop"}, headers=headers)
            assert asked.status_code == 409, "control goes through too: the run is over"
            told = late_comer.get("/metrics").text
    dropped = re.search(r'dropped_connections_total{reason="crowded"} (\S+)', told)
    assert dropped is not None and float(dropped[1]) >= min(3000, room) - connections.MAX_CONNECTIONS


@pytest.mark.slow
def test_silent_connections_end(service: Dashboard) -> None:
    """With the real limit, ten seconds."""
    clients = [connected(service.port, *said) for said in ([], [HALF_A_HEAD]) for _ in range(20)]
    time.sleep(connections.REQUEST_S - 3)
    assert not any(closed(client) for client in clients)
    eventually(lambda: all(closed(client) for client in clients), 20)
    for client in clients:
        client.close()


# ---- slow clients, of a server with short limits


async def app(scope: Any, receive: Any, send: Any) -> None:
    """/body reads its request, /wait never answers, /big is more than sockets take; all others answer at once."""
    path = scope["path"]
    while path == "/body" and (await receive()).get("more_body"):
        pass
    if path == "/wait":
        await asyncio.sleep(60)
    body = b"x" * (32 << 20 if path == "/big" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving(crowd: Crowd | None) -> Iterator[tuple[uvicorn.Server, int]]:
    """``app`` as ``server.serve`` runs the dashboard; with uvicorn's own connections when there is no crowd."""
    options: dict[str, Any] = {"http": "h11"}
    if crowd is not None:
        options = {"http": partial(Connection, crowd=crowd), "callback_notify": crowd.sweep, "timeout_notify": 0}
    server = uvicorn.Server(
        uvicorn.Config(app, ws="none", lifespan="off", log_level="error", timeout_graceful_shutdown=1, **options)
    )
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield server, listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


POST = b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n12345"
GET = b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n"
SLOW = {
    "says nothing": [],
    "half a head": [HALF_A_HEAD],
    "half a body": [POST % b"/body"],
    "half a body after its answer": [POST % b"/"],
    "half a second head": [GET % b"/", HALF_A_HEAD],
    "half a second body": [GET % b"/" + POST % b"/body"],
    "reads nothing": [GET % b"/big"],
}


@pytest.mark.parametrize("limits", [True, False], ids=["limits", "control"])
def test_slow_clients_are_disconnected(monkeypatch: pytest.MonkeyPatch, limits: bool) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 1.0)
    monkeypatch.setattr(connections, "UNREAD_S", 1.0)
    crowd = Crowd(1000)
    with serving(crowd if limits else None) as (server, port), contextlib.ExitStack() as open_ones:
        clients = {}
        for name, said in SLOW.items():
            clients[name] = open_ones.enter_context(connected(port, *said[:1]))
        eventually(lambda: len(server.server_state.connections) == len(SLOW), 10)
        time.sleep(0.3)
        clients["half a second head"].sendall(HALF_A_HEAD)
        deadline = time.monotonic() + (20 if limits else 4)
        while server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.2)
            for name in ("half a head", "half a body", "half a body after its answer", "half a second body"):
                with contextlib.suppress(OSError):
                    clients[name].sendall(b"x")  # a byte now and then changes nothing
        if limits:
            assert not server.server_state.connections
            assert crowd.dropped == {"late": len(SLOW) - 1, "unread": 1}
        else:
            assert len(server.server_state.connections) == len(SLOW), "uvicorn alone keeps them"


def test_clients_that_keep_to_the_limits_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other control: an answer that takes long, one that is read slowly, a connection that is used again."""
    monkeypatch.setattr(connections, "REQUEST_S", 1.0)
    monkeypatch.setattr(connections, "UNREAD_S", 2.0)
    crowd = Crowd(1000)
    with serving(crowd) as (_, port), connected(port, GET % b"/wait") as waiting, connected(port) as reading:
        reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        reading.sendall(GET % b"/big")
        taken = 0
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for _ in range(8):
                taken += len(reading.recv(1 << 20))
                assert client.post("/body", content=b"x" * 1000).status_code == 200
                time.sleep(0.5)
        assert not closed(waiting) and taken > 0 and not crowd.dropped


# ---- too many connections


def test_whoever_waits_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 12)  # 9 of one address
    crowd = Crowd(1000)
    with serving(crowd) as (server, port), contextlib.ExitStack() as open_ones:

        def more(count: int, *said: bytes, source: str) -> list[socket.socket]:
            new = []
            for _ in range(count):
                new.append(open_ones.enter_context(connected(port, *said, source=source)))
                time.sleep(0.02)
            return new

        (other,) = more(1, source="127.0.0.3")
        at_work = more(4, GET % b"/wait", source="127.0.0.2")
        silent = more(8, source="127.0.0.2")
        eventually(lambda: crowd.dropped["crowded"] == 3, 10)
        assert [closed(each) for each in silent] == [True] * 3 + [False] * 5, "the oldest of the same address"
        assert not closed(other), "others keep theirs"
        more(3, source="127.0.0.4")
        eventually(lambda: crowd.dropped["crowded"] == 4, 10)
        assert closed(other), "of all addresses: whoever has waited longest"
        at_work += more(5, GET % b"/wait", source="127.0.0.2")
        assert not any(closed(each) for each in at_work), "what is at work stays"
        (refused,) = more(1, source="127.0.0.2")
        eventually(lambda: crowd.dropped["refused"] == 1, 10)
        assert closed(refused) and not any(closed(each) for each in at_work)
        assert len(server.server_state.connections) <= 12


def test_streams_have_limits(tmp_path: Path) -> None:
    async def open_them() -> None:
        catalog = Catalog(tmp_path)
        index = RunIndex(catalog, Annotations(Settings(tmp_path)))
        hub, source = Hub(files=40), AllRuns(index)  # 20 streams, 15 of one address
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(15):
                assert not hub.full("a")
                await streams.enter_async_context(hub.joined(None, source, "a"))
            assert hub.full("a") and not hub.full("b")
            for _ in range(5):
                await streams.enter_async_context(hub.joined(None, source, "b"))
            assert hub.full("b") and hub.clients == 20
        assert not hub.full("a") and hub.clients == 0
        catalog.close()

    asyncio.run(open_them())


# ---- guesses


def test_wrong_tokens_are_limited_and_seen(tmp_path: Path) -> None:
    with dashboard(tmp_path) as service:
        began = time.monotonic()

        def post(token: str | None, client: httpx.Client) -> httpx.Response:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            return client.post("/api/v1/runs/none/actions", json={"action": "stop"}, headers=headers)

        answers = [post(f"guess-{number:03d}", service.client) for number in range(100)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:10] == [401] * 10 and set(statuses) == {401, 429}
        refused = answers[statuses.index(429)]
        assert int(refused.headers["Retry-After"]) >= 1 and "too many wrong tokens" in refused.json()["detail"]
        assert post(service.token, service.client).status_code == 404, "the owner is let in all the same"
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=service.url, transport=transport, trust_env=False) as neighbour:
            assert post("guess", neighbour).status_code == 401, "another address has its own count"
        without = {post(None, service.client).status_code for _ in range(30)}
        assert without == {401}, "the control: no token is no guess"
        time.sleep(1.1)
        assert post("guess-last", service.client).status_code in (401, 429)
        lines = [line for line in service.log().splitlines() if "wrong token" in line]
        told = "wrong token {'path': '/api/v1/runs/none/actions', 'route': 'requestAction'}"
        assert f"dashboard at 127.0.0.1: {told}" in lines[0]
        assert 2 <= len(lines) <= time.monotonic() - began + 2, "a line a second at most"
        assert sum(int(re.findall(r"refused, (\d+) since", line)[0]) for line in lines) == 102, "and all are counted"
        missed = [line for line in service.log().splitlines() if "no token" in line]
        assert 1 <= len(missed) <= time.monotonic() - began + 2, "who has none is seen too"
        assert "'route': 'requestAction'" in missed[0]
        assert "guess-" not in service.log() and service.token not in service.log()
