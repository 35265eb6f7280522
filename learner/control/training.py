"""What reinforcement learning and fine-tuning do alike: iterations, what is due between them, checkpoints, results.

After each iteration the controller holds all that the ranks need to go on from there (``GroupState``). Ranks that are
lost are replaced by new ones that begin with it, and what was under way is done again, with the same result. So a
checkpoint needs no rank: it writes what the controller holds, also when the ranks, or Ray itself, are gone.
"""

import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import ray

from learner.control.commands import Commands
from learner.control.opening import BegunRun
from learner.ranks.group import GroupState, LearnerGroup, RanksLost
from learner.ranks.optim import learning_rate
from learner.ranks.rank import GroupConfig, PublishedAdapter, UpdateReport
from learner.reporting.plots import plot_run
from learner.reporting.workers import Workers
from learner.runs import checkpoint as checkpoints
from learner.runs.aside import discard
from learner.runs.atomic import atomic_dir
from learner.runs.stopping import StopFlag
from learner.settings.sections import CheckpointSection
from learner.supply.actor_count import ActorCount
from rewards.errors import TrainingDiverged, UnmaskError, WorkerLost, first_line
from rollout.adapters import AdapterState, write_peft_folder
from rollout.trajectory import TrajectoryGroup
from services.store.faults import Cause

MAX_LOSSES = 3
"""Times in a row that ranks are replaced without an iteration in between."""


class TrainingConfig(GroupConfig, Protocol):
    """What is read of a run's settings, whatever the run learns from."""

    @property
    def checkpoint(self) -> CheckpointSection: ...


