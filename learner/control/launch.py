"""Start a run and see it to its end: directory, store, Ray, base model, controller, exit status."""

import contextlib
import tempfile
from functools import partial

from learner.control.commands import Commands
from learner.control.controller import Controller
from learner.control.lifecycle import OpenedRun, opened_run, see_through, told_failures
from learner.planning.check import check_memory
from learner.planning.hardware import ray_cluster, this_machine
from learner.runs.session import check_cluster, check_local_gpus, joins, ray_session
from learner.runs.start import check_quantization
from learner.runs.stopping import StopFlag, StopRequested
from learner.settings.run import RunConfig, bias_warnings, required_resources
from learner.small_base.base_model import ensure_base, print_progress
from rollout.code import code_identity


def run(config: RunConfig, *, dry_run: bool = False) -> int:
    """Train as the settings say and return the process's exit status: 0, or 128 + signal when asked to stop.

    With ``dry_run``, draw and grade the first iteration, print two rollouts and the batch's statistics, and end without
    a trace.

    Raises:
        UnmaskError: whatever ends the run; the run directory then says ``failed``.
    """
    check_local_gpus(config.resources.ray_address, required_resources(config)[1])
    check_quantization(config.model, config.learner, config.resources)
    code_identity()
    check_cluster(config.resources.ray_address, insecure=config.resources.ray_insecure)
    local = not joins(config.resources.ray_address)
    unchecked = check_memory(config, this_machine(config)) if local else None
    with contextlib.ExitStack() as stack:
        if dry_run:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="unmask-dry-run-"))
            changes = {"dir": place, "name": "dry-run", "resume": "never", "dashboard": False}
            of_its_own = config.store.model_copy(update={"url": None})
            config = config.model_copy(update={"run": config.run.model_copy(update=changes), "store": of_its_own})
        opening = opened_run(
            config,
            config.run,
            kind="run",
            task=config.task.name,
            objective=config.objective.type,
            iterations=config.run.iterations,
            trackers=config.trackers,
            place=config.store,
        )
        opened = stack.enter_context(opening)
        if unchecked is not None:
            opened.reporter.event("warning", "memory", unchecked)
        return _train(config, opened, dry_run)


def _train(config: RunConfig, opened: OpenedRun, dry_run: bool) -> int:
    run_dir, resumed, reporter, since = opened
    with told_failures(reporter):
        model_path = config.model.path or str(ensure_base(config, config.model.cache_path, on_progress=print_progress))
        with (
            ray_session(config) as told,
            StopFlag() as stop,
            Commands(run_dir, reporter, stop, since=since) as commands,
            contextlib.ExitStack() as closing,
        ):
            reporter.event("info", "start", f"run {run_dir.id}: {told}; base model {model_path}")
            for warning in bias_warnings(config):
                reporter.event("warning", "biased", warning)
            if joins(config.resources.ray_address) and (unchecked := check_memory(config, ray_cluster(config))):
                reporter.event("warning", "memory", unchecked)
            start = partial(Controller, config, run_dir, reporter, model_path, resumed, stop, commands, closing)
            if dry_run:
                try:
                    start().dry_run()
                except StopRequested:
                    return stop.exit_status
                return 0
            summary = see_through(start, reporter, stop, commands)
            if summary is None:
                return stop.exit_status
            reporter.closing_table(summary, steps=config.rollout.sampler.steps)
            return 0
