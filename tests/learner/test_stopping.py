"""How commands end: by a signal, and when nobody reads their output any more."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.runs.stopping import (
    Interrupted,
    StopFlag,
    exit_status,
    interrupted,
    interrupting,
    not_for_children,
    uninterrupted,
)
from rewards.command import piped

REPOSITORY = Path(__file__).resolve().parents[2]
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    """What ends a command by a signal leaves all further ones ignored."""
    before = {signum: signal.getsignal(signum) for signum in ASKING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


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


WRITES = """
import sys
from learner.runs.stopping import lasting_output
errors = []
with {how}:
    for number in range(3):
        print("x" * 100, flush=True)
        print("y", file=sys.stderr, flush=True)
print(len(errors), file=open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("how, lasts", [("lasting_output(errors.append)", True), ("open(sys.argv[1], 'w')", False)])
def test_a_block_outlasts_the_reader_of_its_output(how: str, lasts: bool, tmp_path: Path) -> None:
    note = tmp_path / "note"
    ended, _ = unread("-c", WRITES.format(how=how), str(note))
    assert (ended == 0) == lasts
    assert note.read_text() == ("1\n" if lasts else ""), "told once"


def test_a_full_disk_under_the_output_is_outlasted_too(tmp_path: Path) -> None:
    program = WRITES.format(how="lasting_output(errors.append)")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "note")], cwd=REPOSITORY, stdout=full, timeout=60
        )
    assert (done.returncode, (tmp_path / "note").read_text()) == (0, "1\n")


def test_what_the_terminal_can_t_show_is_escaped() -> None:
    program = "from learner.runs.stopping import lasting_output\nwith lasting_output(print): print('\\u2212 1')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "\\u2212 1\n")


@pytest.mark.parametrize("signum", ASKING)
def test_a_first_signal_asks(signum: signal.Signals) -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signum)
        assert stop.is_set() and stop.name == signum.name and stop.exit_status == 128 + signum


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_what_is_sent_several_times_for_one_cause_only_asks(signum: signal.Signals) -> None:
    with StopFlag():
        for each in (signum, signum, signal.SIGTERM, signum):
            os.kill(os.getpid(), each)
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop, interrupting():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hangup_before_there_is_anything_to_save_ends_at_once() -> None:
    with pytest.raises(Interrupted, match="SIGHUP") as ended, interrupting():
        os.kill(os.getpid(), signal.SIGHUP)
    assert ended.value.exit_status == 129


def test_what_comes_after_the_signal_that_ended_a_command_disturbs_nothing() -> None:
    """Impatient people press Ctrl-C again while processes are being ended."""

    def command() -> int:
        with interrupting(), StopFlag():
            try:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
            finally:
                for signum in ASKING:
                    os.kill(os.getpid(), signum)
                ended.append("whole")
        return 0

    ended: list[str] = []
    assert exit_status(command) == 130 and ended == ["whole"]
    os.kill(os.getpid(), signal.SIGINT)  # while the interpreter ends


def test_the_end_of_a_block_that_was_not_interrupted_leaves_the_handlers_as_they_were() -> None:
    """The control of the test above."""
    with interrupting(), StopFlag():
        pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_wait_for_what_must_not_be_cut_short() -> None:
    done = []
    with pytest.raises(Interrupted, match="SIGTERM"), interrupting(), uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("all")
    assert done == ["all"]


def test_in_another_thread_nothing_waits() -> None:
    entered: list[bool] = []

    def enter() -> None:
        with uninterrupted():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10)
    assert entered


def test_a_bare_interrupt_is_known_by_the_signal_that_caused_it() -> None:
    with pytest.raises(Interrupted), interrupting():
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupted(KeyboardInterrupt()).exit_status == 143, "Ray's own, in place of ours"
    mine = Interrupted(signal.SIGHUP)
    assert interrupted(mine) is mine


def test_a_hangup_of_the_whole_group_spares_what_was_started_in_shelter() -> None:
    def child() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", "60"])

    with StopFlag() as stop:
        with not_for_children():
            spared = child()
            signal.pthread_kill(threading.get_ident(), signal.SIGHUP)  # another thread may take what the process gets
            assert not stop.is_set()
        assert stop.is_set(), "heard of after the block"
        others = child()
        for each in (spared, others):
            each.send_signal(signal.SIGHUP)
        assert others.wait(10) == -signal.SIGHUP
        assert spared.poll() is None
        spared.kill()
        spared.wait(10)
