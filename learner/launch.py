"""Start a run and see it to its end: directory, store, Ray, base model, controller, exit status."""

import contextlib
import tempfile
from collections.abc import Iterator

from learner import checkpoint as checkpoints
from learner.config import RunConfig, bias_warnings, check_paths, dump_config, in_ray_job
from learner.controller import Controller
from learner.reporting import Reporter
from learner.rundir import RunDirectory
from learner.runs import changed_settings, open_run
from learner.session import ray_session
from learner.sft import ensure_base, print_progress
from learner.stopping import Interrupted, StopFlag, StopRequested
from learner.trackers import build_trackers
from rollout.actor import code_identity
from services.store.writer import StoreWriter


def run(config: RunConfig, *, dry_run: bool = False) -> int:
    """Train as the settings say and return the process's exit status: 0, or 128 + signal when asked to stop.

    With ``dry_run``, draw and grade the first iteration, print two rollouts and the batch's statistics, and end without
    a trace.

    Raises:
        UnmaskError: whatever ends the run; the run directory then says ``failed``.
    """
    check_paths(config, in_ray_job())
    code_identity()
    with contextlib.ExitStack() as stack:
        if dry_run:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="unmask-dry-run-"))
            changes = {"dir": place, "name": "dry-run", "resume": "never"}
            config = config.model_copy(update={"run": config.run.model_copy(update=changes)})
        run_dir, resumed = open_run(config)
        stack.enter_context(run_dir)
        reporter = stack.enter_context(_reporter(config, run_dir, resumed))
        return _train(config, run_dir, reporter, resumed, dry_run)


def _train(
    config: RunConfig, run_dir: RunDirectory, reporter: Reporter, resumed: checkpoints.Checkpoint | None, dry_run: bool
) -> int:
    try:
        model_path = config.model.path or str(ensure_base(config, config.model.cache_path, on_progress=print_progress))
        with ray_session(config) as told, StopFlag() as stop, contextlib.ExitStack() as closing:
            reporter.event("info", "start", f"run {run_dir.id}: {told}; base model {model_path}")
            for warning in bias_warnings(config):
                reporter.event("warning", "biased", warning)
            controller = Controller(config, run_dir, reporter, model_path, resumed, stop, closing)
            try:
                if dry_run:
                    controller.dry_run()
                    return 0
                controller.evaluate_base()
                controller.train()
            except StopRequested:
                if dry_run:
                    return stop.exit_status
                reporter.event(
                    "info", "stop", f"asked to stop by {stop.name} in iteration {controller.progress.iteration + 1}"
                )
                controller.checkpoint()
                at = (
                    f"after iteration {controller.saved.iteration}"
                    if controller.saved is not None
                    else "from the start"
                )
                reporter.event("info", "stop", f"resume=auto will go on {at}")
                controller.finish()
                reporter.store.status("stopped")
                return stop.exit_status
            summary = controller.finish()
            reporter.store.status("finished", summary)
            reporter.closing_table(summary, steps=config.rollout.sampler.steps)
            return 0
    except Interrupted as error:
        reporter.event("warning", "stop", f"{error} ended the run at once; its checkpoints are what is left")
        reporter.store.status("stopped")
        raise
    except BaseException as error:
        reporter.event("error", "failed", f"the run failed: {type(error).__name__}: {error}")
        reporter.store.status("failed")
        raise


@contextlib.contextmanager
def _reporter(config: RunConfig, run_dir: RunDirectory, resumed: checkpoints.Checkpoint | None) -> Iterator[Reporter]:
    changes = changed_settings(run_dir, config) if resumed is not None else []
    run_dir.write_config(dump_config(config))
    dumped = config.model_dump(mode="json")
    store = StoreWriter(
        run_dir.store_url,
        run_dir.id,
        task=config.task.name,
        objective=config.objective.type,
        total_iterations=config.run.iterations,
        config=dumped,
    )
    iteration = resumed.progress.iteration if resumed is not None else None
    trackers = build_trackers(
        config.trackers, run_dir=run_dir.path, run_id=run_dir.id, config=dumped, resumed_at=iteration
    )
    reporter = Reporter(run_dir, store, trackers, total_iterations=config.run.iterations)
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
