"""A helper process that answers lines with lines, for work that may never end: it is killed when it overruns."""

import contextlib
import os
import select
import subprocess
import sys
import threading
import time

START_LIMIT_S = 60.0
_KILL_LIMIT_S = 10.0


class Helper:
    """``python -m MODULE ARGUMENTS``, which prints ``ready`` and then a line for every line that it reads.

    It starts with the first question (a second or two, once) or at ``start()``, and ends when its owner's pipe to it
    closes, however the owner ended. Each process has its own, forks too. What it inherits is its owner's environment
    and path.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(self) -> bool:
        """Starts the helper if there is none in this process, and waits until it is ready. False when it can't be."""
        with self._lock:
            return self._start()

    def ask(self, line: bytes, limit_s: float) -> bytes | None:
        """The reply to a line, both without their ends: None when none came within ``limit_s`` seconds, empty when the
        helper ended or can't be started. Either way it is started anew for the next question."""
        with self._lock:
            if not self._start():
                return b""
            assert self._popen is not None and self._popen.stdin is not None
            try:
                self._popen.stdin.write(line + b"\n")
                self._popen.stdin.flush()
                reply = self._line(limit_s)
            except OSError:
                reply = b""
            if not reply:
                self._kill()
            return reply

    def stop(self) -> None:
        """Ends the helper, if there is one."""
        with self._lock:
            if self._owner == os.getpid():
                self._kill()

    def _start(self) -> bool:
        if self._popen is not None and self._owner == os.getpid() and self._popen.poll() is None:
            return True
        if self._owner == os.getpid():
            self._kill()
        self._owner = os.getpid()
        self._popen = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        )
        if self._line(START_LIMIT_S) == b"ready":
            return True
        self._kill()
        return False

    def _line(self, limit_s: float) -> bytes | None:
        """The helper's next line, empty when it has ended, None when none came in time."""
        assert self._popen is not None and self._popen.stdout is not None
        descriptor, line, deadline = self._popen.stdout.fileno(), bytearray(), time.monotonic() + limit_s
        while not line.endswith(b"\n"):  # a long one comes in pieces; with PYTHONUNBUFFERED, a short one as well
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            if not (piece := os.read(descriptor, 2**20)):
                return b""
            line += piece
        return bytes(line).strip()

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
