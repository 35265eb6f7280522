"""Commands in processes of their own, forked from one that has imported what they import: the five seconds of CPU that
``python -m learner.main`` needs before it does anything are spent once for all runs of a test process."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollout.process import prepare_process

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["learner.control.launch", "learner.finetuning.run"])


class Forked:
    """A command under way, which leads a session; to its caller what ``subprocess.Popen`` is.

    Args:
        module: ``main`` of it is the command.
        environment: the whole of the command's environment.
        output: gets standard output and standard error.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str], output: Path
    ) -> None:
        self._process = _CONTEXT.Process(target=_run, args=(module, [*arguments], str(cwd), {**environment}, output))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        deadline = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):  # it is over already
            while self.poll() is None and os.getsid(self.pid) != self.pid:
                assert time.monotonic() < deadline, f"{module} did not begin within 60 s"
                time.sleep(0.005)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return status

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _run(module: str, arguments: list[str], cwd: str, environment: dict[str, str], output: Path) -> None:
    """What ``python -m MODULE ARGUMENTS`` does in a shell in that folder."""
    with output.open("ab") as file, open(os.devnull, "rb") as nothing:
        for ours, theirs in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(ours.fileno(), theirs)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    prepare_process()
    command = importlib.import_module(module)
    sys.argv, sys.path[0] = [str(command.__file__), *arguments], cwd
    os.setsid()
    sys.exit(command.main(arguments))
