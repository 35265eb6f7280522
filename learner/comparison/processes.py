"""The processes of a comparison's runs: each leads a session of its own, is bounded in time, and is measured.

A comparison that is killed leaves its runs behind, and they go on. They hold its lock, which they inherited, so that
the next start waits for them instead of meeting them.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from learner.runs.atomic import disk_errors
from rewards.errors import UnmaskError, WaitTimeout

STOP_GRACE_S = 120.0
"""For a run that is asked to stop: it ends its update and saves."""
_POLL_S = 0.5
_MEMORY_EVERY_S = 2.0
_RANKS = (b"ray::LearnerRank", b"ray::OneProcess")


class RunFailed(UnmaskError):
    """A process ended badly; the message has its last words."""


class Stopped(Exception):
    """The comparison was asked to stop while the process ran; not an error."""


@contextlib.contextmanager
def lock_of_runs(path: Path, *, wait_s: float, stop: Callable[[], bool]) -> Iterator[int]:
    """A descriptor for the runs to inherit. Waits for the runs that a killed comparison left behind.

    Raises:
        Stopped: asked to stop while it waited.
        WaitTimeout: they have not ended.
    """
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline, told = time.monotonic() + wait_s, False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if stop():
                raise Stopped
            if time.monotonic() > deadline:
                raise WaitTimeout(f"runs that an earlier comparison left behind have not ended within {wait_s:g} s")
            if not told:
                print("waiting for the runs that an earlier start left behind", flush=True)
                told = True
            time.sleep(_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def run_module(
    module: str, arguments: Sequence[str], *, log: Path, lock: int, limit_s: float, stop: Callable[[], bool]
) -> int:
    """Run ``python -m MODULE`` to its end; what it prints is added to ``log``.

    Args:
        lock: descriptor that the process inherits.
        stop: says whether the comparison was asked to stop; the process is then asked too, and given time.

    Returns:
        The most bytes that a learner rank of it had resident; 0 where none was seen.

    Raises:
        RunFailed: its exit status isn't 0, or it took longer than ``limit_s``.
        Stopped: see above.
    """
    with disk_errors(log), log.open("ab") as output:
        before = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    peak, looked, deadline = 0, 0.0, time.monotonic() + limit_s
    try:
        while process.poll() is None:
            if stop():
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=STOP_GRACE_S)
                raise Stopped
            if time.monotonic() > deadline:
                raise RunFailed(f"it took longer than {limit_s:g} s (run_limit_s)")
            if time.monotonic() - looked > _MEMORY_EVERY_S:
                looked = time.monotonic()
                peak = max(peak, _peak_of_ranks(process.pid))
            time.sleep(_POLL_S)
    finally:
        _end_session(process)
    if process.returncode:
        raise RunFailed(_last_words(log, before) or f"it ended with exit status {process.returncode}")
    return peak


def _end_session(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of it: Ray's own processes outlive a killed driver for a while."""
    for pid in _members(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=STOP_GRACE_S)


def _members(leader: int) -> list[int]:
    """Processes of the session that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(folder.name))
    return found


def _peak_of_ranks(leader: int) -> int:
    """Bytes; the kernel keeps each process's high-water mark."""
    peaks = [0]
    for pid in _members(leader):
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{pid}")
            if (folder / "cmdline").read_bytes().startswith(_RANKS):
                marks = [line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM:")]
                peaks += [int(line.split()[1]) * 1024 for line in marks]
    return max(peaks)


def _last_words(log: Path, begin: int) -> str:
    """The error that the process ended with, as the log has it from this byte on: earlier ones wrote there too."""
    said = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ") if lines else ""
