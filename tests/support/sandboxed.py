"""Runs programs in the sandbox for several test files, and looks for what they left behind."""

import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

from rewards.sandbox.local import GRACE_S, LocalRunner
from rewards.sandbox.runner import Job, Limits, Outcome

LIMITS = Limits(seconds=10.0, cpu_seconds=2, memory_mb=256)
SHORT = replace(LIMITS, seconds=0.5)
"""For programs that end only when they are made to."""
ROOT = Path(__file__).resolve().parents[2]


def run(sandbox: LocalRunner, program: str, *tests: str, limits: Limits = LIMITS, setup: str = "") -> Outcome:
    """Runs a program that defines f, and checks what every run must leave behind: nothing."""
    begin = time.monotonic()
    names = {"f": "f"} if tests else {}
    outcome = sandbox.run(Job(textwrap.dedent(program), tests, names, setup), limits)
    assert time.monotonic() - begin < limits.seconds + GRACE_S + 1.0
    assert len(left_running(sandbox)) in (0, 2), "the two processes of the sandbox itself, unless they were ended too"
    return outcome


def try_call(sandbox: LocalRunner, side: str, code: str, wanted: str) -> None:
    """``code`` defines attempt(); in the program or in the tests it must give ``wanted``."""
    code = textwrap.dedent(code)
    check = f"x = attempt(); assert x == {wanted}, x"
    if side == "program":
        outcome = sandbox.run(Job(code, (check,), {"attempt": "attempt"}), LIMITS)
    else:
        outcome = run(sandbox, "def f(): pass", f"{code}\n{check}")
    assert outcome.status == "passed", outcome


def left_running(sandbox: LocalRunner) -> list[int]:
    return [] if sandbox._server is None else family(sandbox._server.pid)


def family(pid: int) -> list[int]:
    """The process and its descendants, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:  # grows while it is read
        found += children.get(member, [])
    return found


def plainly(program: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """The control: what the program prints in an ordinary interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd="/", env=environment)
    return done.stdout.strip()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
