"""From its start to its exit status: what every kind of run does alike."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from learner.control.commands import Commands
from learner.control.training import Training
from learner.reporting.dashboard import dashboard
from learner.reporting.reporter import Reporter
from learner.reporting.trackers import build_trackers
from learner.runs import checkpoint as checkpoints
from learner.runs.directory import RunDirectory
from learner.runs.start import changed_settings, open_run
from learner.runs.stopping import Interrupted, StopFlag, StopRequested, lasting_output
from learner.settings.run import dump_config
from learner.settings.sections import RunPlace, Section, StoreSection
from services.store.retention import Retention
from services.store.writer import StoreWriter


class OpenedRun(NamedTuple):
    """A run that may begin."""

    run_dir: RunDirectory
    """Locked."""
    resumed: checkpoints.Checkpoint | None
    """What it goes on from; None for a new run."""
    reporter: Reporter
    since: float
    """When it was opened, Unix seconds: what people ask of it from then on is meant for it."""


@contextlib.contextmanager
def opened_run(
    config: Section,
    run: RunPlace,
    *,
    kind: Literal["run", "sft"],
    task: str,
    objective: str,
    iterations: int,
    trackers: tuple[str, ...],
    place: StoreSection,
    check: Callable[[RunDirectory, checkpoints.Checkpoint | None], None] | None = None,
) -> Iterator[OpenedRun]:
    """The run's directory, store, trackers and, where ``run.dashboard`` says so, dashboard; all are closed at the end.
    Nobody has to read what the run prints: see ``lasting_output``.

    ``check`` may refuse to go on with the run before anything of it is changed.

    Raises:
        UnmaskError: see ``open_run`` and ``check``.
    """
    reporter: Reporter | None = None

    def unread(error: OSError) -> None:
        if reporter is not None:
            text = f"what the run prints can't be written any more ({error.strerror}); the run goes on without it"
            reporter.store.event("warning", "terminal", text)

    with contextlib.ExitStack() as stack:
        stack.enter_context(lasting_output(unread))
        run_dir, resumed = open_run(run, kind=kind, label=task)
        stack.enter_context(run_dir)
        since = time.time()
        if check is not None:
            check(run_dir, resumed)
        told = reporting(
            config,
            run_dir,
            resumed,
            task=task,
            objective=objective,
            iterations=iterations,
            trackers=trackers,
            place=place,
        )
        reporter = stack.enter_context(told)
        if run.dashboard:
            stack.enter_context(dashboard(run_dir, reporter))
        yield OpenedRun(run_dir, resumed, reporter, since)


def see_through(
    start: Callable[[], Training], reporter: Reporter, stop: StopFlag, commands: Commands
) -> dict[str, Any] | None:
    """Train to the end and return the summary; None when the run was asked to stop, and has saved where it stands."""
    try:
        training = start()
    except StopRequested:
        reporter.event("info", "stop", f"asked to stop by {stop.name} while the run's processes were starting")
        reporter.store.status("stopped")
        commands.stopped("stopped while the run's processes were starting")
        return None
    try:
        training.evaluate_base()
        training.train()
    except StopRequested:
        at = training.progress.iteration + 1
        reporter.event("info", "stop", f"asked to stop by {stop.name} in iteration {at}")
        training.checkpoint()
        saved = training.saved
        at_saved = f"after iteration {saved.iteration}" if saved is not None else "from the start"
        reporter.event("info", "stop", f"resume=auto will go on {at_saved}")
        training.finish()
        reporter.store.status("stopped")
        commands.stopped(_where(training))
        return None
    summary = training.finish()
    reporter.store.status("finished", summary)
    return summary


def _where(training: Training) -> str:
    at, saved = training.progress.iteration, training.saved
    if saved is None:
        return f"stopped after iteration {at}, nothing is saved; resume=auto begins again"
    goes_on = "there" if saved.iteration == at else f"after iteration {saved.iteration}, the last one saved"
    return f"stopped after iteration {at}; resume=auto goes on {goes_on}"


@contextlib.contextmanager
def told_failures(reporter: Reporter) -> Iterator[None]:
    """Whatever ends the block early is in the store, which knows the run as stopped or failed."""
    try:
        yield
    except Interrupted as error:
        reporter.event("warning", "stop", f"{error} ended the run at once; its checkpoints are what is left")
        reporter.store.status("stopped")
        raise
    except BaseException as error:
        # Not printed: whoever called the command prints it.
        reporter.store.event("error", "failed", f"the run failed: {type(error).__name__}: {error}")
        reporter.store.status("failed")
        raise


@contextlib.contextmanager
def reporting(
    config: Section,
    run_dir: RunDirectory,
    resumed: checkpoints.Checkpoint | None,
    *,
    task: str,
    objective: str,
    iterations: int,
    trackers: tuple[str, ...],
    place: StoreSection,
) -> Iterator[Reporter]:
    """The run's reporter, which has forgotten what lies beyond the checkpoint that the run goes on from."""
    changes = changed_settings(run_dir, config) if resumed is not None else []
    run_dir.write_config(dump_config(config))
    dumped = config.model_dump(mode="json")
    run_dir.store_url = place.url or run_dir.store_url
    store = StoreWriter(
        run_dir.store_url,
        run_dir.id,
        identity=run_dir.identity,
        task=task,
        objective=objective,
        total_iterations=iterations,
        config=dumped,
        retention=Retention(samples=place.keep_samples, metric_days=place.metric_days),
    )
    iteration = resumed.progress.iteration if resumed is not None else None
    tracking = build_trackers(trackers, run_dir=run_dir.path, run_id=run_dir.id, config=dumped, resumed_at=iteration)
    reporter = Reporter(run_dir, store, tracking, total_iterations=iterations)
    try:
        if iteration is None and run_dir.metrics_path.exists():  # it ended before its first checkpoint
            reporter.truncate_after(-1)
        elif iteration is not None:
            reporter.truncate_after(iteration)
            checkpoints.drop_after(run_dir.checkpoints_dir, iteration)
            reporter.event("info", "resume", f"run {run_dir.id} goes on after iteration {iteration}")
        for change in changes:
            reporter.event("warning", "settings", f"resumed with another setting: {change}")
        yield reporter
    finally:
        reporter.close()
