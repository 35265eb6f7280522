"""Programs that attack the sandbox or their tests, each in bounded time and without effect on what comes after."""

from collections.abc import Iterator

import pytest

from rewards.sandbox.local import LocalRunner
from tests.support.sandboxed import LIMITS, SHORT, plainly, run


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalRunner]:
    runner = LocalRunner()
    yield runner
    runner.close()


FORKS = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
def f(): return 1
"""
ATTACKS = [
    ("fork bomb", FORKS, {"timeout"}),
    ("threads", "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=(9,)).start()", {"failed"}),
    ("memory", "x = []\nwhile True: x.append(bytearray(1 << 20))", {"memory"}),
    ("memory at once", "x = bytearray(1 << 40)", {"memory"}),
    ("memory of children", "import os\nfor _ in range(2): os.fork()\nx = bytearray(1 << 31)", {"memory", "crashed"}),
    ("endless loop", "while True: pass", {"timeout"}),
    ("endless loop in a test", "def f():\n    while True: pass", {"timeout"}),
    ("sleep", "import time\ntime.sleep(600)", {"timeout"}),
    ("endless regular expression", "import re\nre.match('(a+)+$', 'a' * 50 + 'b')", {"timeout"}),
    ("huge power", "x = 9 ** 9 ** 9", {"timeout", "memory"}),
    ("huge text of a number", "x = str(10 ** 100_000)", {"failed"}),
    ("huge result", "def f(): return 'x' * (1 << 25)", {"failed", "memory"}),
    ("endless result", "def f():\n    while True: yield 1", {"failed"}),
    ("deep result", "def f():\n    x = []\n    for _ in range(100_000): x = [x]\n    return x", {"failed"}),
    ("circular result", "def f():\n    x = []\n    x.append(x)\n    return x", {"failed"}),
    ("recursion", "def f(): return f()", {"failed"}),
    ("recursion without limit", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()",
     {"crashed", "memory", "timeout"}),
    ("nested source", "(" * 100_000, {"failed", "memory", "crashed"}),
    ("segmentation fault", "import ctypes\nctypes.string_at(0)", {"crashed"}),
    ("abort", "import os\nos.abort()", {"crashed"}),
    ("kill all", "import os\nos.kill(-1, 9)", {"crashed", "passed", "failed"}),
    ("kill the judge", "import os, signal\nfor s in (2, 9, 15): os.kill(1, s)", {"failed"}),
    ("output", "while True: print('x' * 1000)", {"output"}),
    ("error output", "import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    ("output of a child", "import os\nos.fork()\nwhile True: os.write(1, b'x' * 9999)", {"output"}),
    ("big file", "x = open('x', 'wb')\nwhile True: x.write(b'x' * (1 << 20))", {"failed", "crashed"}),
    ("many files", "n = 0\nwhile True:\n    open(str(n), 'w').close(); n += 1", {"failed"}),
    ("deep folders", "import os\nwhile True:\n    os.mkdir('x'); os.chdir('x')", {"failed"}),
    ("open files", "import os\nx = []\nwhile True: x.append(os.open('/dev/null', 0))", {"failed"}),
    ("many links", "import os\nopen('x', 'w')\nn = 0\nwhile True:\n    os.link('x', str(n)); n += 1", {"failed"}),
    ("closed files", "import os\nos.closerange(0, 100)", {"crashed"}),
    ("own copies of files", "import os\nfor n in range(4, 30): os.dup2(3, n)\nos.close(3)", {"crashed"}),
    ("lies on its socket", "import os\nos.write(3, b'\\0\\0\\0\\4true')\ndef f(): return 1", {"crashed"}),
    ("zombies", "import os\nwhile True:\n    if os.fork() == 0: os._exit(0)", {"failed", "timeout"}),
    ("signals ignored", "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
     "    except (OSError, ValueError): pass\nwhile True: pass", {"timeout", "crashed"}),
    ("daemon", DAEMON, {"passed"}),
    ("sleeping children", "import os, time\nif os.fork() == 0: time.sleep(600)\ndef f(): return 1", {"passed"}),
    ("child answers", "import os\nif os.fork(): os._exit(0)\ndef f(): return 1", {"crashed", "passed"}),
    ("higher limits", "import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (999, 999))", {"failed"}),
    ("stopped", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    ("stopped group", "import os, signal\nos.fork()\nos.killpg(0, signal.SIGSTOP)", {"timeout"}),
    ("starts a program", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])", {"failed"}),
    ("exits with 0", "import os\nos._exit(0)", {"crashed"}),
    ("exits", "import sys\nsys.exit(0)", {"failed"}),
    ("NUL in the source", "x = '\0'", {"failed"}),
    ("lone surrogate", "x = '\ud800'", {"failed"}),
]  # fmt: skip


SLOW = ("endless loop in a test", "endless regular expression", "huge power", "recursion without limit", "stopped")


@pytest.mark.parametrize(
    ("program", "statuses"),
    [pytest.param(*row[1:], id=row[0], marks=[pytest.mark.slow] if row[0] in SLOW else []) for row in ATTACKS],
)
def test_attack(sandbox: LocalRunner, program: str, statuses: set[str]) -> None:
    outcome = run(sandbox, program, "assert f() == 1", limits=SHORT if "timeout" in statuses else LIMITS)
    assert outcome.status in statuses, outcome
    after = run(sandbox, "def f(): return 1", "assert f() == 1")
    assert after.status == "passed", "the next program is none the worse"


CHEATS = [
    ("equal to everything", "class E:\n    def __eq__(self, other): return True\ndef f(): return E()"),
    ("a number equal to everything", "class E(int):\n    def __eq__(self, other): return True\ndef f(): return E(5)"),
    ("no AssertionError", "import builtins\nbuiltins.AssertionError = None\ndef f(): return 2"),
    ("patched comparisons", "import operator\noperator.eq = lambda a, b: True\ndef f(): return 2"),
    ("patched harness", "import sys\nfor m in list(sys.modules.values()):\n    for n in ('encode', 'decode'):\n"
     "        if hasattr(m, n): setattr(m, n, lambda *a: 1)\ndef f(): return 2"),
    ("frames", "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_locals.clear()\n"
     "    frame = frame.f_back\ndef f(): return 2"),
    ("prints verdicts", "print('passed'); print('{\"result\": null}')\ndef f(): return 2"),
    ("writes to every file", "import os\nfor n in range(64):\n"
     "    try: os.write(n, b'{\"result\": null}\\n{\"done\": true}\\n')\n    except OSError: pass\ndef f(): return 2"),
    ("exits in the call", "import os\ndef f(): os._exit(0)"),
    ("exits at exit", "import atexit, os\natexit.register(os._exit, 0)\ndef f(): raise SystemExit(0)"),
    ("stops the iteration", "def f(): raise StopIteration(1)"),
    ("replaces f later", "def f(): return globals().get('x', 2)"),
]  # fmt: skip


@pytest.mark.parametrize("program", [row[1] for row in CHEATS], ids=[row[0] for row in CHEATS])
def test_success_cannot_be_faked(sandbox: LocalRunner, program: str) -> None:
    outcome = run(sandbox, program, "assert f() == 1", "assert f() == 1")
    assert outcome.status in ("failed", "crashed") and None not in outcome.tests, outcome


def test_equal_to_everything_does_fool_a_plain_interpreter() -> None:
    """The control: what one interpreter for both would say."""
    assert plainly(CHEATS[0][1] + "\nassert f() == 1\nprint('passed')") == "passed"
