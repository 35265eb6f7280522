"""The sandbox on this machine: Linux namespaces, a jail, rlimits and a system call filter around every program.

What holds, as root in a container as much as for an ordinary user, where the kernel lets a process make a user
namespace (``LocalRunner`` says so in one sentence where it doesn't; there is no weaker mode that it falls back to):

- A program runs in an interpreter of its own (``rewards.sandbox.server``) with an empty environment, standard input
  from /dev/null, no open file but its outputs and the socket to its judge, no capability, and no way to get one.
- Only the system calls that the standard library needs for computing are allowed (``rewards.sandbox.system_calls``).
- It sees a read-only root with Python's library, the system's shared libraries and five devices; it can write to a
  /tmp in memory, of bounded size, that ends with it. No other file of the machine exists for it, nor /proc.
- No network: a network namespace without an interface, and every socket family but unix is refused. No file can be
  executed, though some of the host's programs are in sight: a new process is a fork of the program. Files can't be
  locked (sqlite3 works in memory) nor watched: those of the host are shared with it.
- Address space, processes and threads, CPU time, open files and output are bounded (``runner.Limits``), and everything
  together by wall-clock time, after which its process namespace is killed: nothing outlives a verdict, whatever it
  forked or detached. It can't see or signal a process outside.
- Its verdict is made by another process, the judge, which it can't reach (``rewards.sandbox.harness``).
- What comes with a problem, its tests, their imports and helpers, is code too and runs in the judge: in the same jail
  and limits, without capabilities, under the same filter, which lets it start neither processes nor threads. It says
  what the verdict is, and can do nothing else to the machine, to other programs or to the process that grades.
- Started by root, program and judge are two users without any rights, inside and outside. Another user has only one id
  to give, so both run under it: what then keeps them apart is the filter, and that the judge is process 1 of its
  namespace, which no signal from inside ends.
- When the process that uses the runner ends, SIGKILL included, the kernel kills the sandbox with all that runs in it.

What it does not protect from: faults of the kernel, which a program talks to directly (a virtual machine or gVisor
behind ``runner.CodeRunner`` does); side channels and measuring the machine's load; reading what lies in the folders
that it sees, the interpreter's own site-packages among them; slowing others down within its limits, which together are
``Limits.most_memory_mb`` of memory and ``seconds`` of all its processes on as many cores. It is not a defence of the
tests against a program that knows their answers: prompts of MBPP contain the tests.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from rewards.errors import ConfigError
from rewards.sandbox.runner import Job, Limits, Outcome, Status
from rewards.sandbox.values import MAX_REPORT_BYTES

START_LIMIT_S = 20.0
GRACE_S = 2.0
"""Seconds after the time limit for the server to kill and answer, on a busy machine; then it is killed itself."""

_ATTEMPTS = 2
# Our code by a descriptor: programs can read the names of its files, which shall not tell where it is installed.
_BOOT = (
    "import os, sys; root = int(sys.argv[1]); sys.path.insert(0, f'/proc/self/fd/{root}'); "
    "from rewards.sandbox.server import main; os.close(root); main(int(sys.argv[2]))"
)
_TEXT_CHARACTERS = 2000


class LocalRunner:
    """Starts the sandbox's server when there is a first program; one program at a time. ``close`` ends it."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket

    def run(self, job: Job, limits: Limits) -> Outcome:
        """Raises ConfigError when this machine can't isolate a program."""
        hangs = False
        for _ in range(_ATTEMPTS):
            if self._server is None or self._server.poll() is not None:
                self.close()
                self._start()
            try:
                return _outcome(self._ask(job, limits), len(job.tests), limits)
            except TimeoutError:  # it hangs, or the machine is too busy for it to count the seconds
                hangs = True
            except OSError:  # it was killed, which no program can do but by using the machine's memory up
                hangs = False
            self.close()  # and with it what ran
        if hangs:
            return _no_verdict("timeout", "the sandbox gave no verdict in time, twice", len(job.tests))
        killed = "the sandbox's server was killed over the program, twice"
        try:
            self._start()  # runs an empty one
        except ConfigError as error:
            raise ConfigError(f"{killed}, and over an empty one; is the machine out of memory? ({error})") from error
        return _no_verdict("memory", f"{killed}; an empty one passes", len(job.tests))

    def close(self) -> None:
        """Ends the server and all that runs in it."""
        if self._server is None:
            return
        self._server.kill()
        self._server.wait(timeout=START_LIMIT_S)
        self._control.close()
        self._server = None

    def _start(self) -> None:
        if sys.platform != "linux":
            raise ConfigError(f"the code sandbox needs Linux, not {sys.platform}; {_REMEDY}")
        self._control, theirs = socket.socketpair()
        root = os.open(Path(__file__).resolve().parents[2], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", "-c", _BOOT, str(root), str(theirs.fileno())],
                # Sets of strings must come in the same order every time, or verdicts would not repeat.
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[root, theirs.fileno()],
            )
        finally:
            os.close(root)
            theirs.close()
        try:
            reply = self._receive(time.monotonic() + START_LIMIT_S)
        except OSError as error:
            reply = {"unavailable": f"its server did not start ({error})"}
        if "unavailable" not in reply:
            reply |= self._tried()
        if "unavailable" in reply:
            self.close()
            raise ConfigError(f"this machine can't isolate programs ({reply['unavailable']}); {_REMEDY}")

    def _tried(self) -> dict[str, Any]:
        """Runs an empty program: what the kernel refuses to a job must not be told as the job's fault."""
        try:
            limits = Limits(seconds=START_LIMIT_S)
            outcome = _outcome(self._ask(Job(""), limits), 0, limits)
        except OSError as error:
            return {"unavailable": f"its server ended ({error})"}
        if outcome.status == "passed":
            return {}
        return {"unavailable": (outcome.stderr.strip() or outcome.error or outcome.status).splitlines()[-1]}

    def _ask(self, job: Job, limits: Limits) -> dict[str, Any]:
        deadline = time.monotonic() + limits.seconds + GRACE_S
        fields = {name: getattr(job, name) for name in ("program", "setup", "preamble")}
        # Files, not the socket: the server must not hold what they say.
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(_memory_file(name)) for name in ("job", "report", "stdout", "stderr")]
            files[0].write(json.dumps(fields | {"tests": list(job.tests), "names": dict(job.names)}).encode())
            files[0].seek(0)
            socket.send_fds(self._control, [json.dumps(asdict(limits)).encode()], [file.fileno() for file in files])
            reply = self._receive(deadline)
            report, out, err = (os.pread(file.fileno(), MAX_REPORT_BYTES, 0) for file in files[1:])
        return reply | {
            "report": _records(report),
            "stdout": out.decode(errors="replace"),
            "stderr": err.decode(errors="replace"),
        }

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Raises OSError (TimeoutError among them)."""
        size = int.from_bytes(self._read(4, deadline), "big")
        reply = json.loads(self._read(size, deadline))
        assert isinstance(reply, dict)
        return reply

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._control.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._control.recv(size - len(data))
            if not piece:
                raise ConnectionError("it ended")
            data += piece
        return bytes(data)


def _memory_file(name: str) -> BinaryIO:
    return open(os.memfd_create(name, os.MFD_CLOEXEC), "r+b", buffering=0)


_REMEDY = (
    "allow user namespaces (for Docker: --security-opt seccomp=unconfined or --cap-add SYS_ADMIN; on the host: "
    "user.max_user_namespaces above 0), or name a remote sandbox in UNMASK_CODE_RUNNER=package.module:Class"
)


def _records(report: bytes) -> list[dict[str, Any]]:
    """What the judge told, up to what is no record of it: tests are foreign code in its process, and the last line of
    one that was killed may be cut. Texts are short, and can be stored: no lone surrogates, no NUL."""
    records: list[dict[str, Any]] = []
    for line in report.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not all(_may_be(name, value) for name, value in record.items()):
            break
        records.append({name: _clean(value) if isinstance(value, str) else value for name, value in record.items()})
    return records


def _may_be(name: str, value: Any) -> bool:
    if name == "ended" and value is not None:
        return type(value) is int and -64 <= value <= 255  # a signal, an exit code
    return isinstance(value, _FIELDS.get(name, ()))


def _clean(text: str) -> str:
    return text[:_TEXT_CHARACTERS].encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


_FIELDS: dict[str, Any] = {
    "compiled": bool,
    "error": str | None,
    "result": str | None,
    "done": bool,
    "ended": int | None,
    "judge_error": str,
    "cpu_seconds": int | float,
}
"""What a record may hold."""


def _no_verdict(status: Status, error: str, test_count: int) -> Outcome:
    return Outcome(status, tests=(f"not run: {error}",) * test_count, error=error)


def _outcome(reply: dict[str, Any], test_count: int, limits: Limits) -> Outcome:
    records: list[dict[str, Any]] = reply["report"]
    first = next((record for record in records if "compiled" in record), {})
    results: list[str | None] = [record["result"] for record in records if "result" in record][:test_count]
    last = records[-1] if records else {}
    code = last.get("ended")
    if last.get("cpu_seconds", 0) > limits.cpu_seconds and code != -signal.SIGXCPU:
        # Of several processes. Which tests were answered in time is not known, and must not depend on the machine.
        return _no_verdict("timeout", "the program's processes together did not end in time", test_count)
    status, error = _verdict(reply["stopped"], first, last, results, code)
    missing = [f"not run: {error}"] * (test_count - len(results))
    return Outcome(
        status=status,
        tests=(*results, *missing),
        compiled=first.get("compiled") is True,
        error=error,
        exit_code=code if code is not None and code >= 0 else None,
        signal=-code if code is not None and code < 0 else None,
        stdout=reply["stdout"],
        stderr=reply["stderr"],
        seconds=reply["seconds"],
    )


def _verdict(
    stopped: str | None, first: dict[str, Any], last: dict[str, Any], results: list[str | None], code: int | None
) -> tuple[Status, str | None]:
    """Status and error of an outcome."""
    if stopped == "timeout" or code == -signal.SIGXCPU:
        return "timeout", "the program did not end in time"
    if stopped == "output":
        return "output", "the program wrote too much"
    if "ended" in last:
        how = f"ended with exit code {code}" if code is not None else "stopped answering"
        if code is not None and code < 0:
            how = f"was ended by signal {-code}"
        return "crashed", f"the program {how} before its tests were over"
    raised = first.get("error")
    if raised is not None:
        return ("memory" if raised.startswith("MemoryError") else "failed"), raised
    if "judge_error" in last:
        return "memory", last["judge_error"]
    failed = next((result for result in results if result is not None), None)
    if failed is not None:
        return ("memory" if failed.startswith("MemoryError") else "failed"), failed
    if "done" in last:
        return "passed", None
    return "crashed", "the sandbox lost the verdict"
