"""deploy/slurm.sh, with stand-ins for Slurm's commands and for what it starts: signals, requeueing, secrets.

A stand-in writes down how it was called; what the script makes of it is the script's own work.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "slurm.sh"
JOB = "4711"
LIMIT_S = 60.0

STEP = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
echo $$ >> "$CALLS.steps"
trap 'exit 0' TERM
while :; do sleep 0.05; done
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo one; echo two; else echo "scontrol $*" >> "$CALLS"; fi
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >> "$CALLS"
kill -TERM $(cat "$CALLS.steps")
"""
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *token_hex*) head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'; echo ;;
    *get_node_ip_address*) echo 192.0.2.1 ;;
    "- "*) cat >/dev/null ;;
    *learner.main*)
        env > "$CALLS.environment"
        trap 'echo warned >> "$CALLS"; exit 138' USR1
        echo "python $*" >> "$CALLS"
        [[ -z ${RUN_ENDS:-} ]] || exit "$RUN_ENDS"
        while :; do sleep 0.05; done ;;
esac
"""


class Job:
    """A batch job whose script runs; its stand-ins write to ``calls``."""

    def __init__(self, folder: Path, *settings: str, **environment: str) -> None:
        self.calls = folder / "calls"
        programs = {"srun": STEP, "scontrol": SCONTROL, "scancel": SCANCEL}
        for place, made in ((folder / "slurm", programs), (folder / ".venv/bin", {"python": PYTHON, "ray": ""})):
            place.mkdir(parents=True)
            for name, text in made.items():
                (place / name).write_text(text)
                (place / name).chmod(0o755)
        (folder / "deploy").mkdir()
        shutil.copy(SCRIPT, folder / "deploy")
        slurm = {"SLURM_JOB_ID": JOB, "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "one,two"}
        slurm |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "4", "CALLS": str(self.calls)}
        path = {"PATH": f"{folder / 'slurm'}:{os.environ['PATH']}"}
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *settings],
            env=os.environ | path | slurm | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )

    def called(self) -> str:
        return self.calls.read_text() if self.calls.exists() else ""

    def wait_for(self, text: str) -> None:
        ends = time.monotonic() + LIMIT_S
        while text not in self.called():
            assert self.process.poll() is None and time.monotonic() < ends, self.called()
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit status and output; none of the steps is left."""
        output, _ = self.process.communicate(timeout=LIMIT_S)
        steps = Path(f"{self.calls}.steps")
        left = [pid for pid in steps.read_text().split() if Path(f"/proc/{pid}").exists()] if steps.exists() else []
        assert not left, "steps of Ray are still there"
        return self.process.returncode, output


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    return lambda *settings, **environment: Job(tmp_path / "root", *settings, **environment)


def test_the_warning_reaches_the_run_and_the_job_goes_back_into_the_queue(job: Callable[..., Job]) -> None:
    started = job("run.dir=/shared/runs", "recipe=sudoku")
    started.wait_for("learner.main")
    started.process.send_signal(signal.SIGUSR1)
    status, output = started.end()
    assert status == 0 and "goes back into the queue" in output, output
    called = started.called().splitlines()
    assert called[-3:] == ["warned", f"scancel --signal=TERM {JOB}", f"scontrol requeue {JOB}"]
    (run,) = (line for line in called if line.startswith("python"))
    assert run.endswith(f"run.name=slurm-{JOB} resume=auto run.dir=/shared/runs recipe=sudoku"), "it must find its run"


@pytest.mark.parametrize("status", ["0", "1", "138"])
def test_a_run_that_ends_by_itself_is_not_started_again(job: Callable[..., Job], status: str) -> None:
    started = job("run.dir=/shared/runs", RUN_ENDS=status)
    ended, output = started.end()
    assert ended == int(status), output
    assert "requeue" not in started.called() and "scancel --signal=TERM" in started.called()


def test_ray_has_a_node_each_and_a_token_that_is_nowhere_but_in_the_environment(job: Callable[..., Job]) -> None:
    started = job("run.dir=/shared/runs", RUN_ENDS="0", RAY_AUTH_MODE="disabled", RAY_ADDRESS="elsewhere:1")
    status, output = started.end()
    assert status == 0, output
    head, worker = sorted(
        (line for line in started.called().splitlines() if "srun" in line), key=lambda s: "--head" not in s
    )
    assert "--nodelist=one" in head and "node --head --port=24711" in head
    assert "--exclude=one" in worker and "--nodes=1" in worker and "--address=192.0.2.1:24711" in worker
    assert all("--no-kill" in step and "--kill-on-bad-exit=0" in step for step in (head, worker))
    environment = Path(f"{started.calls}.environment").read_text()
    assert "RAY_AUTH_MODE=token" in environment and "RAY_ADDRESS=192.0.2.1:24711" in environment
    (token,) = re.findall(r"^RAY_AUTH_TOKEN=([0-9a-f]{64})$", environment, re.MULTILINE)
    assert token not in output + started.called()
    kept = [path for path in started.calls.parent.rglob("*") if path.is_file() and token in path.read_text()]
    assert kept == [Path(f"{started.calls}.environment")], "the control: the search does find it"


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ((), {}, "run.dir=/ABSOLUTE/PATH"),
        (("run.dir=runs",), {}, "run.dir=/ABSOLUTE/PATH"),
        (("run.dir=/runs",), {"SLURM_JOB_ID": ""}, "submit it with sbatch"),
        (("run.dir=/runs",), {"SLURM_SUBMIT_DIR": "/"}, "submit it from the repository's root"),
    ],
)
def test_what_is_wrong_gets_a_sentence(
    job: Callable[..., Job], settings: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    started = job(*settings, **environment)
    status, output = started.end()
    assert status == 2 and message in output and len(output.splitlines()) == 1
    assert started.called() == ""


def options() -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    return dict(found)


def test_slurm_is_asked_to_warn_the_script_alone_and_to_take_the_job_back() -> None:
    asked = options()
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"]), "B: the script alone; Ray's processes would end of it"
    assert "requeue" in asked and asked["open-mode"] == "append"
    first = SCRIPT.read_text().index("set -euo")
    assert SCRIPT.read_text().rindex("#SBATCH") < first, "sbatch reads none behind a command"
