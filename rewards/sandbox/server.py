"""The sandbox's server: a fresh interpreter that shuts itself in once, then forks a pair of processes for each job.

Forking instead of starting an interpreter makes a job some milliseconds, not a tenth of a second. The processes, each
the parent of the next:

- *outer*: what ``LocalRunner`` started. Enters the namespaces, forks the server, waits.
- *server*: process 1 of a process namespace, in the jail. Reads the jobs' limits, and no byte of what a job says: later
  programs inherit its memory. A job's text and a verdict's words pass it by, in files of the owner's; what is written
  to the outputs it has the kernel move there (splice). Keeps the time and the output's size.
- *judge*: process 1 of the job's own process namespace, with a mount and IPC namespace of its own. Gives its privileges
  up, then reads the job and decides (``harness.Judge``): the tests and what they import are code of strangers, too. At
  the end it kills what is left of the program and counts its CPU time. When it ends, or is killed, the kernel kills
  everything in that namespace.
- *program*: without privileges, a user of its own. Runs the program (``harness.serve``).

Requests: a JSON object with the limits, and four file descriptors: to read the job from, for the judge to write what
it finds to, one JSON object a line, and for the beginnings of standard output and standard error. Replies, when the job
is over: length, then JSON.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

from rewards.parent import die_with_parent
from rewards.sandbox import isolation, system_calls
from rewards.sandbox.harness import Judge, serve
from rewards.sandbox.values import MAX_REPORT_BYTES, Channel, Closed

REQUEST_BYTES = 4096
_KEPT_OUTPUT_BYTES = 16 << 10
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
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores their end can't wait for children
    del sys.path[0]  # ours; programs import from the standard library alone
    sys.argv[:], sys.orig_argv[:], sys.executable = [""], [""], ""  # they tell where we are installed
    try:
        die_with_parent()
        isolation.be_the_first_to_go()
        if not system_calls.known_machine():
            raise OSError("the system call numbers of this machine are not known")
        new = isolation.NEWNS | isolation.NEWNET | isolation.NEWIPC | isolation.NEWUTS | isolation.NEWPID
        own_users = isolation.enter_user_namespace(new)
        isolation.hide_names()
        isolation.forgo_privileges()
        server = os.fork()
        if server == 0:
            die_with_parent()
            own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            for name in _PRELOADED:
                __import__(name)
            isolation.enter_jail()
            _serve_jobs(control, own_namespace, own_users)
            os._exit(0)
    except OSError as error:
        _reply(control, {"unavailable": error.strerror or str(error)})
        os._exit(1)
    control.close()
    os.waitpid(server, 0)
    os._exit(0)


def _serve_jobs(control: socket.socket, own_namespace: int, own_users: bool) -> None:
    system_calls.judges_filter(), system_calls.programs_filter()  # made once; jobs inherit them
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the pages that jobs share
    _reply(control, {"ready": True})
    while True:
        data, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 4)
        if not data:
            return
        reply = _one_job(json.loads(data), fds, control, own_namespace, own_users)
        if reply is None:
            return
        _reply(control, reply)


def _one_job(
    limits: dict[str, Any], fds: list[int], control: socket.socket, own_namespace: int, own_users: bool
) -> Reply | None:
    """None when the owner has gone."""
    begin = time.monotonic()
    pipes = [os.pipe() for _ in range(3)]  # the judge's life, standard output, standard error
    isolation.unshare(isolation.NEWPID)
    judge = os.fork()
    if judge == 0:
        try:
            control.detach()  # closed with all else that the judge isn't given
            _judge(limits, fds[:2], [write for _, write in pipes], own_users)
        finally:
            traceback.print_exc()
            os._exit(1)
    isolation.enter_pid_namespace(own_namespace)
    for fd in (*fds[:2], *(write for _, write in pipes)):
        os.close(fd)
    watch = _Watch([read for read, _ in pipes], fds[2:], limits["output_bytes"])
    stopped = watch.until(begin + limits["seconds"], control)
    os.kill(judge, signal.SIGKILL)
    os.waitpid(judge, 0)  # returns when the namespace is empty: nothing of the job runs any more
    watch.drain()
    return None if stopped == "gone" else {"stopped": stopped, "seconds": time.monotonic() - begin}


class _Watch:
    """Empties a job's pipes without reading them: the first bytes of each output go to its file, the rest nowhere, and
    all are counted. The first pipe has none, and closes with the judge, which alone holds its other end."""

    def __init__(self, fds: list[int], files: list[int], most: int) -> None:
        self._fds, self._most = fds, most
        self._counts = [0] * len(fds)
        self._nowhere = _null()
        self._files = [self._nowhere, *files]

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
                if not self._move(index):
                    if index == 0:
                        return None
                    poller.unregister(fd)
                if self._counts[index] > self._most:
                    return "output"

    def drain(self) -> None:
        """Empties what is left in the pipes, and closes all. Nobody writes any more."""
        for index in range(len(self._fds)):
            while self._counts[index] <= self._most and self._move(index):
                pass
        for fd in (*self._fds, *self._files):
            os.close(fd)

    def _move(self, index: int) -> bool:
        """False at the end."""
        kept = _KEPT_OUTPUT_BYTES - self._counts[index]
        target, most = (self._files[index], kept) if kept > 0 else (self._nowhere, 1 << 16)
        try:
            moved = os.splice(self._fds[index], target, most)
        except BlockingIOError:
            return False
        self._counts[index] += moved
        return moved > 0


def _judge(limits: dict[str, Any], fds: list[int], outputs: list[int], own_users: bool) -> None:
    """Body of the judge's process."""
    # Nothing of the host's is open in it, the owner's terminal and the socket to the owner among it.
    *_, job_fd, report, life, out = _keep_open(_null(), _null(), outputs[2], *fds, outputs[0], outputs[1])
    isolation.unshare(isolation.NEWNS | isolation.NEWIPC)
    isolation.mount_scratch(limits["file_mb"])
    judge_end, program_end = socket.socketpair()
    program = os.fork()
    if program == 0:
        try:
            _program(limits, program_end.detach(), out, own_users)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(out)
    program_end.close()
    isolation.drop_privileges(isolation.JUDGES_USER if own_users else None, system_calls.judges_filter())
    megabytes = limits["memory_mb"]
    isolation.set_limits(
        cpu_seconds=1 << 20, memory_mb=megabytes, processes=1, file_mb=MAX_REPORT_BYTES >> 20, open_files=16
    )
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

    judge = Judge(Channel(judge_end, look_after_children))
    end: dict[str, Any] = {}
    try:
        job = _read_job(job_fd)
        compiled, error = judge.run_program([job["program"], job["setup"]])
        tell(compiled=compiled, error=error)
        if error is None:
            judge.run_tests(job["tests"], job["names"], job["preamble"], lambda result: tell(result=result))
            end = {"done": True}
    except Closed:
        for _ in range(10):  # it is about to end, or closed its socket and lives on
            if ended:
                break
            time.sleep(0.005)
            try:
                look_after_children()
            except Closed:
                break
        end = {"ended": os.waitstatus_to_exitcode(ended[0]) if ended else None}
    except MemoryError:
        end = {"judge_error": "a value of the program's is too large for the memory limit"}
    tell(**end, cpu_seconds=_end_of_children())
    os._exit(0)


