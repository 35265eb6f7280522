"""How a run begins: its folder and checkpoint are found, everything is checked, and only then is anything written."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from learner.reporting.dashboard import dashboard
from learner.reporting.reporter import Reporter
from learner.reporting.starts import note_start
from learner.reporting.trackers import build_trackers
from learner.runs import checkpoint as checkpoints
from learner.runs.aside import put_aside
from learner.runs.directory import RunDirectory
from learner.runs.start import changed_settings, open_run
from learner.runs.stopping import interrupted, lasting_output
from learner.settings.run import dump_config
from learner.settings.sections import RunPlace, StoreSection
from rewards.errors import StoreError
from rewards.section import Section
from services.store.files import is_damage
from services.store.retention import Retention
from services.store.schema import open_engine
from services.store.starts import BEGUN
from services.store.writer import StoreWriter


@dataclass(frozen=True)
class About:
    """What is recorded of a run, whatever it learns from."""

    config: Section
    run: RunPlace
    store: StoreSection
    trackers: tuple[Literal["tensorboard", "wandb"], ...]
    kind: Literal["run", "sft"]
    task: str
    objective: str
    iterations: int
    argv: Sequence[str]
    """The command's arguments."""
    default_recipe: str | None
    """The recipe where they name none."""


class FoundRun(NamedTuple):
    """A run's folder, locked, in which nothing is changed yet."""

    run_dir: RunDirectory
    resumed: checkpoints.Checkpoint | None
    """What the run goes on from; None for one that begins."""
    since: float
    """When it was found, Unix seconds: what people ask of it from then on is meant for it."""


class BegunRun(NamedTuple):
    """A run that may be trained."""

    run_dir: RunDirectory
    resumed: checkpoints.Checkpoint | None
    reporter: Reporter
    since: float
    take_hold: Callable[[], None]
    """To be called when the first iteration is done: what lies beyond the checkpoint is then set aside."""


@contextlib.contextmanager
def found_run(about: About) -> Iterator[FoundRun]:
    """The run's folder and checkpoint. A new run that ends in the block before it was begun leaves no folder.

    Raises:
        UnmaskError: see ``open_run``.
    """
    run_dir, resumed = open_run(about.run, kind=about.kind, label=about.task)
    with run_dir:
        if not run_dir.is_new and about.store.url is None and run_dir.store_path.exists():
            with _way_out_of_damage(others=False):
                open_engine(run_dir.store_url, create=False, read_only=True).dispose()
        try:
            yield FoundRun(run_dir, resumed, time.time())
        finally:
            if run_dir.is_new:
                run_dir.remove_unless_begun()


@contextlib.contextmanager
def begun_run(about: About, found: FoundRun) -> Iterator[BegunRun]:
    """The run's store, trackers, record of this start and, where ``run.dashboard`` says so, dashboard; all are closed
    at the end. Whatever ends the block early is told. Nobody has to read what the run prints: see ``lasting_output``.

    Raises:
        UnmaskError: when the store can't be entered, or the disk refuses.
    """
    run_dir, resumed, since = found
    reporter: Reporter | None = None

    def unread(error: OSError) -> None:
        if reporter is not None:
            text = f"what the run prints can't be written any more ({error.strerror}); the run goes on without it"
            reporter.store.event("warning", "terminal", text)

    with contextlib.ExitStack() as stack:
        stack.enter_context(lasting_output(unread))
        changes = [] if run_dir.is_new else changed_settings(run_dir, about.config)
        reporter = stack.enter_context(_reporting(about, found))
        stack.enter_context(told_failures(reporter))
        if run_dir.is_new:
            run_dir.write_config(dump_config(about.config))
        if resumed is not None and reporter.store.is_new:
            reporter.tell_store_again(-1)
            text = "the run store had nothing of this run: it is filled from metrics.jsonl, without trajectories"
            reporter.event("warning", "store", text)
        elif run_dir.undone is not None:
            reporter.tell_store_again(run_dir.undone)
        after = resumed.progress.iteration if resumed is not None else None
        start = note_start(
            run_dir, about.argv, kind=about.kind, default_recipe=about.default_recipe, after=after, changes=changes
        )
        reporter.store.event("info", BEGUN, str(start["command"]), start)

        def take_hold() -> None:
            beyond = -1 if after is None else after
            put_aside(run_dir, beyond)
            reporter.truncate_after(beyond)
            run_dir.write_config(dump_config(about.config))

        if reporter.store.cut_off:
            goes_on = "begins again" if after is None else f"goes on after iteration {after}"
            reporter.fault("controller", "died", f"the process before this one ended without a word; the run {goes_on}")
        if after is not None:
            reporter.event("info", "resume", f"run {run_dir.id} goes on after iteration {after}")
        elif run_dir.metrics_path.exists():  # it ended before its first checkpoint: nothing to keep until there is one
            take_hold()
        for change in changes:
            reporter.event("warning", "settings", f"resumed with another setting: {change}")
        if about.run.dashboard:
            stack.enter_context(dashboard(run_dir, reporter))
        yield BegunRun(run_dir, resumed, reporter, since, take_hold)


@contextlib.contextmanager
def told_failures(reporter: Reporter) -> Iterator[None]:
    """Whatever ends the block early is in the store, which knows the run as stopped or failed."""
    try:
        yield
    except KeyboardInterrupt as error:
        reporter.event(
            "warning", "stop", f"{interrupted(error)} ended the run at once; its checkpoints are what is left"
        )
        reporter.store.status("stopped")
        raise
    except BaseException as error:
        # Not printed: whoever called the command prints it.
        reporter.store.event("error", "failed", f"the run failed: {type(error).__name__}: {error}")
        reporter.store.status("failed")
        raise


@contextlib.contextmanager
def _way_out_of_damage(*, others: bool = True) -> Iterator[None]:
    """Says what to do about a damaged store. ``others``: a store that can't be opened for another reason is an error
    too."""
    try:
        yield
    except StoreError as error:
        if not is_damage(error):
            if others:
                raise
            return
        raise StoreError(
            f"{error}; move this file aside, and those beside it that end in -wal and -shm: the same command makes a "
            "new store, and a run that goes on fills it from its metrics.jsonl"
        ) from error


@contextlib.contextmanager
def _reporting(about: About, found: FoundRun) -> Iterator[Reporter]:
    run_dir, resumed, _ = found
    dumped: dict[str, Any] = about.config.model_dump(mode="json")
    run_dir.store_url = about.store.url or run_dir.store_url
    with _way_out_of_damage():
        store = StoreWriter(
            run_dir.store_url,
            run_dir.id,
            identity=run_dir.identity,
            task=about.task,
            objective=about.objective,
            total_iterations=about.iterations,
            config=dumped,
            retention=Retention(samples=about.store.keep_samples, metric_days=about.store.metric_days),
        )
    with contextlib.ExitStack() as failed:
        failed.callback(store.close, 0.0)
        iteration = resumed.progress.iteration if resumed is not None else None
        trackers = build_trackers(
            about.trackers, run_dir=run_dir.path, run_id=run_dir.id, config=dumped, resumed_at=iteration
        )
        reporter = Reporter(run_dir, store, trackers, total_iterations=about.iterations)
        failed.pop_all()
    try:
        yield reporter
    finally:
        reporter.close()
