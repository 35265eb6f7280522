"""The sandbox's server: a fresh interpreter that shuts itself in once, then forks a pair of processes for each job.

Forking instead of starting an interpreter makes a job some milliseconds, not a tenth of a second. The processes, each
the parent of the next:

- *outer*: what ``LocalRunner`` started. Enters the namespaces, forks the server, waits.
- *server*: process 1 of a process namespace, in the jail. Reads the jobs' limits, never a job's text nor a verdict's
  words, so neither is in the memory that later programs inherit. Keeps the time and the output's size.
- *judge*: process 1 of the job's own process namespace, with a mount and IPC namespace of its own. Reads the job and
  decides (``harness.Judge``). When it ends, or is killed, the kernel kills everything in that namespace.
- *program*: without privileges. Runs the program (``harness.serve``).

Requests: a JSON object with the limits, and two file descriptors, to read the job from and for the judge to write what
it finds to, one JSON object a line. Replies, when the job is over: length, then JSON.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

from rewards.sandbox import isolation
from rewards.sandbox.harness import Judge, serve
from rewards.sandbox.values import Channel, Closed

REQUEST_BYTES = 4096
_KEPT_OUTPUT_BYTES = 16 << 10
_REPORT_MB = 4
# What programs import: sharing it saves each of them the time.
_PRELOADED = (
    *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"),
    *("itertools", "math", "operator", "random", "re", "statistics", "string", "typing"),
)

Reply = dict[str, Any]


def main(control_fd: int) -> None:
    """Body of the outer process; never returns."""
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the owner decides when we end
    del sys.path[0]  # ours; programs import from the standard library alone
    try:
        isolation.die_with_parent()
        isolation.be_the_first_to_go()
        if not isolation.known_machine():
            raise OSError("the system call numbers of this machine are not known")
        new = isolation.NEWNS | isolation.NEWNET | isolation.NEWIPC | isolation.NEWUTS | isolation.NEWPID
        has_user_1 = isolation.enter_user_namespace(new)
        server = os.fork()
        if server == 0:
            isolation.die_with_parent()
            own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            for name in _PRELOADED:
                __import__(name)
            isolation.enter_jail()
            _serve_jobs(control, own_namespace, has_user_1)
            os._exit(0)
    except OSError as error:
        _reply(control, {"unavailable": error.strerror or str(error)})
        os._exit(1)
    control.close()
    os.waitpid(server, 0)
    os._exit(0)


def _serve_jobs(control: socket.socket, own_namespace: int, has_user_1: bool) -> None:
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the pages that jobs share
    _reply(control, {"ready": True})
    while True:
        data, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 2)
        if not data:
            return
        reply = _one_job(json.loads(data), fds, control, own_namespace, has_user_1)
        if reply is None:
            return
        _reply(control, reply)


def _one_job(
    limits: dict[str, Any], fds: list[int], control: socket.socket, own_namespace: int, has_user_1: bool
) -> Reply | None:
    """None when the owner has gone."""
    begin = time.monotonic()
    pipes = [os.pipe() for _ in range(3)]  # the judge's life, standard output, standard error
    isolation.unshare(isolation.NEWPID)
    judge = os.fork()
    if judge == 0:
        try:
            _judge(limits, fds, [write for _, write in pipes], control, has_user_1)
        finally:
            traceback.print_exc()
            os._exit(1)
    isolation.enter_pid_namespace(own_namespace)
    for fd in (*fds, *(write for _, write in pipes)):
        os.close(fd)
    watch = _Watch([read for read, _ in pipes], limits["output_bytes"])
    stopped = watch.until(begin + limits["seconds"], control)
    os.kill(judge, signal.SIGKILL)
    os.waitpid(judge, 0)  # returns when the namespace is empty: nothing of the job runs any more
    watch.drain()
    if stopped == "gone":
        return None
    _, out, err = (piece[:_KEPT_OUTPUT_BYTES].decode(errors="replace") for piece in watch.kept)
    return {
        "stopped": stopped,
        "stdout": out,
        "stderr": err,
        "seconds": time.monotonic() - begin,
    }


class _Watch:
    """Reads a job's pipes: keeps the first bytes of each, counts the rest. The first has none, and closes with the
    judge, which alone holds its other end."""

    def __init__(self, fds: list[int], most: int) -> None:
        self._fds, self._most = fds, most
        self._counts = [0] * len(fds)
        self.kept = [bytearray() for _ in fds]

    def until(self, deadline: float, control: socket.socket) -> str | None:
        """Waits for the judge's end. Returns timeout, output or gone (the owner) where that came first, else None."""
        poller = select.poll()
        for fd in self._fds:
            os.set_blocking(fd, False)
            poller.register(fd, select.POLLIN)
        poller.register(control.fileno(), select.POLLIN)  # the owner sends nothing now: readable means closed
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            for fd, _ in poller.poll(1000 * left + 1):
                if fd == control.fileno():
                    return "gone"
                index = self._fds.index(fd)
                if not self._read(index):
                    if index == 0:
                        return None
                    poller.unregister(fd)
                if self._counts[index] > self._most:
                    return "output"

    def drain(self) -> None:
        """Reads what is left in the pipes, and closes them. Nobody writes any more."""
        for index, fd in enumerate(self._fds):
            while self._counts[index] <= self._most and self._read(index):
                pass
            os.close(fd)

    def _read(self, index: int) -> bool:
        """False at the end."""
        try:
            data = os.read(self._fds[index], 1 << 16)
        except BlockingIOError:
            return False
        self._counts[index] += len(data)
        if len(self.kept[index]) < _KEPT_OUTPUT_BYTES:
            self.kept[index] += data
        return bool(data)


