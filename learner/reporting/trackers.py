"""Optional trackers behind one small seam: a ``Tracker`` is told every report and closed at the end.

A tracker that raises is the reporter's business (counted, training goes on), so trackers don't catch anything.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from learner.runs.directory import RunDirectory
from rewards.errors import ConfigError, WaitTimeout

_WANDB_CLOSE_S = 60.0


class Tracker(Protocol):
    """Where metrics go besides the run directory."""

    name: str

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record the values; called once or more an iteration, with different names."""

    def close(self) -> None:
        """Deliver what is pending."""


def build_trackers(
    names: Sequence[str], *, run_dir: Path, run_id: str, config: Mapping[str, Any], resumed_at: int | None = None
) -> list[Tracker]:
    """The named trackers, ready. ``resumed_at``: the iteration a resumed run goes on from.

    Raises ``ConfigError`` for an unknown name or one whose package is not installed.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoardTracker(run_dir / "tensorboard", resumed_at))
        elif name == "wandb":
            trackers.append(WandbTracker(run_dir, run_id, config))
        else:
            raise ConfigError(f"unknown tracker {name!r}: choose from tensorboard, wandb")
    return trackers


class TensorBoardTracker:
    """Scalars as TensorBoard event files; view them with ``tensorboard --logdir runs``."""

    name = "tensorboard"

    def __init__(self, folder: Path, resumed_at: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases, one run for each of ours, also where another one had its name; project, entity and mode come
    from its own ``WANDB_*`` variables."""

    name = "wandb"

    def __init__(self, run_dir: Path, run_id: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        try:
            self._run = wandb.init(
                id=_wandb_id(run_dir, run_id), name=run_id, resume="allow", dir=str(run_dir), config=dict(config)
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases did not start ({error}): run 'wandb login', set WANDB_MODE=offline, "
                f"or leave wandb out of trackers"
            ) from error
        self._run.define_metric("*", step_metric="iteration")  # its own step can't go back when a run resumes

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **metrics})

    def close(self) -> None:
        """Raises ``WaitTimeout`` when its server doesn't take the rest within a minute."""
        thread = threading.Thread(target=self._run.finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(_WANDB_CLOSE_S)
        if thread.is_alive():
            raise WaitTimeout(f"Weights & Biases did not take the rest of the run within {_WANDB_CLOSE_S:g} s")


def _wandb_id(run_dir: Path, run_id: str) -> str:
    """Not the name: W&B would go on with an older run of that name, never takes the id of a deleted one, and a folder
    that was renamed is the same run."""
    return RunDirectory(run_dir).identity or run_id


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"tracker {name!r} needs a package that is not installed: pip install 'unmask-rl[{name}]', or "
        f"leave it out of trackers"
    )
