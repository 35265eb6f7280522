"""A run that is started again when its process dies: ``run.restarts``.

The process that was called only looks after another one, which does the work: it passes on the signals that ask for an
end, and starts the run again, from its newest checkpoint, when that process was killed, ended with an error, or gives
no sign of life any more. What another start can't mend ends it: wrong settings, or somebody who asked for the end.
Settings that were good once are refused later because of what is around them, a cluster whose head is down for one:
that is waited for.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Literal

from learner.runs.directory import new_name
from learner.runs.life import LifeLine
from learner.settings.saved import run_of, run_to_resume
from learner.settings.sections import RunPlace
from rewards.parent import die_with_parent

_PAUSE_S = 2.0
"""Before a restart; twice as long when the start before it ended soon, too."""
_LONGEST_PAUSE_S = 60.0
_SOON_S = 30.0
_LOOK_S = 1.0
_KILLED_S = 60.0
_REFUSED = 2
_REFUSED_S = 1800.0
"""For so long a start that goes on with a run may be refused: a cluster's head is back by then, or needs somebody."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_NO_RESTART = (0, *(128 + signum for signum in _PASSED_ON), 141)
"""Done; asked to stop; nobody reads any more."""


def supervise(
    place: RunPlace, kind: Literal["run", "sft"], label: str, arguments: Sequence[str], *, silent_s: float
) -> int:
    """Run the command of this kind of run with these arguments, and again when it dies, ``place.restarts`` times at
    most; starts that are refused don't count. Returns the exit status of the last one, as a shell has it.

    Args:
        label: goes into the name of a run that is given none.
        arguments: of the command, without the program.
        silent_s: seconds that the process may stay without a sign of life; then it is killed.
    """
    module = "learner.main" if kind == "run" else "learner.sft"
    first, again = _places(place, kind, label)
    ended_soon, worked = 0, 0
    worked_until = time.monotonic()
    with _Passing() as passing:
        while True:
            given = [*arguments, "run.restarts=0", *(again if worked else first)]
            began = time.monotonic()
            status = passing.run([sys.executable, "-m", module, *given], silent_s)
            ended = time.monotonic()
            if status in _NO_RESTART or passing.asked:
                return status
            if status == _REFUSED:
                if not worked or ended - worked_until > _REFUSED_S:
                    return status
                left = f"for {_REFUSED_S - (ended - worked_until):.0f} s at most"
            else:
                worked, worked_until = worked + 1, ended
                if worked > place.restarts:
                    return status
                left = f"{place.restarts - worked + 1} restarts left"
            ended_soon = ended_soon + 1 if ended - began < _SOON_S else 0
            pause_s = min(_PAUSE_S * 2**ended_soon, _LONGEST_PAUSE_S)
            how = signal.Signals(status - 128).name if status > 128 else f"exit status {status}"
            print(f"the run ended with {how}: it is started again in {pause_s:g} s ({left})", flush=True)
            if passing.pause(pause_s):
                return status


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

    def run(self, command: Sequence[str], silent_s: float) -> int:
        """Its exit status, as a shell has it. It dies with this process, however that ends, and when it is silent for
        longer than ``silent_s``."""
        with LifeLine() as line:
            # A session of its own: what the terminal sends goes through us, once.
            self._working = subprocess.Popen(
                command,
                start_new_session=True,
                preexec_fn=die_with_parent,
                pass_fds=(line.theirs,),
                env=os.environ | line.environment,
            )
            line.let_go()
            if self.asked:  # just before
                self._working.send_signal(signal.SIGTERM)
            while (status := self._working.poll()) is None:  # as long as the run lasts; its own waits end
                if line.silent_s(_LOOK_S) > silent_s:
                    print(
                        f"the run gave no sign of life for {silent_s:g} s (timeouts.heartbeat; ten minutes more for "
                        "the first): it is killed",
                        flush=True,
                    )
                    self._working.kill()
                    try:
                        status = self._working.wait(timeout=_KILLED_S)
                    except subprocess.TimeoutExpired:
                        print(f"error: process {self._working.pid} doesn't end, although it was killed", flush=True)
                        return 1
                    break
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