def _judge(
    limits: dict[str, Any], fds: list[int], outputs: list[int], control: socket.socket, has_user_1: bool
) -> None:
    """Body of the judge's process."""
    isolation.unshare(isolation.NEWNS | isolation.NEWIPC)
    isolation.mount_scratch(limits["file_mb"])
    job_fd, report = fds
    _, out, err = outputs
    judge_end, program_end = socket.socketpair()
    program = os.fork()
    if program == 0:
        try:
            _program(limits, program_end.fileno(), out, err, has_user_1)
        finally:
            traceback.print_exc()
            os._exit(1)
    for fd in (out, err, program_end.detach(), control.detach()):
        os.close(fd)
    ended: list[int] = []

    def look_after_children() -> None:
        """Takes the ended ones away, and notes the program's end."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == program:
                ended.append(status)
                return  # what it still sent is read first
        if ended and not _readable(judge_end):
            raise Closed("the program has ended")

    def tell(**record: Any) -> None:
        os.write(report, json.dumps(record).encode() + b"\n")

    job = _read_job(job_fd)
    megabytes = limits["memory_mb"]
    isolation.set_limits(cpu_seconds=1 << 20, memory_mb=megabytes, processes=1 << 16, file_mb=_REPORT_MB, open_files=16)
    judge = Judge(Channel(judge_end, look_after_children))
    try:
        compiled, error = judge.run_program([job["program"], job["setup"]])
        tell(compiled=compiled, error=error)
        if error is None:
            judge.run_tests(job["tests"], job["names"], job["preamble"], lambda result: tell(result=result))
            tell(done=True)
    except Closed:
        for _ in range(10):  # it is about to end, or closed its socket and lives on
            if ended:
                break
            time.sleep(0.005)
            try:
                look_after_children()
            except Closed:
                break
        code = os.waitstatus_to_exitcode(ended[0]) if ended else None
        tell(ended=code)
    except MemoryError:
        tell(judge_error="a value of the program's is too large for the memory limit")
    os._exit(0)


def _program(limits: dict[str, Any], channel_fd: int, out: int, err: int, has_user_1: bool) -> None:
    """Body of the program's process: nothing of ours open but the socket to the judge, nothing allowed but to
    compute."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (err, 2), (channel_fd, 3)):
        os.dup2(source, target) if source != target else None
    os.closerange(4, 1 << 16)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False) for fd in (1, 2)
    )
    isolation.drop_privileges(has_user_1)
    isolation.set_limits(
        cpu_seconds=limits["cpu_seconds"],
        memory_mb=limits["memory_mb"],
        # Without an id of its own the program is counted together with outer, server and judge.
        processes=limits["processes"] if has_user_1 else limits["processes"] + 3,
        file_mb=limits["file_mb"],
        open_files=limits["open_files"],
    )
    serve(Channel(socket.socket(fileno=3)))
    os._exit(0)


def _read_job(fd: int) -> dict[str, Any]:
    with open(fd, "rb") as file:
        return json.load(file)


def _readable(end: socket.socket) -> bool:
    return bool(select.select([end], [], [], 0)[0])


def _reply(control: socket.socket, reply: Reply) -> None:
    data = json.dumps(reply).encode()
    try:
        control.sendall(len(data).to_bytes(4, "big") + data)
    except OSError:
        os._exit(0)  # the owner has gone
