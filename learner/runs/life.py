"""Signs of life, from the process that works on a run to the one that looks after it (``run.restarts``)."""

import contextlib
import os
import select
import threading
import time

_VARIABLE = "UNMASK_LIFE_FD"
"""In the environment of the process that works: the end of a pipe to write to."""
_EVERY_S = 1.0
_IMPORTS_S = 600.0
"""For a process that starts to give its first sign: packages on a slow file system take minutes."""
_ENDS_S = 0.05
"""From the end of a process's files to its own."""


class LifeLine:
    """A pipe to a process that is about to be started, while entered.

    Attributes:
        environment: what that process's environment gets.
        theirs: the descriptor that it inherits.
    """

    def __enter__(self) -> "LifeLine":
        self._ours, self.theirs = os.pipe()
        self._end = os.fdopen(self.theirs, "wb", buffering=0)  # a number may be another file's by the second close
        os.set_blocking(self.theirs, False)  # who writes mustn't wait for one that is stopped and doesn't read
        self.environment = {_VARIABLE: str(self.theirs)}
        self._seen = time.monotonic() + _IMPORTS_S
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._ours)
        self.let_go()

    def let_go(self) -> None:
        """The process has its end now."""
        self._end.close()

    def silent_s(self, wait_s: float) -> float:
        """Seconds since its last sign, when ``wait_s`` more are over or one comes; until the first, since the time that
        imports may take is over."""
        if select.select([self._ours], [], [], wait_s)[0]:
            if not os.read(self._ours, 1 << 16):
                time.sleep(_ENDS_S)
            self._seen = time.monotonic()
        return max(0.0, time.monotonic() - self._seen)


def show_life() -> None:
    """Give signs of life as long as this process runs, if somebody wants them. They come from a thread: a process that
    is stopped gives none, nor one that sits in a call which holds Python's lock. What else the main thread may wait for
    has an end of its own."""
    if (number := os.environ.pop(_VARIABLE, None)) is None:
        return
    end = int(number)
    os.set_inheritable(end, False)
    threading.Thread(target=_signs, args=(end,), name="signs of life", daemon=True).start()


def _signs(end: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody looks any more
        while True:
            with contextlib.suppress(BlockingIOError):
                os.write(end, b".")
            time.sleep(_EVERY_S)
