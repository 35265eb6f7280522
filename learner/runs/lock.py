"""A file that says who works here.

The kernel holds the lock and drops it with the process, however that ends, so a dead holder never has to be guessed
from its pid (which may be a zombie's, or another process's by now); the pid in the file, and the namespace that it is
of, are there for messages.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from learner.runs.atomic import disk_errors


class Held(Exception):
    """Somebody else has the lock; the message is who: "process 12 on host", or "another process"."""


class FileLock:
    """Ours from the start until ``close`` (or the end of a ``with`` block, or of the process). The file stays.

    Args:
        wait_s: seconds to wait for another holder.

    Raises:
        Held: another process holds it.
        UnmaskError: when the disk refuses.
    """

    def __init__(self, path: Path, *, wait_s: float = 0.0) -> None:
        with disk_errors(path), contextlib.ExitStack() as failed:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            failed.callback(os.close, self._descriptor)
            self._take(time.monotonic() + wait_s)
            os.ftruncate(self._descriptor, 0)
            record = {"pid": os.getpid(), "host": socket.gethostname(), "pids": os.readlink("/proc/self/ns/pid")}
            os.pwrite(self._descriptor, json.dumps(record).encode(), 0)
            failed.pop_all()
        self._held = True

    def show_life(self) -> None:
        """Set the file's time of change to now, for those who wait and want to know that the holder works."""
        os.utime(self._descriptor)

    def close(self) -> None:
        """Give the lock back. A second call does nothing."""
        if self._held:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._held = False

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Held(self._holder()) from None
                time.sleep(0.1)

    def _holder(self) -> str:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # caught between its lock and its line
            record = json.loads(os.pread(self._descriptor, 1000, 0))
            return f"process {record['pid']} on {record['host']}"
        return "another process"
