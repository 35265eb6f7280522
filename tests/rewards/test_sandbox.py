"""The code sandbox: verdicts, values, what a program can't see, reach or write, and that nothing of it stays."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.errors import ConfigError
from rewards.sandbox import runner as runners
from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job, Limits
from tests.support.sandboxed import LIMITS, ROOT, family, left_running, plainly, run, running


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalRunner]:
    runner = LocalRunner()
    yield runner
    runner.close()


def test_right_wrong_and_broken_programs(sandbox: LocalRunner) -> None:
    right = run(sandbox, "def f(x): return x + 1", "assert f(1) == 2", "assert f(2) == 3")
    assert (right.status, right.tests, right.compiled, right.error) == ("passed", (None, None), True, None)
    wrong = run(sandbox, "def f(x): return 2", "assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4")
    assert wrong.status == "failed" and wrong.tests[0] is None and "f(2) == 3" in (wrong.tests[1] or "")
    raising = run(sandbox, "def f(x):\n    return 1 / x", "assert f(0) == 1", "assert f(1) == 1")
    assert "line 2: division by zero" in (raising.tests[0] or "") and raising.tests[1] is None
    broken = run(sandbox, "def f(x) return x", "assert f(1) == 1")
    assert (broken.status, broken.compiled) == ("failed", False) and "SyntaxError" in (broken.error or "")
    late = run(sandbox, "raise ValueError('no')", "assert f(1) == 1")
    assert (late.status, late.compiled) == ("failed", True) and "ValueError: line 1: no" in (late.error or "")
    missing = run(sandbox, "g = 1", "assert f(1) == 1")
    assert missing.status == "failed" and "doesn't define f" in (missing.tests[0] or "")
    printed = run(sandbox, "import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (printed.status, printed.stdout, printed.stderr) == ("passed", "out\n", "err\n")


def test_a_detached_process_is_seen_by_the_check_above() -> None:
    """The control for ``left_running``: without a sandbox the daemon lives on."""
    printed = plainly(
        """
        import os, sys, time
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            pid = os.fork()
            if pid == 0:
                for fd in (0, 1, 2): os.close(fd)
                time.sleep(600)
            os.write(write, str(pid).encode())
            os._exit(0)
        os.wait()
        print(os.read(read, 99).decode())
        """
    )
    try:
        assert family(int(printed)) == [int(printed)] and Path(f"/proc/{printed}").exists()
    finally:
        os.kill(int(printed), signal.SIGKILL)


WRITES = """
import os, sys
def f(*paths):
    written = []
    for path in paths:
        try:
            with open(path, "w") as file:
                file.write("x")
            written.append(path)
        except OSError:
            pass
    return written
"""


def test_nothing_is_written_outside(sandbox: LocalRunner, tmp_path: Path) -> None:
    mark = f"unmask-escaped-{os.getpid()}"
    places = [
        Path("/"),
        Path.home(),
        ROOT,
        tmp_path,
        Path("/usr/lib"),
        Path("/dev/shm"),
        Path("/var/tmp"),
        Path("/proc"),
    ]
    paths = [str(place / mark) for place in places]
    seen = run(sandbox, WRITES, f"assert f(*{paths!r}) == []")
    assert seen.status == "passed", seen
    inside = run(sandbox, WRITES, f"assert f('/tmp/{mark}', 'x') == ['/tmp/{mark}', 'x']")
    assert inside.status == "passed", "its own /tmp it may write"
    gone = run(sandbox, "import os\ndef f(): return os.listdir('/tmp')", "assert f() == []")
    assert gone.status == "passed", "and the next program finds it empty"
    assert not any(Path(path).exists() for path in [*paths, f"/tmp/{mark}"])
    control = plainly(WRITES + "print(f(*sys.argv[1:]))", str(tmp_path / mark))
    assert mark in control and (tmp_path / mark).exists()


READS = """
import os, sys
def f():
    try:
        files = os.listdir("/proc")
    except OSError:
        files = []
    return [dict(os.environ), os.path.exists({path!r}), files]
"""


def test_it_sees_neither_environment_nor_files_nor_processes(
    sandbox: LocalRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "1")
    secret = tmp_path / "secret"
    secret.write_text("1")
    program = READS.format(path=str(secret))
    assert run(sandbox, program, "assert f() == [{}, False, []]").status == "passed"
    fresh = LocalRunner()  # started while the variable is set
    try:
        assert run(fresh, program, "assert f() == [{}, False, []]").status == "passed"
    finally:
        fresh.close()
    control = plainly(program + "print(f())", environment=dict(os.environ))
    assert "'SECRET': '1'" in control and "True" in control and f"'{os.getpid()}'" in control


def test_it_cannot_reach_a_process_outside(sandbox: LocalRunner) -> None:
    victim = subprocess.Popen(["sleep", "600"])
    try:
        program = f"import os\ndef f():\n    os.kill({victim.pid}, 9)"
        assert "ProcessLookupError" in str(run(sandbox, program, "f()").tests[0])
        time.sleep(0.1)
        assert victim.poll() is None
        plainly(program + "\nf()")
        assert victim.wait(timeout=10) == -signal.SIGKILL, "the control: without a sandbox it can"
    finally:
        victim.kill()
        victim.wait(timeout=10)


NETWORK = """
import socket, sys
def f(family, kind, address):
    try:
        with socket.socket(family, kind) as end:
            end.settimeout(1)
            end.connect(address)
            end.send(b"x")
        return "sent"
    except OSError as error:
        return type(error).__name__
