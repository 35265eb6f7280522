"""Grading beside the engine: co-processes of ``rewards.grade`` behind a queue, with a time limit per completion.

A grader is a process of its own because a verdict can hang or take the process down, and neither may hurt the actor. It
speaks JSON lines on its pipes. One thread drives each process; the engine only puts completions into the queue. What a
grader that hangs or dies was asked, a new one is asked once more: the process may be at fault, and not the completion.
"""

import contextlib
import json
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewards.errors import ConfigError, WaitTimeout
from rewards.judge.judged import load_task
from rewards.judge.reply import JudgeFailed
from rewards.judge.settings import UNJUDGED, JudgeSettings
from rewards.task import grade_timeout_problem
from rollout.messages import GradingFault

START_LIMIT_S = 60.0
"""Seconds that a new grader process may take for its imports; a verdict's own time limit starts after them."""

_ATTEMPTS = 2
_MOST = 3.4e38  # rewards are float32
_KILL_LIMIT_S = 10.0
_LINE = re.compile(r"line \d+: ")
_RAISED = re.compile(r"task raised \w+")
_JUDGE_RAISED = f"task raised {JudgeFailed.__name__}"
_REFUSED = 2  # exit status of a grader that can't grade this task here
_TICK_S = 0.5


@dataclass(frozen=True)
class GradeResult:
    """A verdict, or why there is none.

    components has a value for each of the task's components, in its order: 0 when the graders hung or died, NaN where
    one gave no number. invalid then says what kind of failure that is; such a reward must not be trained on. error is
    the reason in full. fault is the last that there was, also where another grader gave the verdict in the end.
    """

    correct: bool
    components: Mapping[str, float]
    error: str | None = None
    invalid: str | None = None
    fault: GradingFault | None = None

    @property
    def reward(self) -> float:
        return sum(self.components.values())

    @property
    def timed_out(self) -> bool:
        return self.missing and self.fault is not None and self.fault.cause == "hung"

    @property
    def crashed(self) -> bool:
        return self.missing and self.fault is not None and self.fault.cause == "died"

    @property
    def failed(self) -> bool:
        """Whether no grader gave a verdict."""
        return self.timed_out or self.crashed

    @property
    def missing(self) -> bool:
        """Whether there is no verdict, whoever is to blame: the graders, or the task that they ran."""
        return self.fault is not None and not self.fault.graded


class GraderPool:
    """Graders of one task.

    Args:
        task_name: as ``rewards.task.get_task`` knows it.
        workers: number of processes.
        timeout_s: seconds for one verdict; a slower grader is killed, and another is asked. When that is as slow, the
            completion has no reward.
        judge: whose score is a part of the reward, where it names one.

    Raises:
        ConfigError: unknown task, a setting out of range, or a time limit below the task's own.
    """

    def __init__(self, task_name: str, *, workers: int, timeout_s: float, judge: JudgeSettings = UNJUDGED) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ConfigError(
                f"graders need at least 1 worker and a time limit above 0, not {workers} and {timeout_s} s"
            )
        task = load_task(task_name, judge)
        if problem := grade_timeout_problem(task, timeout_s):
            raise ConfigError(problem)
        self.components = task.components
        self._task_name = task_name
        self._options = ["--task", task_name]
        if judge.model is not None:
            self._options += ["--judge", judge.model_dump_json()]
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._drive, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fields: Mapping[str, Any], completion: str) -> Future[GradeResult]:
        """Queue a completion of the problem with these fields, and return at once.

        A grader's timeout or crash gives a result with that flag, not an error.
        """
        assert not self._closing.is_set(), "the grader pool is closed"
        job = _Job(dict(fields) | {"completion": completion}, Future())
        self._jobs.put(job)
        return job.result

    def collect(self, futures: Sequence[Future[GradeResult]]) -> list[GradeResult]:
        """The results in the order of the futures.

        Raises:
            ConfigError: the graders can't grade this task on this machine.
            WaitTimeout: after the time in which all of them must have been decided, restarts included.
        """
        limit_s = len(futures) * _ATTEMPTS * (START_LIMIT_S + self._timeout_s)
        deadline = time.monotonic() + limit_s
        try:
            return [future.result(timeout=max(0.0, deadline - time.monotonic())) for future in futures]
        except FutureTimeout:
            who = f"graders of {self._task_name} ({len(futures)} completions)"
            raise WaitTimeout(f"{who} did not finish within {limit_s:g} s") from None

    def close(self, timeout_s: float = 2 * _KILL_LIMIT_S) -> None:
        """Kill the graders and end the threads; completions without a verdict are cancelled.

        Raises:
            WaitTimeout: a thread did not end within ``timeout_s`` seconds.
        """
        self._closing.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise WaitTimeout(f"a grader of {self._task_name} did not end within {timeout_s:g} s")

    def _drive(self) -> None:
        """Body of a worker thread: one process, one completion at a time."""
        grader = _Grader(self._task_name, self._options, self._closing)
        while not self._closing.is_set():
            try:
                job = self._jobs.get(timeout=_TICK_S)
            except queue.Empty:
                continue
            try:
                job.result.set_result(self._decide(grader, job))
            except _Closing:
                job.result.cancel()
            except Exception as error:  # whoever waits for the verdict gets it
                job.result.set_exception(error)
        grader.kill()
        self._cancel_waiting()

    def _decide(self, grader: "_Grader", job: "_Job") -> GradeResult:
        fault: GradingFault | None = None
        for _ in range(_ATTEMPTS):
            try:
                result = self._result(grader.ask(job.request, self._timeout_s))
            except TimeoutError:
                fault = GradingFault("grader", "hung", f"no verdict within {self._timeout_s:g} s")
            except _Crash as error:
                fault = GradingFault("grader", "died", str(error))
            else:
                if fault is None or result.fault is not None:
                    return result
                return replace(result, fault=replace(fault, graded=True))
            grader.kill()
        assert fault is not None, "each try returns or has one"
        return GradeResult(False, dict.fromkeys(self.components, 0.0), fault.error, fault=fault)

    def _result(self, reply: dict[str, Any]) -> GradeResult:
        given = reply.get("components")
        given = given if isinstance(given, dict) else {}
        components = {name: _number(given.get(name)) for name in self.components}
        error = None if reply.get("error") is None else _LINE.sub("", str(reply["error"]), count=1)
        invalid, fault = None, None
        if not given:
            raised = _RAISED.match(error or "")
            invalid = raised[0] if raised else "the task gave no reward"
        elif missing := [name for name in self.components if name not in given]:
            invalid = error = f"reward component {missing[0]} is missing"
        elif bad := [name for name, value in components.items() if not abs(value) <= _MOST]:
            invalid = error = f"reward component {bad[0]} is not a finite number"
        if invalid is not None:
            cause: Literal["failed", "invalid"] = "failed" if _RAISED.match(invalid) else "invalid"
            fault = GradingFault("judge" if invalid == _JUDGE_RAISED else "grader", cause, error or invalid)
        return GradeResult(reply.get("correct") is True, components, error, invalid=invalid, fault=fault)

    def _cancel_waiting(self) -> None:
        while True:
            try:
                self._jobs.get_nowait().result.cancel()
            except queue.Empty:
                return