class Training(ABC):
    """One run; ``learner.control.lifecycle`` calls its phases in turn. A subclass starts ``learner`` by
    ``_start_ranks``, tells ``workers`` of it, and then calls ``_take_state``.

    Args:
        iterations: of the whole run.
        evaluate_every: iterations between two evaluations; 0: only at the end.
    """

    learner: LearnerGroup
    state: GroupState
    """What the ranks held when the newest iteration ended; see ``_stands_at``."""
    actors: ActorCount | None = None

    def __init__(
        self,
        config: TrainingConfig,
        begun: BegunRun,
        stop: StopFlag,
        commands: Commands,
        *,
        identity: dict[str, Any],
        iterations: int,
        evaluate_every: int,
    ) -> None:
        self.config, self.run_dir, self.reporter = config, begun.run_dir, begun.reporter
        self._stop, self._commands = stop, commands
        self._iterations, self._evaluate_every = iterations, evaluate_every
        self.workers = Workers(begun.reporter.store)
        if begun.resumed is not None:
            self.progress = self._goes_on_from(begun.resumed.progress, identity)
            self.saved: checkpoints.Progress | None = self.progress
            """Where the newest checkpoint stands; None before the first."""
            self._take_hold: Callable[[], None] | None = begun.take_hold
        else:
            layout = checkpoints.layout_of(config.learner)
            self.progress, self.saved = checkpoints.Progress.before_the_first(layout, identity), None
            self._take_hold = None
        self._resumed = self.saved
        self._stands_at = self.progress
        """The progress that ``state`` belongs to."""
        self._losses = 0
        self.finishing = False
        """All is learned, or the run was stopped and has saved: what is left is to leave results."""
        self._standing = threading.Lock()
        """For ``progress``, ``state`` and what is saved, which belong together."""

    def _goes_on_from(self, progress: checkpoints.Progress, identity: dict[str, Any]) -> checkpoints.Progress:
        """Evaluations that can't be compared with those to come are forgotten."""
        before, now = progress.identity.get("evaluated"), identity.get("evaluated")
        if before not in (None, now) and progress.evaluations:
            text = (
                "held-out problems, or how they are decoded or judged, are not those before: the base is evaluated anew"
            )
            self.reporter.event("warning", "evaluation", text)
            progress = dataclasses.replace(progress, evaluations={}, best={})
        return dataclasses.replace(progress, identity=identity)

    @property
    def is_as_resumed(self) -> bool:
        """Whether nothing has been done since the checkpoint that the run went on from."""
        return self.progress == self._resumed

    @property
    def adapter(self) -> PublishedAdapter:
        """What the newest iteration left."""
        return self.state.adapter

    def train(self) -> None:
        """Measure what the run starts from, once per run, then all remaining iterations.

        Raises:
            StopRequested: the run is asked to stop.
            WorkerLost: its ranks are lost time and again.
        """
        while True:
            try:
                self._evaluate_base()
                self._evaluate_and_save()  # a run that was stopped in an evaluation makes up for it
                if self.progress.iteration >= self._iterations:
                    return
                self._commands.between_iterations(self.progress.iteration, self)
                self._iterate(self.progress.iteration)
            except RanksLost as error:
                self._replace_ranks(error)

    def checkpoint(self) -> None:
        """Save where the run stands, if it has moved since the last time; without ranks, where it stood last. Raises
        RanksLost."""
        if self._stands_at.iteration < self.progress.iteration and not self.learner.closed:
            state = self.learner.commit()
            with self._standing:
                self.state, self._stands_at = state, self.progress
        self.save()

    def ray_lost(self, why: str, cause: Cause, silent_s: float) -> None:
        """In another thread: Ray is gone, and may end this process with it. What the controller holds is written."""
        self.reporter.fault("ray", cause, why, silent_s=silent_s)
        if not self.finishing:
            self.save_at_the_end()
        if not self.finishing:  # by now
            self.reporter.store.status("failed")
        self.reporter.flush()

    def save_at_the_end(self) -> str | None:
        """Whatever ended the run: what was learned so far is kept, if it can be; if not, why, which is told too."""
        try:
            self.save()
        except (OSError, UnmaskError, ray.exceptions.RayError) as error:
            text = f"where the run stood when it ended could not be saved: {first_line(error)}"
            self.reporter.event("warning", "checkpoint", text)
            return text
        return None

    def save(self) -> None:
        """Write what the controller holds, if that has changed since the last time. In any thread; needs no rank."""
        with self._standing:
            self._save()

    def _save(self) -> None:
        standing = self.progress if self.progress.iteration == self._stands_at.iteration else self._stands_at
        if standing == self.saved:
            return
        self.reporter.flush()
        progress = dataclasses.replace(standing, adapter_digest=self.adapter.digest)
        saved = checkpoints.Checkpoint(
            progress, self.adapter.state, self.adapter.peft_config, self.state.shards, self.state.phase, self._buffer()
        )
        path = checkpoints.save(self.run_dir.checkpoints_dir, saved)
        discard(self.run_dir)
        keep, best = self.config.checkpoint.keep, progress.best.get("iteration")
        gone = checkpoints.prune(self.run_dir.checkpoints_dir, keep=keep, best_iteration=best)
        self.saved = standing
        store = self.reporter.store
        store.checkpoint(progress.iteration, str(path), {"adapter_digest": self.adapter.digest})
        store.checkpoints_gone(gone)
        text = f"checkpoint after iteration {progress.iteration}"
        if gone:
            text += f"; deleted, for checkpoint.keep={keep}: {', '.join(map(str, gone))}"
        store.event("info", "checkpoint", text, {"iteration": progress.iteration, "deleted": gone})

    def rest(self) -> bool:
        """Do what has to go on in a pause. True when no lease is under way any more."""
        self.workers.tell_if_due(self.progress.policy_version)
        return True

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Leave the results behind; returns the summary."""

    @abstractmethod
    def _start_ranks(self, state: GroupState | None) -> LearnerGroup:
        """Ranks that go on from there, or begin with what the run starts from."""

    @abstractmethod
    def _evaluate_base(self) -> None:
        """Measure what the run starts from, unless that was done."""

    @abstractmethod
    def _iterate(self, iteration: int) -> None:
        """Learn and report; ``iteration`` counts from 0. Until ``_advance``, all of it may be done again."""

    @abstractmethod
    def _evaluate_trained(self, iteration: int) -> None:
        """Measure the weights after so many iterations."""

    def _evaluated(
        self,
        name: str,
        iteration: int,
        figures: Mapping[str, float],
        *,
        metrics: Mapping[str, float],
        best: Mapping[str, float] | None,
    ) -> None:
        """Note and tell what an evaluation found. ``metrics``: to be reported; ``best``: what makes it the best so far
        and its value; None when it isn't."""
        progress = dataclasses.replace(
            self.progress, evaluations={**self.progress.evaluations, name: figures}, evaluated_at=iteration
        )
        if best is not None:
            progress = dataclasses.replace(progress, best={"iteration": iteration, **best})
        self.progress = progress
        self.reporter.evaluation(iteration, metrics)
        if best is not None and iteration:
            measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in best.items())
            text = f"the best evaluation so far: {measured} after iteration {iteration}"
            self.reporter.store.event("info", "best", text, progress.best)

    def tell_last_faults(self) -> None:  # noqa: B027 - fine-tuning has no actors
        """Those that nobody was told of yet, because the run ends by them."""

    def _ledger(self) -> dict[str, Any]:
        """The ledger's state, of a run that has one."""
        return {}

    def _buffer(self) -> Sequence[TrajectoryGroup]:
        """The groups that a method which learns in phases learns from."""
        return ()

    def _take_state(self) -> None:
        """Of ranks that have just started. Raises WeightMismatch when they don't hold the checkpoint's adapter."""
        self.state = self.learner.commit()
        if self.saved is not None:
            checkpoints.require_adapter(self.saved, self.adapter.digest)
        else:
            self.progress = self._stands_at = dataclasses.replace(self.progress, ledger=self._ledger())
        self.workers.tell(self.progress.policy_version)

    def _replace_ranks(self, error: RanksLost) -> None:
        """Start new ranks where the lost ones stood after the newest iteration that ``state`` is of.

        Raises:
            WorkerLost: too many times in a row.
        """
        began, back = time.monotonic(), self.progress.iteration - self._stands_at.iteration
        while True:
            self.learner.close()
            self._losses += 1
            # What took too long will hardly be quicker the next time.
            if self._losses > (1 if error.cause == "late" else MAX_LOSSES):
                self.reporter.fault("rank", error.cause, f"{error}; the run ends", silent_s=error.silent_s)
                raise WorkerLost(f"ranks were lost {self._losses} times in a row; last: {error}") from error
            self.reporter.event("warning", "rank", f"{error}; the ranks are started again")
            try:
                self.learner = self._start_ranks(self.state)
                break
            except RanksLost as again:
                text = f"{error}; those that were started in their place were lost too"
                self.reporter.fault("rank", error.cause, text, silent_s=error.silent_s)
                error = again
        self.workers.learner = self.learner
        if back:
            self.reporter.truncate_after(self._stands_at.iteration)
            self.progress = self._stands_at
        seconds = time.monotonic() - began
        self.reporter.fault(
            "rank",
            error.cause,
            f"new ranks go on after iteration {self._stands_at.iteration}; {seconds:.1f} s for their start",
            silent_s=error.silent_s,
            seconds=seconds,
            iterations=back + 1,
        )

    def _enforce_stop(self) -> None:
        """Once a second of every wait, in any thread. Raises StopRequested: at once where there are no ranks, whose
        iteration could be waited for."""
        ranks = getattr(self, "learner", None)
        self._stop.enforce(0.0 if ranks is None or ranks.closed else self.config.timeouts.stop)

    def _tick(self) -> None:
        """Once a second of a wait in the thread that works with the actors. Raises StopRequested."""
        self._enforce_stop()
        self._attend()

    def _watch(self) -> None:
        """The same where the number of actors must stay as it is."""
        self._enforce_stop()
        self.workers.tell_if_due(self.progress.policy_version)

    def _attend(self) -> None:
        """Once a second of all work, in the thread that works with the actors."""
        self._commands.tick(self.actors)
        self.workers.tell_if_due(self.progress.policy_version)

    def _evaluate_and_save(self) -> None:
        """What is due between two iterations."""
        done, every = self.progress.iteration, self._evaluate_every
        last = done == self._iterations
        if done > self.progress.evaluated_at and (last or (every and done % every == 0)):
            self._evaluate_trained(done)
        best = self.progress.best.get("iteration") == done
        if done and (last or best or done % self.config.checkpoint.every == 0):
            self.checkpoint()

    def _learning_rate(self, update: int, updates: int) -> float:
        learner = self.config.learner
        return learning_rate(
            update, updates, peak=learner.lr, schedule=learner.lr_schedule, warmup_fraction=learner.warmup_fraction
        )

    def _advance(self, reports: Sequence[UpdateReport], seconds: float, state: GroupState | None) -> None:
        """The iteration of these updates has ended.

        Args:
            seconds: that it took.
            state: what the ranks hold now; None to go back further when they are lost.
        """
        in_a_row = self.progress.nonfinite_in_a_row
        for report in reports:
            in_a_row = 0 if report.applied else in_a_row + 1
        done = self.progress.iteration + 1
        progress = dataclasses.replace(
            self.progress,
            iteration=done,
            policy_version=done,
            updates=self.progress.updates + sum(report.applied for report in reports),
            nonfinite_in_a_row=in_a_row,
            train_seconds=self.progress.train_seconds + seconds,
            ledger=self._ledger(),
        )
        with self._standing:
            self.progress = progress
            if state is not None:
                self.state, self._stands_at = state, progress
        self._losses = 0
        if self._take_hold is not None:
            self._take_hold()
            self._take_hold = None

    def _check_finite(self, reports: Sequence[UpdateReport]) -> None:
        """Tell updates that were skipped. Raises TrainingDiverged after too many in a row."""
        iteration = self.progress.iteration
        skipped = [report.grad_norm for report in reports if not report.applied]
        if skipped:
            text = f"iteration {iteration}: {len(skipped)} updates skipped, gradient norm {skipped[-1]}"
            self.reporter.event("warning", "nonfinite", text)
        if self.progress.nonfinite_in_a_row >= self.config.learner.max_nonfinite:
            raise TrainingDiverged(
                f"{self.progress.nonfinite_in_a_row} updates in a row had a gradient that isn't finite "
                f"(iteration {iteration}); lower learner.lr, or go on from an earlier checkpoint "
                f"in {self.run_dir.checkpoints_dir}"
            )

    def _leave(self, adapter: AdapterState, peft_config: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        """Write adapter, summary and plots; returns the summary. A plot that fails is told, and fails nothing."""
        with atomic_dir(self.run_dir.adapter_dir) as folder:
            write_peft_folder(folder, adapter, peft_config)
        summary = {
            **figures,
            "best": self.progress.best,
            "checkpoints": self._checkpoints_left(),
            "iterations": self.progress.iteration,
            "train_seconds": self.progress.train_seconds,
            "seed": self.config.run.seed,
        }
        self.run_dir.write_summary(summary)
        self.reporter.flush()
        self.reporter.attempt("plots", plot_run, self.run_dir.path)
        return summary

    def _checkpoints_left(self) -> dict[str, str]:
        """The last checkpoint and the best, as paths inside the run's folder, as far as they are there."""
        at = {
            "last": self.saved.iteration if self.saved is not None else None,
            "best": self.progress.best.get("iteration"),
        }
        folder = self.run_dir.checkpoints_dir
        paths = {name: checkpoints.place(folder, iteration) for name, iteration in at.items() if iteration}
        return {name: str(path.relative_to(self.run_dir.path)) for name, path in paths.items() if path.is_dir()}