"""


def test_no_network(sandbox: LocalRunner, tmp_path: Path) -> None:
    listeners: list[tuple[int, int, str | tuple[str, int]]] = [
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, str(tmp_path / "path")),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"\0unmask-{os.getpid()}"),
    ]
    for family_, kind, address in listeners:
        with socket.socket(family_, kind) as listening:
            listening.bind(address)
            if kind == socket.SOCK_STREAM:
                listening.listen(4)
            bound = listening.getsockname()
            target = bound.decode() if isinstance(bound, bytes) else bound
            call = f"f({int(family_)}, {int(kind)}, {target!r})"
            assert plainly(NETWORK + f"print({call})") == "sent", "the control"
            outcome = run(sandbox, NETWORK, f"assert {call} != 'sent', 'sent'")
            assert outcome.status == "passed", (call, outcome)


def test_no_other_socket_family_and_no_names(sandbox: LocalRunner) -> None:
    program = """
    import socket
    def f():
        made = []
        for family in range(2, 50):
            for kind in (1, 2, 3, 5):
                try:
                    socket.socket(family, kind).close()
                    made.append(family)
                except OSError:
                    pass
        return made
    def g():
        return socket.getaddrinfo("localhost", 80)
    """
    assert run(sandbox, program, "assert f() == []").status == "passed"
    lookup = sandbox.run(Job(textwrap.dedent(program), ("g()",), {"g": "g"}), LIMITS)
    assert lookup.status == "failed" and "ProgramError" in (lookup.error or "") + str(lookup.tests)
    assert plainly(textwrap.dedent(program) + "\nprint(f() != [])") == "True", "the control"


@pytest.mark.parametrize(
    "call",
    [
        "unshare(0x10000000)", "unshare(0x20000000)", "mount(b'x', b'/tmp', b'tmpfs', 0, None)", "umount2(b'/tmp', 2)",
        "ptrace(0, 0, 0, 0)", "setuid(0)", "chroot(b'/tmp')", "memfd_create(b'x', 0)", "shmget(0, 4096, 0o1600)",
        "syscall(425, 1, 0)", "syscall(435, 0, 0)", "setns(0, 0)", "sethostname(b'x', 1)",
    ],
)  # fmt: skip
def test_no_system_call_out_of_it(sandbox: LocalRunner, call: str) -> None:
    program = f"import ctypes\ndef f(): return ctypes.CDLL(None).{call}"
    outcome = run(sandbox, program, "assert f() == -1")
    if call == "setuid(0)" and os.geteuid() != 0:
        pytest.skip("it is user 0 of a namespace in which that says nothing")
    assert outcome.status == "passed", outcome


def test_the_tests_are_not_in_the_programs_memory(sandbox: LocalRunner) -> None:
    program = """
import gc
gc.unfreeze()
def f():
    return any("-".join(["what", "the", "tests", "expect"]) in text for text in texts())
def texts():
    for thing in gc.get_objects():
        for inner in gc.get_referents(thing):
            if type(inner) is str:
                yield inner
