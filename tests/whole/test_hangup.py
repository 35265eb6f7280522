"""A run whose terminal goes: nobody reads what it prints, and its whole group of processes gets SIGHUP."""

import os
import signal
import subprocess
import sys

import pytest

from services.store import schema
from tests.support import store_rows
from tests.support.real_runs import (
    SETTINGS,
    Runs,
    clean_environment,
    iterations,
    kill_session,
    saved_iterations,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(900)]


def test_a_run_goes_on_without_its_terminal_and_saves_when_it_hangs_up(runs: Runs) -> None:
    run_dir = runs["hangup"]
    settings = [*SETTINGS, "run.iterations=10000", "checkpoint.every=10000", "evaluation.every=0"]
    run = subprocess.Popen(
        [sys.executable, "-m", "learner.main", *settings, f"run.dir={runs.folder}", "run.name=hangup"],
        cwd=runs.folder,
        env=clean_environment() | {"UNMASK_CACHE": str(runs.cache)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        assert run.stdout is not None
        while not run.stdout.readline().startswith(b"iteration 1/"):
            assert run.poll() is None
        run.stdout.close()
        wait_until(lambda: 6 in iterations(run_dir) or run.poll() is not None, "six iterations", 300)
        assert run.poll() is None, "it ended with its reader"
        os.killpg(run.pid, signal.SIGHUP)
        os.killpg(run.pid, signal.SIGHUP)  # the shell's, behind the kernel's
        assert run.wait(120) == 128 + signal.SIGHUP
    finally:
        kill_session(run.pid)
        run.wait(60)
    assert saved_iterations(run_dir) == [iterations(run_dir)[-1]]
    engine = schema.open_engine(run_dir.store_url, create=False)
    (row,) = store_rows.list_runs(engine)
    events = {event["kind"]: event["text"] for event in store_rows.list_events(engine, "hangup")}
    engine.dispose()
    assert row["status"] == "stopped"
    assert "Broken pipe" in events["terminal"] and "goes on" in events["terminal"]