@dataclass(frozen=True)
class _Job:
    request: dict[str, Any]
    result: "Future[GradeResult]"


class _Crash(Exception):
    """The grader process ended or broke the protocol."""


class _Closing(Exception):
    """The pool is being closed."""


# The grader must not outlive us: it ends at the end of its input, and when it is busy the kernel kills it. Done inside
# the child, as code between fork and exec is not safe in a process with threads.
_CHILD = """
import runpy
from rewards.parent import die_with_parent
die_with_parent()
runpy.run_module("rewards.grade", run_name="__main__", alter_sys=True)
"""


class _Grader:
    """A ``rewards.grade`` process, started when it is asked something and there is none.

    It has a session of its own, so that it can be killed with all that it started.
    """

    def __init__(self, task_name: str, options: Sequence[str], closing: threading.Event) -> None:
        self._task_name, self._options = task_name, options
        self._closing = closing
        self._popen: subprocess.Popen[bytes] | None = None
        self._questions = 0

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply to one request.

        Raises:
            TimeoutError: none within ``timeout_s`` seconds.
            _Crash: the process ended, or answered something else.
            _Closing: the pool was closed meanwhile.
        """
        if self._popen is None:
            self._start()
        return self._exchange(request, timeout_s)

    def kill(self) -> None:
        """End the process, if there is one, and everything it started."""
        if self._popen is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(timeout=_KILL_LIMIT_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            pipe.close()
        self._popen = None

    def _start(self) -> None:
        # Ray puts the job's folder on the path of its workers; a user's task may live there.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *self._options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
            bufsize=0,
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._stdin = self._popen.stdin.fileno()
        self._stdout = self._popen.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._received = bytearray()
        try:
            self._exchange({"completion": ""}, START_LIMIT_S)
        except TimeoutError:
            raise _Crash(f"the grader did not start within {START_LIMIT_S:g} s") from None
        except _Crash:
            if self._popen.poll() != _REFUSED:
                raise
            self.kill()
            raise ConfigError(
                f"the graders of {self._task_name} can't start on this machine; their reason is on its standard error"
            ) from None

    def _exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self._questions += 1
        request_id = str(self._questions)
        line = self._swap((json.dumps(request | {"id": request_id}) + "\n").encode(), timeout_s)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or str(reply.get("id")) != request_id:
            raise _Crash(f"the grader answered {line[:80]!r} instead of a verdict")
        return reply

    def _swap(self, outgoing: bytes, timeout_s: float) -> bytes:
        """Send a line and read one, both at the same time: pipes are small, and either side may fill one up."""
        deadline = time.monotonic() + timeout_s
        to_send = memoryview(outgoing)
        poller = select.poll()
        poller.register(self._stdout, select.POLLIN)
        poller.register(self._stdin, select.POLLOUT)
        while b"\n" not in self._received:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            if self._closing.is_set():
                raise _Closing
            for fd, _ in poller.poll(1000 * min(left_s, _TICK_S)):
                if fd == self._stdin:
                    to_send = to_send[self._write(to_send) :]
                    if not to_send:
                        poller.unregister(self._stdin)
                else:
                    self._read()
        line, _, self._received = self._received.partition(b"\n")
        return bytes(line)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._stdin, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise _Crash(self._ending()) from None

    def _read(self) -> None:
        try:
            data = os.read(self._stdout, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise _Crash(self._ending())
        self._received += data

    def _ending(self) -> str:
        try:
            assert self._popen is not None
            code = self._popen.wait(timeout=_TICK_S)
        except subprocess.TimeoutExpired:
            return "the grader closed its pipes"
        return f"the grader ended with code {code}"


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)
