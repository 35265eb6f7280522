"""How runs were started and how to go on, checkpoints with what they are worth, and a dead process seen at once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.store.starts import BEGUN
from tests.support.dashboards import Place, dashboard, eventually, writer

RECORD = {"folder": "/somewhere", "recipe": "sudoku", "recipe_settings": {"learner": {"lr": 0.001}}, "versions": {}}
ITERATIONS = (10, 20, 30)
RATES = (0.25, 0.75, 0.5)


def test_starts_checkpoints_and_a_dead_process(tmp_path: Path) -> None:
    runs = tmp_path / "my runs"
    for command in ("python -m learner.main recipe=sudoku", "python -m learner.main run.name=a resume=auto"):
        with writer(runs, "a", config={"run": {"dir": "elsewhere"}}) as store:
            store.event("info", BEGUN, command, RECORD)
            for iteration, rate in zip(ITERATIONS, RATES, strict=True):
                store.metrics(iteration, {"eval/m/solve_rate": rate, "reward/mean": 1.0})
                store.checkpoint(iteration, f"/moved/since/checkpoints/iteration-{iteration:06d}")
            store.event("info", "stop", "asked to stop")
            store.status("stopped")
            assert store.flush(20)
    for iteration in ITERATIONS[1:]:
        (runs / "a" / "checkpoints" / f"iteration-{iteration:06d}").mkdir(parents=True)
    Place(runs).execute("a", "UPDATE events SET time = created.t FROM (SELECT created AS t FROM runs) AS created")
    Place(runs).execute("a", "UPDATE events SET time = time + 100 * id")  # begun at 100 and 300, stopped at 200 and 400
    Place(runs).execute("a", "UPDATE runs SET ended = created + 450")

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with writer(runs, "b") as alive, dashboard(runs) as service:
        found = service.api("runs/a/starts")
        assert [start["command"].rpartition(" ")[2] for start in found["items"]] == ["recipe=sudoku", "resume=auto"]
        assert found["items"][0]["about"] == RECORD
        assert found["ran_s"] == pytest.approx(200 + 150), "without the time between the two"
        assert found["go_on"] == f"python -m learner.main 'run.dir={runs}' run.name=a resume=auto"

        shown = service.api("runs/a/checkpoints")["items"]
        assert [(each["iteration"], each["held_out"], each["on_disk"]) for each in shown] == [
            *((10, 0.25, False), (20, 0.75, True), (30, 0.5, True))
        ]
        assert [each["iteration"] for each in shown if each["best"]] == [20]
        assert [each["iteration"] for each in shown if each["last"]] == [30]
        assert shown[1]["path"] == str(runs / "a" / "checkpoints" / "iteration-000020"), "not where it was once"
        assert shown[1]["evaluate"].startswith(f"python -m learner.evaluate --run '{runs}/a' 'adapter=")

        reference = service.api("metric-reference")["items"]
        assert next(entry for entry in reference if entry["name"] == "entropy")["healthy"]

        # A process that is gone, which the run's lock names; the heartbeat goes on being fresh all the while.
        Place(runs).execute("b", f"UPDATE runs SET pid = {child.pid}")
        named = {"pid": child.pid, "host": socket.gethostname(), "pids": os.readlink("/proc/self/ns/pid")}
        (runs / "b" / "run.lock").write_text(json.dumps(named))
        alive.metrics(1, {"reward/mean": 1.0})
        assert alive.flush(20)
        eventually(lambda: service.api("runs/b")["iteration"] == 1)
        assert service.api("runs/b")["status"] == "running"
        child.communicate(b"\n")
        eventually(lambda: service.api("runs/b")["status"] == "lost", limit_s=20)
        for other in ({"host": "another"}, {"pids": "pid:[1]"}, {"pid": os.getpid()}):
            (runs / "b" / "run.lock").write_text(json.dumps(named | other))
            assert service.api("runs/b")["status"] == "running", "it can't be known of another machine's process"
