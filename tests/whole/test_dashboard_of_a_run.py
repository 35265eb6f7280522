"""The dashboard that a run brings along: it comes and goes with the run, and neither harms the other."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from learner.reporting.dashboard import dashboard
from learner.reporting.reporter import Reporter
from learner.runs.directory import RunDirectory
from rewards.errors import StoreError
from services.store.schema import open_engine
from services.store.writer import StoreWriter
from tests.support import dashboards
from tests.support.real_runs import Runs, command_line, iterations, wait_until
from tests.support.store_rows import list_events

LIMIT_S = 150.0

RUN = """
import sys, time
from learner.reporting.dashboard import dashboard
from learner.reporting.reporter import Reporter
from learner.runs.directory import RunDirectory
from services.store.writer import StoreWriter
with RunDirectory.create(sys.argv[1], "one") as run_dir, StoreWriter(run_dir.store_url, "one") as store:
    reporter = Reporter(run_dir, store, total_iterations=1)
    with dashboard(run_dir, reporter):
        time.sleep(120)
"""


def events(run_dir: RunDirectory) -> dict[str, list[str]]:
    engine = open_engine(run_dir.store_url, create=False)
    found = list_events(engine, run_dir.id)
    engine.dispose()
    return {level: [e["text"] for e in found if e["level"] == level and e["kind"] == "dashboard"] for level in
            ("info", "warning")}  # fmt: skip


def address_in(run_dir: RunDirectory) -> str | None:
    try:
        told = events(run_dir)["info"]
    except StoreError:  # it is just being made
        return None
    found = re.search(r"http://127\.0\.0\.1:\d+/", told[0]) if told else None
    return found[0] if found else None


def up(address: str) -> bool:
    try:
        return httpx.get(f"{address}healthz", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def told(tmp_path: Path):
    """A run directory and its reporter."""
    with RunDirectory.create(tmp_path, "one") as run_dir, StoreWriter(run_dir.store_url, "one") as store:
        yield run_dir, Reporter(run_dir, store, total_iterations=1, quiet=True)


def test_it_comes_with_the_block_and_goes_with_it(told: tuple[RunDirectory, Reporter]) -> None:
    run_dir, reporter = told
    with dashboard(run_dir, reporter):
        wait_until(lambda: address_in(run_dir) is not None, "the address", LIMIT_S)
        address = address_in(run_dir)
        assert address is not None and up(address)
        runs = httpx.get(f"{address}api/v1/runs", trust_env=False).json()["items"]
        assert [run["id"] for run in runs] == ["one"]
    assert not up(address)
    assert events(run_dir)["warning"] == []


def test_a_start_that_fails_is_one_warning(told: tuple[RunDirectory, Reporter]) -> None:
    run_dir, reporter = told
    token = run_dir.path.parent / ".dashboard-token"
    token.write_text("tiny")
    token.chmod(0o600)
    with dashboard(run_dir, reporter):
        wait_until(lambda: bool(events(run_dir)["warning"]), "the warning", LIMIT_S)
    (warning,) = events(run_dir)["warning"]
    assert "shorter than 32 characters" in warning and "training goes on" in warning and "\n" not in warning


def test_a_port_in_use_is_passed_over(told: tuple[RunDirectory, Reporter]) -> None:
    run_dir, reporter = told
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8420))
            taken.listen()
        except OSError:
            pass  # somebody has it already, which serves as well
        with dashboard(run_dir, reporter):
            wait_until(lambda: address_in(run_dir) is not None, "the address", LIMIT_S)
            address = address_in(run_dir)
            assert address is not None and ":8420/" not in address and up(address)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_a_run_that_is_killed(tmp_path: Path, signum: int) -> None:
    run_dir = RunDirectory(tmp_path / "one")
    with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)]) as run:
        wait_until(lambda: address_in(run_dir) is not None, "the address", LIMIT_S)
        address = address_in(run_dir)
        assert address is not None and up(address)
        os.kill(run.pid, signum)
        run.wait(timeout=20)
    wait_until(lambda: not up(address), "the dashboard's end", LIMIT_S)


def test_ctrl_c_in_the_terminal_reaches_the_run_alone(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "one")
    command = [
        sys.executable,
        "-c",
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + RUN,
        str(tmp_path),
    ]
    with subprocess.Popen(command, start_new_session=True) as run:
        wait_until(lambda: address_in(run_dir) is not None, "the address", LIMIT_S)
        address = address_in(run_dir)
        assert address is not None
        os.killpg(run.pid, signal.SIGINT)  # as the terminal does
        time.sleep(1)
        assert up(address)
        run.kill()


def test_one_that_dies_is_started_again_so_often_and_no_more(
    told: tuple[RunDirectory, Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.reporting.dashboard.RESTARTS", 1)
    run_dir, reporter = told
    with dashboard(run_dir, reporter):
        wait_until(lambda: address_in(run_dir) is not None, "the address", LIMIT_S)
        address = address_in(run_dir)
        assert address is not None
        os.kill(pid_of_dashboard(run_dir), signal.SIGKILL)
        wait_until(lambda: len(events(run_dir)["info"]) == 2, "another start", LIMIT_S)
        assert events(run_dir)["warning"] == ["the dashboard died (killed by SIGKILL); it is started again"]
        assert address in events(run_dir)["info"][1] and up(address), "on the port that open pages ask"
        os.kill(pid_of_dashboard(run_dir), signal.SIGKILL)
        wait_until(lambda: len(events(run_dir)["warning"]) == 2, "the last word", LIMIT_S)
        assert "training goes on without it; by hand: " in events(run_dir)["warning"][1]
    assert len(events(run_dir)["info"]) == 2 and not up(address)


def test_one_that_is_asked_to_end_stays_away(told: tuple[RunDirectory, Reporter]) -> None:
    run_dir, reporter = told
    with dashboard(run_dir, reporter):
        wait_until(lambda: address_in(run_dir) is not None, "the address", LIMIT_S)
        os.kill(pid_of_dashboard(run_dir), signal.SIGTERM)
        wait_until(lambda: len(events(run_dir)["info"]) == 2, "the word of its end", LIMIT_S)
    assert "the dashboard was ended; training goes on" in events(run_dir)["info"][1]
    assert events(run_dir)["warning"] == []


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_of_run_or_dashboard_leaves_the_other_alone(runs: Runs) -> None:
    settings = ("run.dashboard=true", "run.iterations=5000", "evaluation.every=0")  # it doesn't end by itself
    with dashboards.dashboard(runs.folder) as standing, runs.started("guarded", *settings) as run:
        run.wait_for("an address", lambda: address_in(run.dir) is not None)
        address = address_in(run.dir)
        assert address is not None
        run.wait_for("its address in the terminal", lambda: address in run.output())
        run.wait_for_row(1)
        shown_by_it = f"{address}api/v1/runs/guarded"
        run.wait_for(
            "the row on its page", lambda: httpx.get(shown_by_it, trust_env=False, timeout=30).json()["iteration"] >= 1
        )
        os.kill(pid_of_dashboard(run.dir), signal.SIGKILL)
        run.wait_for("another start", lambda: len(events(run.dir)["info"]) == 2)
        assert "killed by SIGKILL" in events(run.dir)["warning"][0]
        run.wait_for("the word of it in the terminal", lambda: "killed by SIGKILL" in run.output())
        run.wait_for_row(iterations(run.dir)[-1] + 2)

        os.killpg(run.popen.pid, signal.SIGKILL)
        run.wait()
        wait_until(lambda: not up(address), "the end of the dashboard that came along", LIMIT_S)
        left = iterations(run.dir)[-1]
        shown = standing.api("runs/guarded")
        # A process that is gone from this machine is noticed at once, not after a minute of silence.
        assert shown["status"] == "lost" and left - 1 <= shown["iteration"] <= left
        assert standing.api("runs/guarded/metrics", name="loss")["series"]["loss"]["iteration"][-1] >= left - 1


def pid_of_dashboard(run_dir: RunDirectory) -> int:
    (pid,) = [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_dashboard_of(path, run_dir.path.parent)]
    return pid


def is_dashboard_of(process: Path, folder: Path) -> bool:
    line = command_line(int(process.name))
    brought = "services.dashboard" in line and "--while-stdin" in line
    return brought and f"--runs {folder} " in f"{line} " and "Z" not in status_of(process)


def status_of(process: Path) -> str:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_runs_have_none_unless_asked() -> None:
    from learner.settings.arguments import recipe_names
    from learner.settings.run import load_config

    assert not any(load_config([f"recipe={name}"]).run.dashboard for name in recipe_names() if name.startswith("s"))
    assert load_config(["run.dashboard=true"]).run.dashboard
    assert "run.dashboard=true" in (Path(__file__).parents[2] / "Makefile").read_text()
