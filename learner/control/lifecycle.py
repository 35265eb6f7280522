"""From its first iteration to its exit status: what every kind of run does alike."""

import contextlib
from collections.abc import Callable
from typing import Any

from learner.control.commands import Commands
from learner.control.training import Training
from learner.ranks.group import RanksLost
from learner.reporting.reporter import Reporter
from learner.runs.ray_watch import RayWatch
from learner.runs.stopping import StopFlag, StopRequested
from rewards.errors import TrainingDiverged
from services.store.faults import Cause


def see_through(
    start: Callable[[], Training], reporter: Reporter, stop: StopFlag, commands: Commands
) -> dict[str, Any] | None:
    """Train to the end and return the summary; None when the run was asked to stop, and has saved where it stands."""
    with RayWatch() as watch:
        return _watched(watch, start, reporter, stop, commands)


def _watched(
    watch: RayWatch, start: Callable[[], Training], reporter: Reporter, stop: StopFlag, commands: Commands
) -> dict[str, Any] | None:
    def lost_while_starting(why: str, cause: Cause, silent_s: float) -> None:
        reporter.fault("ray", cause, why, silent_s=silent_s)
        reporter.store.status("failed")
        reporter.flush()

    watch.on_lost = lost_while_starting
    try:
        training = start()
        watch.on_lost, watch.finishing = training.ray_lost, lambda: training.finishing
    except StopRequested:
        reporter.event("info", "stop", f"asked to stop by {stop.name} while the run's processes were starting")
        reporter.store.status("stopped")
        commands.stopped("stopped while the run's processes were starting")
        return None
    try:
        training.train()
    except StopRequested:
        at = training.progress.iteration + 1
        reporter.event("info", "stop", f"asked to stop by {stop.name} in iteration {at}")
        with contextlib.suppress(RanksLost):  # then what the controller holds is saved
            training.checkpoint()
        training.save()
        training.finishing = True
        saved = training.saved
        at_saved = f"after iteration {saved.iteration}" if saved is not None else "from the start"
        reporter.event("info", "stop", f"resume=auto will go on {at_saved}")
        if not training.is_as_resumed:  # else the results that are there are newer than what it would leave
            training.finish()
        reporter.store.status("stopped")
        commands.stopped(_where(training))
        return None
    except TrainingDiverged:
        raise  # from here it would end again at once
    except Exception as error:
        if (unsaved := training.save_at_the_end()) is not None:
            error.add_note(unsaved)
        elif training.saved is not None:
            reporter.event("info", "checkpoint", f"resume=auto will go on after iteration {training.saved.iteration}")
        try:
            training.tell_last_faults()
        except Exception as second:  # it must not take the place of the first
            error.add_note(f"the last faults could not be told: {second!r}")
        raise
    training.finishing = True
    summary = training.finish()
    text = f"finished: {summary['iterations']} iterations, {summary['train_seconds']:.0f} s of training"
    reporter.store.event("info", "finished", text)
    reporter.store.status("finished", summary)
    return summary


def _where(training: Training) -> str:
    at, saved = training.progress.iteration, training.saved
    if saved is None:
        return f"stopped after iteration {at}, nothing is saved; resume=auto begins again"
    goes_on = "there" if saved.iteration == at else f"after iteration {saved.iteration}, the last one saved"
    return f"stopped after iteration {at}; resume=auto goes on {goes_on}"
