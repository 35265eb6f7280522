"""Ray's own processes, without which a run can't go on: the control service (GCS) of the cluster, and this node's
raylet.

Ray doesn't tell a driver that one of them has died. A driver whose raylet is dead is ended by Ray at its next call; one
whose GCS is dead, after a minute, in the middle of anything; one whose raylet hangs, never. So a thread looks for
itself, and whoever asked is told at once, in that thread: this is the time to save what must not be lost. From then on
no wait of ours (``rollout.waits``) asks Ray any more.
"""

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import grpc
import ray

from learner.runs.local_ray import core_processes, token_header
from learner.runs.session import answer, host_port
from rollout.given_up import give_ray_up, ray_given_up
from services.store.faults import Cause

_LOOK_S = 1.0
_AWAY_S = 15.0
"""For so long either may give no answer: a GCS elsewhere may start again. After a minute Ray ends its drivers."""
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_LEAVE_S = 15.0
_TELL_S = 120.0
"""For what is saved: the disk may not answer either."""
_FINISH_S = 300.0
"""For a run that is over to leave its results."""


class RayWatch:
    """Watches while entered.

    Attributes:
        on_lost: called once, in another thread, with a sentence that says what has gone, whether it died or hangs, and
            for how many seconds it has been silent.
        finishing: whether the run needs Ray no more and leaves its results: then the process may go on with that, and
            how it ends is its own.
    """

    on_lost: Callable[[str, Cause, float], None] | None = None

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ray watch", daemon=True)
        self._ends = select.poll()
        self._names: dict[int, str] = {}
        self.finishing: Callable[[], bool] = lambda: False

    def __enter__(self) -> "RayWatch":
        processes = core_processes()
        for name, pid in processes.items():
            end = os.pidfd_open(pid)
            self._ends.register(end, select.POLLIN)
            self._names[end] = f"Ray's {name} (process {pid})"
        self._asked = {"GCS": ray.get_runtime_context().gcs_address, "raylet": _raylet_address()}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if ray_given_up():
            return  # the thread sees to it that the process ends
        self._thread.join(timeout=_LEAVE_S)
        for end in self._names:
            os.close(end)

    def _look(self) -> None:
        while not self._over.is_set():
            try:
                self._look_on()
                return
            except Exception as error:  # whatever it is, somebody must go on looking
                print(f"warning: the watch of Ray's processes failed, and begins again: {error!r}", file=sys.stderr)
                self._over.wait(_AWAY_S)

    def _look_on(self) -> None:
        answered = dict.fromkeys(self._asked, time.monotonic())
        while not self._over.is_set():
            if ended := self._ends.poll(_LOOK_S * 1000):
                self._lost(f"{self._names[ended[0][0]]} has died, and nothing works without it")
                return
            for name, address in self._asked.items():
                if answer(address, token_header()) not in _NO_ANSWER:  # "no such question" is one too
                    answered[name] = time.monotonic()
                elif time.monotonic() - answered[name] > _AWAY_S:
                    why = f"Ray's {name} at {address} doesn't answer any more, and nothing works without it"
                    self._lost(why, "hung", time.monotonic() - answered[name])
                    return

    def _lost(self, why: str, cause: Cause = "died", silent_s: float = 0.0) -> None:
        """Ends the process, whatever else fails."""
        try:
            give_ray_up(why)
            if self.on_lost is not None:
                lost = (why, cause, silent_s)
                telling = threading.Thread(target=self.on_lost, args=lost, name="ray is lost", daemon=True)
                telling.start()
                telling.join(_TELL_S)
                if telling.is_alive():
                    text = f"warning: what the run holds wasn't saved within {_TELL_S:g} s"
                    print(text, file=sys.stderr, flush=True)
            # The main thread may be inside Ray, and never come back.
            begin = time.monotonic()
            while time.monotonic() - begin < (_FINISH_S if self.finishing() else _LEAVE_S):
                time.sleep(_LOOK_S)
            print(f"error: {why}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)


def _raylet_address() -> str:
    """Where the raylet of this node listens for others."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    return host_port(node["NodeManagerAddress"], node["NodeManagerPort"])
