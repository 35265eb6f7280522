"""Symbolic comparison by math-verify, in a helper process that is killed when it overruns.

sympy can take hours and gigabytes over a short text, inside code that never returns to Python. So each question is
answered by a fork of a helper that has math-verify loaded (``rewards.symbolic_worker``): the fork has a CPU limit that
the kernel enforces, a memory limit and a wall-clock limit, and no question leaves anything behind for the next.

The helper starts with the first question (a second or two, once) or at ``start()``, and ends when its owner's pipe to
it closes, however the owner ended. A question costs a few milliseconds and at most WALL_LIMIT_S.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal

from rewards.expression import Node, to_json

CPU_LIMIT_S = 0.5
WALL_LIMIT_S = 0.75
START_LIMIT_S = 60.0
_GRACE_S = 0.1
_KILL_LIMIT_S = 10.0
"""For the helper to kill its fork; after that the helper itself is killed and started anew at the next question."""

Finding = Literal["equal", "different", "timeout", "failed"]
"""``failed``: math-verify raised, ran out of memory, or can't be started."""


class _Helper:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(self) -> bool:
        """Starts the helper if there is none in this process, and waits until it is ready. False when it can't be."""
        with self._lock:
            return self._start()

    def ask(self, pairs: Sequence[tuple[Node, Node]]) -> Finding:
        """Whether the two expressions of every pair are equal."""
        return self._ask([[to_json(gold), to_json(answer)] for gold, answer in pairs])

    def ask_plain(self, gold: str, answer: str) -> Finding:
        """``verify(parse(gold), parse(answer))`` with math-verify's own settings, as the published codes call it."""
        return self._ask({"gold": gold, "answer": answer})

    def stop(self) -> None:
        """Ends the helper, if there is one."""
        with self._lock:
            if self._owner == os.getpid():
                self._kill()

    def _ask(self, question: list[Any] | dict[str, str]) -> Finding:
        with self._lock:
            if not self._start():
                return "failed"
            assert self._popen is not None and self._popen.stdin is not None
            try:
                self._popen.stdin.write(json.dumps(question).encode() + b"\n")
                self._popen.stdin.flush()
                reply = self._line(WALL_LIMIT_S + _GRACE_S)
            except OSError:
                reply = ""
            if reply is None or reply not in ("equal", "different", "timeout", "failed"):
                self._kill()
                return "timeout" if reply is None else "failed"
            return reply  # type: ignore[return-value]

    def _start(self) -> bool:
        if self._popen is not None and self._owner == os.getpid() and self._popen.poll() is None:
            return True
        if self._owner == os.getpid():
            self._kill()
        self._owner = os.getpid()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "rewards.symbolic_worker", str(CPU_LIMIT_S), str(WALL_LIMIT_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        )
        if self._line(START_LIMIT_S) == "ready":
            return True
        self._kill()
        return False

    def _line(self, limit_s: float) -> str | None:
        """The helper's next line, empty when it has ended, None when none came in time."""
        assert self._popen is not None and self._popen.stdout is not None
        descriptor, line = self._popen.stdout.fileno(), b""
        while not line.endswith(b"\n"):  # with PYTHONUNBUFFERED, which we inherit, a line comes in two pieces
            if not select.select([descriptor], [], [], limit_s)[0]:
                return None
            if not (piece := os.read(descriptor, 4096)):
                return ""
            line += piece
        return line.decode("ascii", "replace").strip()

    def _kill(self) -> None:
        if self._popen is None:
            return
        self._popen.kill()
        self._popen.wait(timeout=_KILL_LIMIT_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._popen = None


_helper = _Helper()
start = _helper.start
ask = _helper.ask
ask_plain = _helper.ask_plain
stop = _helper.stop