def _end_of_children() -> float:
    """Kills what is left of the program, and returns the CPU time of all its processes in seconds: of those that ended
    before too, as nobody's children can be but waited for, by whoever is left."""
    with contextlib.suppress(OSError):  # there may be none
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)  # the server kills this process when its time is over
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _program(limits: dict[str, Any], channel: int, out: int, own_users: bool) -> None:
    """Body of the program's process: nothing of ours open but the socket to the judge, nothing allowed but to
    compute."""
    os.setsid()
    _, _, _, channel = _keep_open(0, out, 2, channel)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False) for fd in (1, 2)
    )
    isolation.drop_privileges(
        isolation.PROGRAMS_USER if own_users else None,
        system_calls.programs_filter(),
        obeys=isolation.JUDGES_USER if own_users else None,
    )
    isolation.set_limits(
        cpu_seconds=limits["cpu_seconds"],
        memory_mb=limits["memory_mb"],
        # Without an id of its own the program is counted together with outer, server and judge.
        processes=limits["processes"] if own_users else limits["processes"] + 3,
        file_mb=limits["file_mb"],
        open_files=limits["open_files"],
    )
    serve(Channel(socket.socket(fileno=channel)))
    os._exit(0)


def _null() -> int:
    """The jail's own: what is open of it can't change the host's."""
    return os.open("/dev/null", os.O_RDWR)


def _keep_open(*fds: int) -> range:
    """Closes all descriptors but these, which become 0, 1 and so on."""
    above = max(fds) + 1 + len(fds)
    for index, fd in enumerate(fds):
        os.dup2(fd, above + index)
    for index in range(len(fds)):
        os.dup2(above + index, index)
    os.closerange(len(fds), 1 << 20)
    return range(len(fds))


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
