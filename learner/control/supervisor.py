"""A run that is started again when its process dies: ``run.restarts``.

The process that was called only looks after another one, which does the work: it passes on the signals that ask for an
end, and starts the run again, from its newest checkpoint, when that process was killed or ended with an error. What
another start can't mend ends it: wrong settings, or somebody who asked for the end.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Literal

from learner.runs.directory import new_name
from learner.settings.saved import run_of, run_to_resume
from learner.settings.sections import RunPlace
from rewards.parent import die_with_parent

_PAUSE_S = 2.0
"""Before a restart; twice as long when the start before it ended soon, too."""
_LONGEST_PAUSE_S = 60.0
_SOON_S = 30.0
_LOOK_S = 60.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_NO_RESTART = (0, 2, *(128 + signum for signum in _PASSED_ON), 141)
"""Done; wrong settings; asked to stop; nobody reads any more."""


def supervise(place: RunPlace, kind: Literal["run", "sft"], label: str, arguments: Sequence[str]) -> int:
    """Run the command of this kind of run with these arguments, and again when it dies, ``place.restarts`` times at
    most. Returns the exit status of the last one, as a shell has it.

    Args:
        label: goes into the name of a run that is given none.
        arguments: of the command, without the program.
    """
    module = "learner.main" if kind == "run" else "learner.sft"
    first, again = _places(place, kind, label)
    ended_soon = 0
    with _Passing() as passing:
        for number in range(place.restarts + 1):
            given = [*arguments, "run.restarts=0", *(again if number else first)]
            began = time.monotonic()
            status = passing.run([sys.executable, "-m", module, *given])
            if status in _NO_RESTART or passing.asked or number == place.restarts:
                return status
            ended_soon = ended_soon + 1 if time.monotonic() - began < _SOON_S else 0
            pause_s = min(_PAUSE_S * 2**ended_soon, _LONGEST_PAUSE_S)
            how = signal.Signals(status - 128).name if status > 128 else f"exit status {status}"
            left = place.restarts - number
            print(f"the run ended with {how}: it is started again in {pause_s:g} s ({left} restarts left)", flush=True)
            if passing.pause(pause_s):
                return status
    raise AssertionError("the last start returns")


def _places(place: RunPlace, kind: Literal["run", "sft"], label: str) -> tuple[list[str], list[str]]:
    """What the first start is told of the run's place beside the user's arguments, and what the later ones are."""
    existing = run_to_resume(place, kind)
    if existing is None:
        name = place.name or new_name(label)
        return [f"run.name={name}"], [f"run.name={name}", "run.resume=auto"]
    again = [f"run.dir={existing.parent}", f"run.name={existing.name}", "run.resume=auto"]
    return ([], again) if run_of(place.resume) is not None else (again, again)


class _Passing:
    """While entered, signals that ask for an end go to the process that works.

    Attributes:
        asked: whether one came.
    """

    asked = False

    def __init__(self) -> None:
        self._working: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        """Its exit status, as a shell has it. It dies with this process, however that ends."""
        # A session of its own: what the terminal sends goes through us, once.
        self._working = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
        if self.asked:  # just before
            self._working.send_signal(signal.SIGTERM)
        status = None
        while status is None:  # as long as the run lasts; its own waits end
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._working.wait(timeout=_LOOK_S)
        self._working = None
        return 128 - status if status < 0 else status

    def pause(self, seconds: float) -> bool:
        """Whether somebody asked for the end meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.asked:
            time.sleep(0.1)
        return self.asked

    def __enter__(self) -> "_Passing":
        self._before = {
            signum: signal.signal(signum, self._pass_on)
            for signum in _PASSED_ON
            if signal.getsignal(signum) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._working is not None:
            with contextlib.suppress(ProcessLookupError):
                self._working.send_signal(signum)
