"""Ctrl-C and SIGTERM as a flag that the loop looks at between waits."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopFlag:
    """While entered, the first SIGINT or SIGTERM sets the flag and a second one interrupts at once.

    Enter it after ``ray.init``, which installs a SIGTERM handler of its own.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        return self._signum is not None

    @property
    def name(self) -> str:
        assert self._signum is not None, "nobody asked to stop"
        return signal.Signals(self._signum).name

    @property
    def exit_status(self) -> int:
        """What shells expect of a process that a signal ended."""
        assert self._signum is not None, "nobody asked to stop"
        return 128 + self._signum

    def __enter__(self) -> "StopFlag":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            raise KeyboardInterrupt
        self._signum = signum
