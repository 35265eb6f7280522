"""How commands end when nobody reads their output any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.runs.stopping import piped

REPOSITORY = Path(__file__).resolve().parents[2]


def unread(*command: str, unbuffered: str = "") -> tuple[int, str]:
    """Exit status and standard error of a Python whose standard output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        answer = subprocess.run(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    return answer.returncode, answer.stderr


@pytest.mark.parametrize(
    "command, unbuffered",
    [
        ("learner.main --help", ""),
        ("learner.sft --help", "1"),
        ("learner.main recipe=smoke --print-config", ""),
        ("learner.plan --help", ""),
    ],
)
def test_a_reader_that_goes_ends_a_command_silently(command: str, unbuffered: str) -> None:
    assert unread("-m", *command.split(), unbuffered=unbuffered) == (141, "")


def test_a_plain_print_ends_with_a_complaint() -> None:
    """The control of the tests above."""
    status, complaint = unread("-c", "print('x')")
    assert status == 120 and "BrokenPipeError" in complaint


def test_another_pipe_that_breaks_is_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError), piped():
        os.write(write, b"x")
    os.close(write)
