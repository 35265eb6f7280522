"""What ends a command. Ctrl-C, SIGTERM, a terminal that closes (SIGHUP) and a batch system's warning (SIGUSR1): an end
at once before there is anything to save, a flag for the loop to look at afterwards. A reader of its output that goes,
as ``| head`` does: an end without a word for a command that only prints, nothing at all for a run.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from rewards.command import piped, reported
from rollout.given_up import ray_given_up

_INSISTING = (signal.SIGINT, signal.SIGTERM)
"""Of these the second one ends a run at once."""
_ASKING = (signal.SIGHUP, signal.SIGUSR1)
"""These may come several times for one cause: the kernel and the shell both tell that a terminal has closed, and a
batch system warns with SIGUSR1 before it sends SIGTERM."""


class StopRequested(Exception):
    """The run was asked to stop while it waited; not an error."""


class Interrupted(KeyboardInterrupt):
    """A signal to be obeyed at once."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum
        """What shells expect of a process that a signal ended."""


_ended_by: int = signal.SIGINT


def interrupted(error: KeyboardInterrupt) -> Interrupted:
    """The ``Interrupted`` that it was: Ray raises a bare one in its place when the signal came while Ray was asked."""
    return error if isinstance(error, Interrupted) else Interrupted(_ended_by)


def exit_status(command: Callable[[], int]) -> int:
    """Of any ``python -m learner.X``: what the command returns, 2 for wrong settings, 1 for another error of ours (both
    are printed on standard error, see ``rewards.command``), and 128 + signal when one ended it."""
    status = _status(command)
    if ray_given_up():  # what is left of Ray in this process would crash it, or wait for a minute
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    return status


def _status(command: Callable[[], int]) -> int:
    try:
        with piped():
            return reported(command)
    except KeyboardInterrupt as error:
        ended = interrupted(error)
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            print(f"stopped by {ended}", file=sys.stderr)
        return ended.exit_status


@contextlib.contextmanager
def lasting_output(on_lost: Callable[[OSError], None]) -> Iterator[None]:
    """In the block nothing that can't be written to standard output or standard error raises: the text is lost, a
    character that the terminal's encoding lacks is written as an escape, and the block goes on.

    Args:
        on_lost: called once, from whichever thread wrote; it must not print.
    """
    told = threading.Event()

    def lost(error: OSError) -> None:
        if not told.is_set():
            told.set()
            on_lost(error)

    before = sys.stdout, sys.stderr
    # What stands in for them, as under a test, is somebody's who wants to have it.
    sys.stdout, sys.stderr = (
        _lasting(stream, lost) if stream is not None and stream is original else stream
        for stream, original in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__))
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _lasting(stream: Any, on_lost: Callable[[OSError], None]) -> io.TextIOWrapper:
    stream.flush()
    raw = io.BufferedWriter(_Lasting(stream.fileno(), on_lost))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


class _Lasting(io.FileIO):
    """A descriptor that takes everything: what can't be written is lost, and told."""

    def __init__(self, descriptor: int, on_lost: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._on_lost = on_lost

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # nobody will read again; another error, a full disk's, may end
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            self._on_lost(error)
            written = None
        return memoryview(data).nbytes if written is None else written


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """In the block the first of the signals that ask for an end raises ``Interrupted``."""
    before = _handled_by(_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        _restore(before)
        raise
    _restore(before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """In the block, which must end soon, signals that ask for an end wait until it does; the first of them counts."""
    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread
        yield
        return
    came: list[int] = []
    before = _handled_by(lambda signum, frame: came.append(signum))
    try:
        yield
    finally:
        _restore(before)
        if came and callable(handler := before[came[0]]):
            handler(came[0], None)


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """What the block starts doesn't hear of a terminal that closes, nor of a batch system's warning: both are sent to
    whole groups of processes, and the run still needs its own. This process hears of them after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heeded() -> list[signal.Signals]:
    """Those that ask for an end, but for what the caller has this process ignore, as nohup does."""
    return [*_INSISTING, *(each for each in _ASKING if signal.getsignal(each) != signal.SIG_IGN)]


def _handled_by(handler: Any) -> dict[int, Any]:
    """Has the signals that ask for an end handled so; the handlers before."""
    return {signum: signal.signal(signum, handler) for signum in _heeded()}


def _restore(handlers: Mapping[int, Any]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """From here on all that the process started is being ended: another signal would only leave some of it behind."""
    global _ended_by
    _ended_by = signum
    _handled_by(signal.SIG_IGN)
    raise Interrupted(signum)


class StopFlag:
    """While entered, SIGINT, SIGTERM, SIGHUP and SIGUSR1 set the flag, and a SIGINT or SIGTERM that is the second one
    interrupts at once; further ones change nothing.

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
        self._before = _handled_by(self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            _restore(self._before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A person's wish to stop is no signal: what a batch system sends then is the first one.
        by_person, self._who = self._who is not None, None
        if signum in _INSISTING and self._signum in _INSISTING and not by_person:
            _interrupt(signum, frame)
        if self._signum is None:
            self._asked_at = time.monotonic()
        if self._signum is None or by_person or signum in _INSISTING:
            self._signum = signum