"""
    for _ in range(2):  # neither this job's nor the one's before
        outcome = run(sandbox, program, "assert f() is False, 'what-the-tests-expect'")
        assert outcome.tests == (None,), outcome
        failed = run(sandbox, "def f(): return 1", "assert f() == 'what-the-tests-expect'")
        assert "what-the-tests-expect" in (failed.error or "")
    kept = run(sandbox, program + "kept = ['-'.join(['what', 'the', 'tests', 'expect'])]", "assert f() is True")
    assert kept.status == "passed", ("the control", kept)


def test_values_cross_unchanged(sandbox: LocalRunner) -> None:
    program = """
    from collections import Counter, OrderedDict, namedtuple
    from decimal import Decimal
    from fractions import Fraction
    Point = namedtuple("Point", "x y")
    class Node:
        def __init__(self, value): self.value, self.next = value, None
    def f(value): return value
    def g(kind): return {
        "counter": Counter("aab"), "ordered": OrderedDict(a=1), "point": Point(1, 2), "map": map(abs, [-1, 2]),
        "generator": (n for n in range(3)), "decimal": Decimal("1.5"), "fraction": Fraction(1, 3), "range": range(3),
        "nested": [{"a": (1, {2, 3})}, frozenset([1])], "keys": {"a": 1}.keys(), "function": len, "node": Node(7),
    }[kind]
    root = Node(5)
    def value(node): return node.value
    """
    tests = [
        *(f"x = {value}; assert f(x) == x and type(f(x)) is type(x)" for value in (
            "None", "True", "0", "-7", "2**53", "-2**200", "10**5000", "1.5", "-0.0", "float('inf')", "1e-300",
            "'a\\ud800'",            "b'\\0\\xff'", "bytearray(b'x')", "[]", "()", "{}", "set()", "{(1, 2): [3]}", "1j",
            "int",
            "range(2, 9, 3)",            "['ref', 0]", "{'error': 1}", "['list', [1]]",
        )),
        "assert str(f(-0.0)) == '-0.0' and f(float('nan')) != f(float('nan'))",
        "assert g('counter') == {'a': 2, 'b': 1} and g('ordered') == {'a': 1} and g('point') == (1, 2)",
        "assert list(g('map')) == [1, 2] and sorted(g('generator')) == [0, 1, 2] and next(g('generator')) == 0",
        "from decimal import Decimal; from fractions import Fraction",
        "assert g('decimal') == Decimal('1.5') and g('fraction') == Fraction(1, 3) and g('range') == range(3)",
        "assert g('nested') == [{'a': (1, {2, 3})}, frozenset([1])] and set(g('keys')) == {'a'}",
        "assert g('function')([1, 2]) == 2 and g('node').value == 7 and value(g('node')) == 7 and value(root) == 5",
        "assert g('node') != 7 and g('node') != g('node') and g('node')",
        "try:\n    g('none')\n    assert False, 'no error'\nexcept KeyError:\n    pass",
    ]  # fmt: skip
    names = {name: name for name in ("f", "g", "root", "value")}
    outcome = sandbox.run(Job(textwrap.dedent(program), tests, names), LIMITS)
    assert [result for result in outcome.tests if result is not None] == []
    assert outcome.status == "passed" and len(outcome.tests) == len(tests)


def test_verdicts_repeat(sandbox: LocalRunner) -> None:
    program = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd', 'e'}), id(f) > 0]"
    fresh = LocalRunner()
    try:
        shown = [run(where, program + "\nprint(f())").stdout for where in (sandbox, sandbox, fresh)]
    finally:
        fresh.close()
    assert len(set(shown)) == 1 and shown[0]


def test_output_is_cut(sandbox: LocalRunner) -> None:
    outcome = run(sandbox, "print('x' * 100_000)")
    assert outcome.status == "passed" and 16_000 < len(outcome.stdout) < 20_000


OWNER = """
import sys
from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job, Limits
runner = LocalRunner()
runner.run(Job("x = 1"), Limits())
print(runner._server.pid, flush=True)
runner.run(Job("import os\\nos.fork()\\nwhile True: pass"), Limits(seconds=600, cpu_seconds=600))
"""


def test_nothing_outlives_a_killed_owner() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    try:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        deadline = time.monotonic() + 10
        while len(family(server)) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        processes = family(server)
        assert len(processes) == 5, "outer, server, judge, and the program twice"
    finally:
        owner.kill()
        owner.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(running(pid) for pid in processes)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_costs_no_verdict(sandbox: LocalRunner, signum: int) -> None:
    assert run(sandbox, "x = 1").status == "passed"
    assert sandbox._server is not None
    os.kill(left_running(sandbox)[1], signum)
    time.sleep(0.2)
    job = Job("def f(): return 1", ("assert f() == 1",), {"f": "f"})
    assert sandbox.run(job, Limits(seconds=0.5)).status == "passed"


def test_a_machine_without_namespaces_is_refused() -> None:
    """The sentence says what to do."""
    program = """
import platform
from rewards.errors import ConfigError
from rewards.sandbox import isolation, system_calls
from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job, Limits
isolation.forgo_privileges()
unshare = {"x86_64": 272, "aarch64": 97}[platform.machine()]
isolation.filter_system_calls(system_calls.assemble({unshare: system_calls.REFUSE}, system_calls.ALLOW))
try:
    LocalRunner().run(Job("x = 1"), Limits())
except ConfigError as error:
    print(error)
"""
    printed = plainly(program, environment={"PYTHONPATH": str(ROOT)})
    assert "can't isolate programs (unshare: Operation not permitted)" in printed and "UNMASK_CODE_RUNNER" in printed


OWN_RUNNER = """
from rewards.sandbox.runner import Outcome
class Own:
    def run(self, job, limits):
        return Outcome("passed" if "good" in job.program else "failed", tests=(None,) * len(job.tests))
    def close(self):
        pass
class Broken:
    def __init__(self):
        raise RuntimeError("no connection")
"""


def test_a_users_runner_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_runner_for_tests.py").write_text(OWN_RUNNER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(runners.RUNNER_VARIABLE, "own_runner_for_tests:Own")
    assert runners.run_program(Job("good"), LIMITS).status == "passed"
    assert runners.run_program(Job("bad"), LIMITS).status == "failed"
    for name, message in (("own_runner_for_tests:Broken", "no connection"), ("nowhere:X", "package.module:Class")):
        monkeypatch.setenv(runners.RUNNER_VARIABLE, name)
        with pytest.raises(ConfigError, match=message):
            runners.run_program(Job("good"), LIMITS)
    assert runners.run_program(Job("x" * (runners.MAX_PROGRAM_CHARACTERS + 1)), LIMITS).status == "refused"
