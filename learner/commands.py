"""What people ask of a run while it runs (``services.store.actions``): stop, pause, resume, checkpoint, set_actors.

The run takes what it is asked within a second or two, does it where it can without changing what the run computes, and
only then confirms it. A stop is what the first SIGTERM is. A checkpoint and a pause come between two iterations. The
number of rollout actors changes while work goes on: a lease is computed and delivered whole whoever computes it, so a
synchronous run has the same bits whatever their number. A pause ends with the run's process: a run that is resumed
runs, with as many actors as its settings say.
"""

import queue
from collections import deque
from types import TracebackType
from typing import Protocol

import ray

from learner.config import RunConfig, check_resources, required_resources
from learner.planning.check import check_memory
from learner.planning.hardware import this_machine
from learner.reporting import Reporter
from learner.rundir import RunDirectory
from learner.session import joins
from learner.stopping import StopFlag
from rewards.errors import ConfigError
from rollout.pool import Resize, RolloutPool
from services.store.actions import COMMANDS, STOP, Action, Inbox

_CLOSE_S = 5.0


class Pausable(Protocol):
    """What a pause needs of a run."""

    def checkpoint(self) -> None:
        """Save where the run stands."""

    def rest(self) -> bool:
        """Spend a moment of a pause. True when no lease is under way any more. Raises StopRequested."""


class Commands:
    """Takes the run's actions while entered; what is open when it is left is refused.

    Args:
        since: Unix time at which this process began with the run; what was asked for earlier is not for it.
    """

    def __init__(
        self, config: RunConfig, run_dir: RunDirectory, reporter: Reporter, stop: StopFlag, *, since: float
    ) -> None:
        self._config, self._reporter, self._stop = config, reporter, stop
        self._taken: queue.SimpleQueue[Action] = queue.SimpleQueue()
        self._stops: list[Action] = []
        self._checkpoints: list[Action] = []
        self._pause: Action | None = None
        self._resume: Action | None = None
        self._paused = False
        self._resizes: deque[Action] = deque()
        self._resizing: tuple[Action, Resize] | None = None
        self._inbox = Inbox(run_dir.store_url, run_dir.id, since=since, on_action=self._take)

    def tick(self, pool: RolloutPool) -> None:
        """Take what has come, and go on with changes of the pool's size. For the thread that works with the pool."""
        while not self._taken.empty():
            self._sort(self._taken.get_nowait())
        if self._resizing is not None and self._resizing[1].over:
            self._end_resize(*self._resizing)
            self._resizing = None
        while self._resizes and self._resizing is None:
            self._begin_resize(self._resizes.popleft(), pool)

    def between_iterations(self, iteration: int, run: Pausable, pool: RolloutPool) -> None:
        """Save and pause as asked; comes back when the run may go on. Raises StopRequested from a pause."""
        self.tick(pool)
        self._save(iteration, run)
        while self._pause is not None or self._paused:
            drained = run.rest()
            self.tick(pool)
            self._save(iteration, run)
            if self._pause is not None and drained:
                self._paused = True
                self._reporter.store.status("paused")
                self._done(self._pause, f"paused after iteration {iteration}")
                self._pause = None
            if self._resume is not None:
                self._paused = False
                self._reporter.store.status("running")
                self._done(self._resume, f"goes on with iteration {iteration + 1}")
                self._resume = None

    def stopped(self, text: str) -> None:
        """The run has come to its stop; ``text`` says where."""
        while not self._taken.empty():
            self._sort(self._taken.get_nowait())
        for action in self._stops:
            self._done(action, text)
        self._stops.clear()

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        while not self._taken.empty():
            self._sort(self._taken.get_nowait())
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

    def _begin_resize(self, action: Action, pool: RolloutPool) -> None:
        wanted = action.arguments.get("actors")
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            self._refuse(action, f"actors={wanted!r} is no number of actors; give one of at least 1")
            return
        try:
            if wanted > pool.size:
                self._check_room(wanted)
        except ConfigError as error:
            self._refuse(action, f"no room for {wanted} actors, it stays at {pool.size}: {error}")
            return
        self._resizing = action, pool.resize(wanted, timeout_s=self._config.timeouts.resize)
        self.tick(pool)

    def _check_room(self, actors: int) -> None:
        """Raises ConfigError where it is known beforehand; on a cluster, which may grow, the pool tries."""
        if joins(self._config.resources.ray_address):
            return
        rollout = self._config.rollout.model_copy(update={"actors": actors})
        config = self._config.model_copy(update={"rollout": rollout})
        have = ray.cluster_resources()
        if required_resources(config)[0] > have.get("CPU", 0.0):
            raise ConfigError(
                f"the run's local Ray was started with room for {self._config.rollout.most_actors}; "
                f"start it with rollout.max_actors={actors}"
            )
        check_resources(config, have.get("CPU", 0.0), have.get("GPU", 0.0))
        check_memory(config, this_machine(config))

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
        level = "info" if status == "done" else "warning"
        outcome = text if status == "done" else f"refused: {text}"
        told = f"{action.action}, asked for by {action.requested_by}: {outcome}"
        self._reporter.event(level, "command", told, action=action.id)
