"""A judge's server that behaves as it is told: real HTTP on 127.0.0.1, good answers unless a fault is asked for."""

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rewards.judge.settings import JudgeSettings

RUBRIC = "The explanation is clear."


def settings(server: "JudgeServer", **changes: Any) -> JudgeSettings:
    """Of a judge on this server, quick to give up, that keeps nothing."""
    about = {"model": "tiny", "url": server.url, "rubric": RUBRIC, "timeout_s": 5.0, "try_timeout_s": 2.0}
    return JudgeSettings(**{**about, "cache": False, **changes})


def chat(content: Any, *, logprobs: Mapping[str, float] | None = None, finish: str = "stop") -> bytes:
    """The body of an answer. ``logprobs``: of the tokens that could stand for the first one, its own among them."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "finish_reason": finish,
    }
    if logprobs is not None:
        top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in logprobs.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}, {"token": "", "logprob": 0.0}]}
    return json.dumps({"id": "chat-1", "object": "chat.completion", "model": "tiny", "choices": [choice]}).encode()


Behaviour = Callable[["_Handler"], None]


def body(data: bytes, status: int = 200, *, length: int | None = None, **headers: str) -> Behaviour:
    """Answers with these bytes; ``length`` is what the header says of them, by default the truth."""

    def behave(handler: "_Handler") -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.answered()
        handler.wfile.write(data)

    return behave


def hang(seconds: float) -> Behaviour:
    """Says nothing for so long, then closes."""
    return lambda handler: handler.server.pause(seconds)


def drip(head: bool, every_s: float = 0.05) -> Behaviour:
    """Sends one byte after the other of an endless head, or body."""

    def behave(handler: "_Handler") -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X: " if head else b"Content-Length: 100000\r\n\r\n"))
        with contextlib.suppress(OSError):
            while not handler.server.closing.wait(every_s):
                handler.wfile.write(b" ")
                handler.wfile.flush()

    return behave


def closes(handler: "_Handler") -> None:
    """Ends the connection without a word."""


def echoes(status: int) -> Behaviour:
    """Repeats what it was sent for authorization."""

    def behave(handler: "_Handler") -> None:
        body(f"bad header {handler.headers['Authorization']}".encode(), status)(handler)

    return behave


@dataclass
class JudgeServer:
    """What it was asked, and how it is to behave: ``faults`` in turn, then ``usual``."""

    url: str = ""
    usual: Behaviour = field(default_factory=lambda: body(chat("4")))
    faults: list[Behaviour] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, judge: JudgeServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.judge, self.lock, self.now, self.closing = judge, threading.Lock(), 0, threading.Event()

    def pause(self, seconds: float) -> None:
        self.closing.wait(seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no fault."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    sent: dict[str, Any]
    waits = True

    def do_POST(self) -> None:
        judge, server = self.server.judge, self.server
        self.sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            judge.asked.append(self.sent)
            judge.headers.append(dict(self.headers))
            behave = judge.faults.pop(0) if judge.faults else judge.usual
            server.now += 1
            judge.most_at_once = max(judge.most_at_once, server.now)
        try:
            assert self.path == "/v1/chat/completions", self.path
            behave(self)
        finally:
            self.answered()
            self.close_connection = True

    def answered(self) -> None:
        """It counts no longer among those at once: a client that has its answer may ask anew before this thread
        goes on."""
        with self.server.lock:
            self.server.now -= self.waits
            self.waits = False

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def judge_server() -> Iterator[JudgeServer]:
    judge = JudgeServer()
    server = _Server(judge)
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def by_text(scores: str) -> Behaviour:
    """One of these characters, always the same for the same question."""

    def behave(handler: "_Handler") -> None:
        number = zlib.crc32(json.dumps(handler.sent["messages"]).encode())
        body(chat(scores[number % len(scores)]))(handler)

    return behave


def slowly(seconds: float, then: Behaviour) -> Behaviour:
    def behave(handler: "_Handler") -> None:
        time.sleep(seconds)
        then(handler)

    return behave
