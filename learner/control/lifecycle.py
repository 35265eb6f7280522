"""From its first iteration to its exit status: what every kind of run does alike."""

from collections.abc import Callable
from typing import Any

from learner.control.commands import Commands
from learner.control.training import Training
from learner.reporting.reporter import Reporter
from learner.runs.stopping import StopFlag, StopRequested


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
        if not training.is_as_resumed:  # else the results that are there are newer than what it would leave
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
