"""Start a run and see it to its end: everything is checked, and then Ray, controller, exit status."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial

from learner.control.commands import Commands
from learner.control.controller import Controller
from learner.control.lifecycle import see_through
from learner.control.opening import About, FoundRun, begun_run, found_run
from learner.control.subject import Subject, grounds_of, subject_of
from learner.planning.check import check_memory
from learner.planning.hardware import ray_cluster, this_machine
from learner.runs.session import check_cluster, check_local_gpus, joins, ray_session
from learner.runs.start import check_engine, check_quantization, finished
from learner.runs.stopping import StopFlag, StopRequested
from learner.settings.run import DEFAULT_RECIPE, RunConfig, bias_warnings, required_resources
from rollout.code import code_identity


def run(config: RunConfig, argv: Sequence[str] = (), *, look: Callable[[Controller], None] | None = None) -> int:
    """Train as the settings say and return the process's exit status: 0, or 128 + signal when asked to stop.

    Args:
        argv: the command's arguments, to be recorded.
        look: called in place of the training, with actors and ranks ready; the run leaves no trace then.

    Raises:
        UnmaskError: whatever ends the run; once it was begun, the run directory then says ``failed``.
    """
    check_local_gpus(config.resources.ray_address, required_resources(config)[1])
    check_quantization(config.model, config.learner, config.resources)
    check_engine(
        config.rollout,
        config.model,
        config.resources,
        model_path=config.model.path,
        r=config.lora.r,
        adapts_head=config.lora.include_head,
    )
    code_identity()
    check_cluster(config.resources.ray_address, insecure=config.resources.ray_insecure)
    local = not joins(config.resources.ray_address)
    unchecked = check_memory(config, this_machine(config)) if local else None
    with contextlib.ExitStack() as stack:
        if look is not None:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="unmask-dry-run-"))
            changes = {"dir": place, "name": "dry-run", "resume": "never", "dashboard": False, "restarts": 0}
            of_its_own = config.store.model_copy(update={"url": None})
            config = config.model_copy(update={"run": config.run.model_copy(update=changes), "store": of_its_own})
        about = About(
            config=config,
            run=config.run,
            store=config.store,
            trackers=config.trackers,
            kind="run",
            task=config.task.name,
            objective=config.objective.type,
            iterations=config.run.iterations,
            argv=argv,
            default_recipe=DEFAULT_RECIPE,
        )
        found = stack.enter_context(found_run(about))
        if finished(found.run_dir, found.resumed, config.run.iterations):
            print(f"to go on, give more of them: run.iterations={2 * config.run.iterations}, for example")
            return 0
        subject = subject_of(config, found)
        if unchecked is not None:
            subject.told.append(("warning", "memory", unchecked))
        return _train(config, about, found, subject, look)


def _train(
    config: RunConfig, about: About, found: FoundRun, subject: Subject, look: Callable[[Controller], None] | None
) -> int:
    with contextlib.ExitStack() as stack:
        # A new run is begun before its base is built, for that takes a while and people may look at it; one that goes
        # on, when nothing is left that could refuse it.
        begun = stack.enter_context(begun_run(about, found)) if found.run_dir.is_new else None
        grounds = grounds_of(config, subject, found)
        ray_told = stack.enter_context(ray_session(config))
        stop = stack.enter_context(StopFlag())
        unchecked = check_memory(config, ray_cluster(config)) if joins(config.resources.ray_address) else None
        if begun is None:
            begun = stack.enter_context(begun_run(about, found))
        reporter = begun.reporter
        commands = stack.enter_context(Commands(begun.run_dir, reporter, stop, since=begun.since))
        closing = stack.enter_context(contextlib.ExitStack())
        reporter.event("info", "start", f"run {begun.run_dir.id}: {ray_told}; base model {grounds.model_path}")
        for level, kind, text in subject.told:
            reporter.event(level, kind, text)
        for warning in bias_warnings(config):
            reporter.event("warning", "biased", warning)
        if unchecked is not None:
            reporter.event("warning", "memory", unchecked)
        start = partial(Controller, config, begun, grounds, stop, commands, closing)
        if look is not None:
            try:
                look(start())
            except StopRequested:
                return stop.exit_status
            return 0
        summary = see_through(start, reporter, stop, commands)
        if summary is None:
            return stop.exit_status
        reporter.closing_table(summary, steps=config.rollout.sampler.steps)
        return 0
