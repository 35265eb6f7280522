"""What ends a command. Ctrl-C and SIGTERM: an end at once before there is anything to save, a flag for the loop to look
at afterwards. A reader of its output that goes, as ``| head`` does: an end without a word.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from rewards.command import reported


class StopRequested(Exception):
    """The run was asked to stop while it waited; not an error."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, to be obeyed at once."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum
        """What shells expect of a process that a signal ended."""


def exit_status(command: Callable[[], int]) -> int:
    """Of any ``python -m learner.X``: what the command returns, 2 for wrong settings, 1 for another error of ours (both
    are printed on standard error, see ``rewards.command``), and 128 + signal when one ended it."""
    try:
        with piped():
            return reported(command)
    except Interrupted as error:
        print(f"stopped by {error}", file=sys.stderr)
        return error.exit_status


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """When nobody reads any more what the block prints, it ends as SIGPIPE ends other programs: silently, with 141.

    Python ignores SIGPIPE and raises instead; letting the signal through would also end a run whose sockets break.
    """
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # here, and not while the interpreter ends, where nobody can catch it
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        raise SystemExit(128 + signal.SIGPIPE) from None


def _reader_is_gone() -> bool:
    """Of standard output; a pipe or socket that broke may have been another one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are always told
    return bool(poll.poll(0))


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """In the block SIGINT and SIGTERM raise ``Interrupted``."""
    before = {signum: signal.signal(signum, _interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


class StopFlag:
    """While entered, the first SIGINT or SIGTERM sets the flag and a second one interrupts at once.

    Enter it after ``ray.init``, which installs a SIGTERM handler of its own.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._who: str | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        return self._signum is not None

    def request(self, who: str) -> None:
        """Ask for what the first SIGTERM does, from any thread. ``who``: named in its place."""
        if self._signum is None:
            self._asked_at, self._who, self._signum = time.monotonic(), who, signal.SIGTERM

    def enforce(self, grace_s: float) -> None:
        """Raise StopRequested when the run was first asked more than ``grace_s`` seconds ago."""
        if self.is_set() and time.monotonic() - self._asked_at > grace_s:
            raise StopRequested

    @property
    def name(self) -> str:
        assert self._signum is not None, "nobody asked to stop"
        return self._who or signal.Signals(self._signum).name

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
            raise Interrupted(signum)
        self._signum, self._asked_at = signum, time.monotonic()
