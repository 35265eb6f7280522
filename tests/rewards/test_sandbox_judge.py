"""Tests that come with a problem are anybody's code: what they hold, what they can do to the process that grades, and
what becomes of jobs that use more than they may."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rewards.errors import ConfigError
from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job
from rewards.tasks.mbpp import Mbpp
from tests.support.sandboxed import LIMITS, ROOT, SHORT, left_running, plainly, run, try_call


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalRunner]:
    runner = LocalRunner()
    yield runner
    runner.close()


HELD = """
import os, stat
def attempt():
    null = os.stat("/dev/null")
    kinds = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe", stat.S_IFREG: "file"}
    found = []
    for fd in range(1024):
        try:
            what = os.fstat(fd)
        except OSError:
            continue
        same = (what.st_dev, what.st_ino) == (null.st_dev, null.st_ino)
        found.append("null" if same else kinds[stat.S_IFMT(what.st_mode)])
    return sorted(found)
"""


def test_nothing_of_the_graders_is_open(sandbox: LocalRunner) -> None:
    """A program has its outputs and the socket to its judge; that has the report, error output, its life and the other
    end."""
    try_call(sandbox, "program", HELD, "['null', 'pipe', 'pipe', 'socket']")
    try_call(sandbox, "test", HELD, "['file', 'null', 'null', 'pipe', 'pipe', 'socket']")


def test_tests_write_to_nobodys_terminal() -> None:
    owner = """
import os
from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job, Limits
test = "import os\\nfor fd in (0, 1, 2): os.write(fd, b'heard ')"
runner = LocalRunner()
outcome = runner.run(Job("", (test,)), Limits())
runner.close()
print(outcome.status, outcome.stderr, flush=True)
exec(test)
"""
    done = subprocess.run(
        [sys.executable, "-c", owner],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "passed heard \nheard ", "in the sandbox it goes to what the outcome keeps"
    assert done.stderr == "heard ", "the control: once, without a sandbox"


THREAD = "import threading; threading.Thread(target=print).start()"


@pytest.mark.parametrize(("start", "error"), [("import os; os.fork()", "PermissionError"), (THREAD, "RuntimeError")])
def test_tests_start_nothing(sandbox: LocalRunner, start: str, error: str) -> None:
    outcome = run(sandbox, "def f(): pass", start)
    assert outcome.status == "failed" and error in (outcome.error or ""), outcome
    may = run(sandbox, f"def f():\n    {start.replace('; os.fork()', '; os.fork() or os._exit(0)')}", "f()")
    assert may.status == "passed", "the control: a program may"


def test_tests_reach_no_process(sandbox: LocalRunner) -> None:
    victim = subprocess.Popen(["sleep", "600"])
    kill = f"import os\nos.kill({victim.pid}, 9)"
    try:
        outcome = run(sandbox, "def f(): pass", kill, "import os; assert (os.getpid(), os.getppid()) == (1, 0)")
        assert "ProcessLookupError" in str(outcome.tests[0]) and outcome.tests[1] is None
        assert victim.poll() is None
        plainly(kill)
        assert victim.wait(timeout=10) == -signal.SIGKILL, "the control"
    finally:
        victim.kill()
        victim.wait(timeout=10)


NASTY_TESTS = [
    ("memory", "x = []\nwhile True: x.append(bytearray(1 << 20))", {"memory", "failed"}),
    ("endless", "while True: pass", {"timeout"}),
    ("ends", "import os\nos._exit(0)", {"crashed"}),
    ("raises what the judge does", "from rewards.sandbox.values import Closed\nraise Closed", {"crashed", "failed"}),
    ("output", "import os\nwhile True: os.write(2, b'x' * 9999)", {"output"}),
    ("closes everything", "import os\nos.closerange(0, 99)", {"crashed"}),
    ("kills the program", "import os\nos.kill(-1, 9)\nf()", {"crashed"}),
    ("a segmentation fault", "import ctypes\nctypes.string_at(0)", {"crashed"}),
]
REPORTS = {
    "no JSON": "b'what?\\n'",
    "a cut line": """b'{"result": nu'""",
    "a list": "b'[1, 2]\\n'",
    "another type": """b'{"result": 5}\\n'""",
    "another type of the end": """b'{"ended": "x", "cpu_seconds": []}\\n'""",
    "another field": """b'{"results": null}\\n'""",
    "nested": """b'{"result":' + b'[' * 100_000 + b'\\n'""",
    "a huge number": """b'{"ended": ' + b'9' * 100_000 + b'}\\n'""",
    "no exit code": """b'{"ended": ' + b'9' * 4000 + b'}\\n'""",
    "no signal": """b'{"ended": -65}\\n'""",
    "true": """b'{"ended": true}\\n'""",
    "half a character": """b'{"result": "x\\\\ud800\\\\u0000y"}\\n'""",
    "a huge text": """b'{"result": "' + b'x' * 1_000_000 + b'"}\\n'""",
    "not UTF-8": """b'{"result": "\\xff"}\\n'""",
    "too many": """b'{"result": null}\\n' * 100_000""",
    "too much": """b' ' * (8 << 20)""",
}


@pytest.mark.parametrize(("test", "statuses"), [row[1:] for row in NASTY_TESTS], ids=[row[0] for row in NASTY_TESTS])
def test_a_nasty_test(sandbox: LocalRunner, test: str, statuses: set[str]) -> None:
    outcome = run(sandbox, "def f(): return 1", test, limits=SHORT if "timeout" in statuses else LIMITS)
    assert outcome.status in statuses and len(outcome.tests) == 1, outcome
    assert run(sandbox, "def f(): return 1", "assert f() == 1").status == "passed", "the next is none the worse"


@pytest.mark.parametrize("name", REPORTS)
def test_a_test_that_writes_into_the_report(sandbox: LocalRunner, name: str) -> None:
    """Of its own verdict it decides anyway. Nothing else comes of it, no error in the process that grades."""
    write = f"import os, stat\nfor fd in range(3, 16):\n    try: regular = stat.S_ISREG(os.fstat(fd).st_mode)\n" \
            f"    except OSError: continue\n    if regular: os.write(fd, {REPORTS[name]})"  # fmt: skip
    outcome = run(sandbox, "def f(): return 1", write)
    expected = {"too many": "passed", "a huge text": "failed", "half a character": "failed"}.get(name, "crashed")
    assert outcome.status == expected and len(outcome.tests) == 1, outcome
    assert len(outcome.error or "") < 5000
    assert outcome.error is None or outcome.error.encode() and "\0" not in outcome.error
    assert outcome.exit_code is None and outcome.signal is None
    if name == "half a character":
        assert outcome.error == "x?\ufffdy"
    assert run(sandbox, "def f(): return 1", "assert f() == 1").status == "passed"


BUSY = """
import os, signal, time
def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
def children(count, seconds):
    for _ in range(count):
        if os.fork() == 0:
            busy(seconds)
            os._exit(0)
