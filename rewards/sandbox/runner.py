"""The one protocol through which model-written programs are run, and which implementation a process uses.

The default runs them on this machine (``rewards.sandbox.local``, whose docstring says what it protects from and what
not). A remote sandbox takes its place through the environment variable ``UNMASK_CODE_RUNNER=package.module:Class``; the
class is made without arguments, once per grading process, and needs ``run`` and ``close`` as in ``CodeRunner``. Actors
inherit the variable from the environment Ray was started in.
"""

import atexit
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

from rewards.errors import ConfigError

RUNNER_VARIABLE = "UNMASK_CODE_RUNNER"
DEFAULT_RUNNER = "rewards.sandbox.local:LocalRunner"
MAX_PROGRAM_CHARACTERS = 1 << 20

Status = Literal["passed", "failed", "timeout", "memory", "output", "crashed", "refused"]


@dataclass(frozen=True)
class Limits:
    """What one program may use. ``memory_mb`` bounds the address space of *each* of its processes and of its tests'
    own, so that ``memory_mb * (processes + 1)`` is the most they can hold (``most_memory_mb``)."""

    seconds: float = 15.0
    """Wall-clock time for everything, tests included."""
    cpu_seconds: int = 4
    """CPU time of the program with all processes that it forks: what decides on one that computes, so that a busy
    machine changes no verdict. A single process is ended at this time, the sum of several is looked at when the tests
    are over."""
    memory_mb: int = 512
    processes: int = 8
    """Processes and threads alive at once."""
    file_mb: int = 16
    """All files together, in memory."""
    open_files: int = 32
    output_bytes: int = 1 << 20
    """Standard output and standard error, each; a program that writes more is killed."""

    @property
    def most_memory_mb(self) -> int:
        """Of one program and its tests at once."""
        return self.memory_mb * (self.processes + 1)


@dataclass(frozen=True)
class Job:
    """A program and the tests that decide on it.

    ``program``, then ``setup`` run as a module of their own (``__name__`` is not ``__main__``). Each of ``tests`` is
    Python text that raises when the program is wrong; they share a namespace, in order, in which ``preamble`` (imports,
    helpers) ran before. They decide on the verdict, and are trusted with nothing else: what comes with a problem is run
    without privileges as well. ``names`` maps names in the tests to globals of the program.
    """

    program: str
    tests: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    setup: str = ""
    preamble: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    status: passed (the program ran and every test passed), failed (it raised, or a test did), timeout, memory (it ran
    out of it), output (it wrote too much), crashed (it ended before its tests did), refused (it was not run).
    tests: for each test in order None when it passed, else one sentence; not run counts as not passed.
    compiled: whether the program is Python. error: one sentence unless passed.
    exit_code, signal: of the program's process when it ended by itself. stdout, stderr: the first 16 KiB of each.
    """

    status: Status
    tests: tuple[str | None, ...] = ()
    compiled: bool = False
    error: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0


class CodeRunner(Protocol):
    """Runs untrusted programs. ``run`` returns within ``limits.seconds`` plus three seconds whatever the program does,
    keeps the verdict out of the program's reach, and leaves nothing of it behind. It raises only when it can't run
    anything at all, ConfigError with one sentence: a verdict is never made up."""

    def run(self, job: Job, limits: Limits) -> Outcome: ...

    def close(self) -> None: ...


def run_program(job: Job, limits: Limits) -> Outcome:
    """Runs a job on this process' runner. Raises ConfigError when there is no working one."""
    if len(job.program) > MAX_PROGRAM_CHARACTERS:
        return Outcome("refused", error=f"the program has more than {MAX_PROGRAM_CHARACTERS} characters")
    return _runner(os.environ.get(RUNNER_VARIABLE) or DEFAULT_RUNNER, os.getpid()).run(job, limits)


@cache
def _runner(path: str, pid: int) -> CodeRunner:
    """One runner per process and class; ``pid`` keeps a forked process from using its parent's."""
    module_name, _, class_name = path.partition(":")
    try:
        runner = getattr(importlib.import_module(module_name), class_name)()
    except ConfigError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(
            f"{RUNNER_VARIABLE}={path} can't be used ({type(error).__name__}: {error}); "
            "give package.module:Class, a class without arguments that has run and close"
        ) from error
    atexit.register(runner.close)
    return runner
