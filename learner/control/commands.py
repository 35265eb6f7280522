"""What people ask of a run while it runs (``services.store.actions``): stop, pause, resume, checkpoint, set_actors.

The run takes what it is asked within a second or two, does it where it can without changing what the run computes, and
only then confirms it. A stop is what the first SIGTERM is. A checkpoint and a pause come between two iterations. The
number of rollout actors changes while work goes on (``learner.supply.actor_count``). A pause ends with the run's
process: a run that is resumed runs, with as many actors as its settings say.
"""

import queue
import time
from collections import deque
from types import TracebackType
from typing import Protocol

from learner.reporting.reporter import Reporter
from learner.runs.directory import RunDirectory
from learner.runs.stopping import StopFlag, StopRequested
from learner.supply.actor_count import ActorCount
from rewards.errors import ConfigError
from rollout.places import Resize
from services.store.actions import COMMANDS, STOP, Action, Inbox

_CLOSE_S = 5.0
_REST_S = 0.2


class Pausable(Protocol):
    """What a pause needs of a run."""

    actors: ActorCount | None
    """None where no rollout actors belong to the run."""

    def checkpoint(self) -> None:
        """Save where the run stands."""

    def rest(self) -> bool:
        """Do what has to go on in a pause. True when no lease is under way any more."""


class Commands:
    """Takes the run's actions while entered; what is open when it is left is refused.

    Args:
        since: Unix time at which this process began with the run; what was asked for earlier is not for it.
    """

    def __init__(self, run_dir: RunDirectory, reporter: Reporter, stop: StopFlag, *, since: float) -> None:
        self._reporter, self._stop = reporter, stop
        self._taken: queue.SimpleQueue[Action] = queue.SimpleQueue()
        self._stops: list[Action] = []
        self._checkpoints: list[Action] = []
        self._pause: Action | None = None
        self._resume: Action | None = None
        self._paused = False
        self._resizes: deque[Action] = deque()
        self._resizing: tuple[Action, Resize] | None = None
        self._inbox = Inbox(run_dir.store_url, run_dir.id, since=since, on_action=self._take)

    def tick(self, actors: ActorCount | None) -> None:
        """Take what has come, and go on with changes of the number of actors; a run without any refuses those. For the
        thread that works with them."""
        self._sort_taken()
        if self._resizing is not None and self._resizing[1].over:
            self._end_resize(*self._resizing)
            self._resizing = None
        while self._resizes and self._resizing is None:
            self._begin_resize(self._resizes.popleft(), actors)

    def between_iterations(self, iteration: int, run: Pausable) -> None:
        """Save and pause as asked; comes back when the run may go on.

        Raises:
            StopRequested: the run was asked to stop.
        """
        while True:
            self.tick(run.actors)
            self._save(iteration, run)
            if self._resume is not None:
                self._paused = False
                self._reporter.store.status("running")
                self._done(self._resume, f"goes on with iteration {iteration + 1}")
                self._resume = None
            if self._stop.is_set():
                raise StopRequested
            if self._pause is None and not self._paused:
                return
            drained = run.rest()
            if self._pause is not None and drained:
                self._paused = True
                self._reporter.store.status("paused")
                self._done(self._pause, f"paused after iteration {iteration}")
                self._pause = None
            time.sleep(_REST_S)

    def stopped(self, text: str) -> None:
        """The run has come to its stop; ``text`` says where."""
        self._sort_taken()
        for action in self._stops:
            self._done(action, text)
        self._stops.clear()

    def __enter__(self) -> "Commands":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sort_taken()
        left = [*self._stops, *self._checkpoints, *self._resizes]
        left += [each for each in (self._pause, self._resume) if each is not None]
        left += [self._resizing[0]] if self._resizing is not None else []
        for action in left:
            self._refuse(action, "the run ended first" if error is None else f"the run ended first: {error}"[:500])
        self._inbox.close(_CLOSE_S)

    def _take(self, action: Action) -> None:
        """In the inbox's thread: a stop must be heard while the run waits, all else has time until the next tick."""
        self._taken.put(action)
        if action.action == STOP:
            self._stop.request(action.requested_by)

    def _sort_taken(self) -> None:
        while not self._taken.empty():
            self._sort(self._taken.get_nowait())

    def _sort(self, action: Action) -> None:
        match action.action:
            case "stop":
                self._stops.append(action)
            case "checkpoint":
                self._checkpoints.append(action)
            case "set_actors":
                self._resizes.append(action)
            case "pause" if self._paused or self._pause is not None:
                self._refuse(action, "the run is paused already" if self._paused else "a pause is on its way already")
            case "pause":
                self._pause = action
            case "resume" if self._pause is not None:
                self._refuse(self._pause, "called off before it began")
                self._pause = None
                self._done(action, "the pause that was on its way is called off")
            case "resume" if not self._paused:
                self._refuse(action, "the run is not paused")
            case "resume":
                self._resume = action
            case other:
                self._refuse(action, f"a run can't {other}; it can {', '.join(COMMANDS)}")

    def _save(self, iteration: int, run: Pausable) -> None:
        if self._checkpoints:
            run.checkpoint()
        for action in self._checkpoints:
            self._done(action, f"saved after iteration {iteration}")
        self._checkpoints.clear()

    def _begin_resize(self, action: Action, actors: ActorCount | None) -> None:
        if actors is None:
            self._refuse(action, "a fine-tuning run has no rollout actors")
            return
        try:
            self._resizing = action, actors.change(action.arguments.get("actors"))
        except ConfigError as error:
            self._refuse(action, str(error))
            return
        self.tick(actors)

    def _end_resize(self, action: Action, resize: Resize) -> None:
        if resize.error is not None:
            self._refuse(action, f"it stays at {resize.before}: {resize.error}")
        else:
            self._done(action, f"now {resize.size}, before {resize.before}")

    def _done(self, action: Action, text: str) -> None:
        self._settle(action, "done", text)

    def _refuse(self, action: Action, why: str) -> None:
        self._settle(action, "refused", why)

    def _settle(self, action: Action, status: str, text: str) -> None:
        self._inbox.settle(action.id, status, text)
        outcome = text if status == "done" else f"refused: {text}"
        told = f"{action.action}, asked for by {action.requested_by}: {outcome}"
        self._reporter.event("info", "command", told, action=action.id)  # a refusal says nothing of the run's health
