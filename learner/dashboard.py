"""The dashboard that a run brings along: a process of its own, which ends when the run's process does.

It hangs on a pipe: however the run dies, the pipe's end closes and the dashboard goes. It leads a session of its own,
so that the terminal's Ctrl-C reaches the run alone, which still shows how it saves its last checkpoint.
``python -m services.dashboard`` is the one that stays.
"""

import contextlib
import os
import select
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from learner.reporting import Reporter
from learner.rundir import RunDirectory

START_LIMIT_S = 120.0
END_LIMIT_S = 5.0


@contextlib.contextmanager
def dashboard(run_dir: RunDirectory, reporter: Reporter) -> Iterator[None]:
    """Serve the folder that the run lies in, or the store that it shares, while the block lasts, and tell the address
    as an event.

    Begins at once. A dashboard that doesn't start is one warning; one that dies later stays dead.
    """
    folder, log = run_dir.path.parent, run_dir.path / "dashboard.log"
    shown = ["--runs", str(folder)]
    if not run_dir.store_url.startswith("sqlite"):
        shown += ["--store", run_dir.store_url]
    options = [*shown, "--any-port", "--while-stdin"]
    try:
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.dashboard", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
    except OSError as error:
        reporter.event("warning", "dashboard", f"the dashboard can't be started: {error}; training goes on")
        yield
        return
    assert process.stdin is not None and process.stdout is not None
    over = threading.Event()
    arguments = (process.stdout, shown, log, reporter, over)
    teller = threading.Thread(target=_tell_address, args=arguments, name="dashboard-address", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        process.stdin.close()
        try:
            process.wait(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=END_LIMIT_S)
        teller.join(timeout=END_LIMIT_S)
        process.stdout.close()


def _tell_address(output: IO[bytes], shown: list[str], log: Path, reporter: Reporter, over: threading.Event) -> None:
    ready = select.select([output], [], [], START_LIMIT_S)[0]
    line = output.readline().decode(errors="replace").strip() if ready else ""
    if over.is_set():
        return
    if line.startswith("dashboard: "):
        later = f"{os.path.basename(sys.executable)} -m services.dashboard {shlex.join(shown)}"
        address = line.removeprefix("dashboard: ")
        reporter.event(
            "info", "dashboard", f"dashboard: {address} (until this run ends; afterwards: {later})", url=address
        )
        return
    said = log.read_text(errors="replace").strip().splitlines()
    reason = said[-1] if said else f"nothing was heard from it for {START_LIMIT_S:g} s" if not ready else "it ended"
    reporter.event("warning", "dashboard", f"there is no dashboard ({reason}); training goes on without it")
