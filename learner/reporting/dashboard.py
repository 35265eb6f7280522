"""The dashboard that a run brings along: a process of its own, which ends when the run's process does.

It hangs on a pipe: however the run dies, the pipe's end closes and the dashboard goes. It leads a session of its own,
so that the terminal's Ctrl-C reaches the run alone, which still shows how it saves its last checkpoint.
``python -m services.dashboard`` is the one that stays.
"""

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from learner.reporting.reporter import Reporter
from learner.runs.directory import RunDirectory
from services.store.schema import sqlite_url

START_LIMIT_S = 120.0
END_LIMIT_S = 5.0
RESTARTS = 3
"""How often a dashboard that died is started again, over the whole run."""
_LOOK_S = 0.2


@contextlib.contextmanager
def dashboard(run_dir: RunDirectory, reporter: Reporter) -> Iterator[None]:
    """Serve the folder that the run lies in, or the store that it shares, while the block lasts, and tell the address
    as an event.

    Begins at once. One that doesn't start is a warning. One that dies is a warning and started again, on the same port
    where that is free, at most ``RESTARTS`` times; one that was asked to end (SIGTERM, SIGINT) stays away.
    """
    folder = run_dir.path.parent
    shown = ["--runs", str(folder)]
    if run_dir.store_url != sqlite_url(run_dir.store_path):
        shown += ["--store", run_dir.store_url]
    over = threading.Event()
    keeper = _Keeper(shown, run_dir.path / "dashboard.log", reporter, over)
    thread = threading.Thread(target=keeper.keep, name="dashboard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=3 * END_LIMIT_S)


class _Keeper:
    """Keeps a dashboard up until ``over``; works in a thread of its own, since a run has long waits without a tick."""

    def __init__(self, shown: list[str], log: Path, reporter: Reporter, over: threading.Event) -> None:
        self._shown, self._log, self._reporter, self._over = shown, log, reporter, over
        python = min(sys.executable, os.path.relpath(sys.executable), key=len)
        self._by_hand = f"{shlex.quote(python)} -m services.dashboard {shlex.join(shown)}"

    def keep(self) -> None:
        port: list[str] = []
        for left in range(RESTARTS, -1, -1):
            try:
                status, address = self._serve(port)
            except OSError as error:
                self._warn(f"the dashboard can't be started: {error}; training goes on")
                return
            if self._over.is_set() or address is None:
                return
            port = ["--port", str(urlsplit(address).port)]
            if status in (0, -signal.SIGTERM, -signal.SIGINT):
                self._tell(f"the dashboard was ended; training goes on; to have it back: {self._by_hand}")
                return
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            goes_on = "it is started again" if left else f"training goes on without it; by hand: {self._by_hand}"
            self._warn(f"the dashboard died ({how}); {goes_on}")

    def _serve(self, port: list[str]) -> tuple[int, str | None]:
        """Until it dies or all is over: its exit status, and its address unless it never had one, which is told."""
        with self._log.open("ab") as errors:
            said_before = errors.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "services.dashboard", *self._shown, *port, "--any-port", "--while-stdin"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        with _ending(process):
            line = self._first_line(process)
            address = line.removeprefix("dashboard: ") if line.startswith("dashboard: ") else None
            if address is not None:
                self._tell(f"dashboard: {address} (until this run ends; afterwards: {self._by_hand})", url=address)
                while process.poll() is None and not self._over.wait(_LOOK_S):
                    pass
            elif not self._over.is_set():
                said = self._log.read_bytes()[said_before:].decode(errors="replace").strip().splitlines()
                reason = said[-1] if said else f"nothing was heard from it for {START_LIMIT_S:g} s, or it ended"
                self._warn(f"there is no dashboard ({reason}); training goes on without it")
        return process.returncode, address

    def _first_line(self, process: "subprocess.Popen[bytes]") -> str:
        """Empty when it ends, or all is over, before there is one."""
        assert process.stdout is not None
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and not self._over.is_set():
            if select.select([process.stdout], [], [], _LOOK_S)[0]:
                return process.stdout.readline().decode(errors="replace").strip()
        return ""

    def _tell(self, text: str, **data: str) -> None:
        self._reporter.event("info", "dashboard", text, **data)

    def _warn(self, text: str) -> None:
        self._reporter.event("warning", "dashboard", text)


@contextlib.contextmanager
def _ending(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """With the block the process ends: its standard input does, and if that is not enough it is killed."""
    assert process.stdin is not None and process.stdout is not None
    try:
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=END_LIMIT_S)
        process.stdout.close()
