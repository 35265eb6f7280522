"""The head of every command: options are argparse's, a mistake is one sentence, an exit status means the same.

``python -m X`` ends with 0, with 2 for wrong settings or arguments, and with 1 when something else went wrong; then
``error: ...`` is on standard error. Where a status has another meaning too, the command's ``--help`` says so.
"""

import argparse
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import IO, NoReturn

from rewards.errors import ConfigError, UnmaskError


class Parser(argparse.ArgumentParser):
    """Wrong arguments raise ConfigError. Options are written out: one that is added later breaks no command line."""

    def __init__(self, prog: str, **how: object) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **how)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def reported(command: Callable[[], int]) -> int:
    """What the command returns; 2 for a ConfigError and 1 for another error of ours, printed on standard error."""
    try:
        return command()
    except UnmaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """When nobody reads any more what the block prints, it ends as SIGPIPE ends other programs: silently, with 141.

    Python ignores SIGPIPE and raises instead; letting the signal through would also end a run whose sockets break.
    """
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # here, and not while the interpreter ends, where nobody can catch it
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        raise SystemExit(128 + signal.SIGPIPE) from None


def _reader_is_gone() -> bool:
    """Of standard output; a pipe or socket that broke may have been another one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are always told
    return bool(poll.poll(0))


@contextlib.contextmanager
def results_alone() -> Iterator[IO[str]]:
    """Yields standard output, for the results of the block alone. Whatever else is written to it meanwhile, by a user's
    code or by a library to file descriptor 1, goes to standard error."""
    standard = sys.__stdout__
    if standard is None or sys.stdout is not standard:  # somebody has put another one there
        results = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            yield results
        return
    standard.flush()
    own = os.dup(standard.fileno())
    elsewhere = os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else os.dup(sys.stderr.fileno())
    os.dup2(elsewhere, standard.fileno())
    os.close(elsewhere)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            open(own, "w", encoding=standard.encoding, closefd=False) as alone,
        ):
            yield alone
    finally:
        standard.flush()
        os.dup2(own, standard.fileno())
        os.close(own)