"""
TOGETHER = {
    "waited for": "def f():\n    children(3, 0.45)\n    for _ in range(3): os.wait()",
    "one after the other": "def f():\n    for _ in range(3):\n        children(1, 0.45)\n        os.wait()",
    "orphans": "def f():\n    read, write = os.pipe()\n    if os.fork() == 0:\n        children(3, 0.45)\n"
    "        os._exit(0)\n    os.wait(); os.close(write)\n    os.read(read, 1)",
    "never waited for": "def f():\n    read, write = os.pipe()\n    children(3, 0.45); os.close(write)\n"
    "    os.read(read, 1)",
    "ignored": "def f():\n    read, write = os.pipe()\n    try: signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    "    except PermissionError: pass\n    children(3, 0.45); os.close(write)\n    os.read(read, 1)",
    "and its own": "def f():\n    busy(0.7)\n    children(1, 0.7)\n    os.wait()",
}  # fmt: skip


SELDOM = ("one after the other", "never waited for", "and its own")


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] if how in SELDOM else []) for how in TOGETHER]
)
def test_the_cpu_time_is_that_of_all_processes(sandbox: LocalRunner, how: str) -> None:
    """1.4 s of 1 s, of which no process uses more than 0.7."""
    limits = replace(LIMITS, cpu_seconds=1, seconds=30.0)
    outcome = run(sandbox, BUSY + TOGETHER[how], "f()", limits=limits)
    assert outcome.status == "timeout" and outcome.tests != (None,), outcome


def test_below_the_limit_processes_pass(sandbox: LocalRunner) -> None:
    """The control: the same programs within their limit."""
    for program in TOGETHER.values():
        limits = replace(LIMITS, cpu_seconds=9, seconds=30.0)
        short = program.replace("0.45", "0.05").replace("0.7", "0.1")
        assert run(sandbox, BUSY + short, "f()", limits=limits).status == "passed", program


def kill_servers(runner: LocalRunner, times: int, killed: threading.Event) -> None:
    """Kills the server that has run a job for a while."""
    deadline = time.monotonic() + 20
    last = None
    while times and time.monotonic() < deadline:
        time.sleep(0.1)
        processes = left_running(runner)
        if len(processes) == 4 and processes == last:  # outer, server, judge and program, as a moment ago
            os.kill(processes[1], signal.SIGKILL)
            times -= 1
        last = processes
    killed.set()


def test_a_server_that_is_killed_over_one_program_twice() -> None:
    """Which no program can do but by the machine's memory: its own fault while others pass, else the machine's."""
    sleeps = Job("import time\ntime.sleep(600)", ("assert f()",), {"f": "f"})
    limits = replace(LIMITS, seconds=20.0)
    runner = LocalRunner()
    try:
        for times, status in ((2, "memory"), (1, "timeout")):
            killed = threading.Event()
            thread = threading.Thread(target=kill_servers, args=(runner, times, killed))
            thread.start()
            outcome = runner.run(sleeps, limits if times == 2 else replace(limits, seconds=1.5))
            thread.join()
            assert killed.is_set() and outcome.status == status and len(outcome.tests) == 1, outcome
        assert runner.run(Job("x = 1"), limits).status == "passed"
    finally:
        runner.close()


def test_a_machine_that_kills_every_server(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = LocalRunner()
    assert runner.run(Job("x = 1"), LIMITS).status == "passed"

    def killer() -> None:
        kill_servers(runner, 2, threading.Event())
        monkeypatch.setattr(sys, "executable", "/bin/false")  # no interpreter comes up any more

    thread = threading.Thread(target=killer)
    try:
        thread.start()
        with pytest.raises(ConfigError, match="killed over the program, twice, and .* out of memory"):
            runner.run(Job("import time\ntime.sleep(600)"), replace(LIMITS, seconds=20.0))
    finally:
        thread.join()
        runner.close()


def test_a_poisoned_data_set_does_nothing_to_the_host() -> None:
    """Through the task, as a row of its file."""
    attack = """import ctypes
libc = ctypes.CDLL(None)
done = libc.mount(None, b"/usr/lib", None, ctypes.c_ulong(32 | 4096 | 2 | 4), None)
assert add(1, 1) == 2 and done == -1"""
    grade = Mbpp().grade({"text": "Add.", "tests": [attack]}, "```python\ndef add(a, b): return a + b\n```")
    assert grade.correct, grade
