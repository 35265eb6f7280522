"""The one exception tree of Unmask. It lives in the package that imports nothing of ours, so all can use it.

Every class takes its message as the only positional argument (or rebuilds itself through ``args``), which keeps it
picklable: exceptions cross Ray process boundaries.
"""


class UnmaskError(Exception):
    """Root of everything that Unmask raises on purpose."""


class ConfigError(UnmaskError, ValueError):
    """A setting of the user's is wrong; the message names the value and the remedy."""


class DataError(UnmaskError, ValueError):
    """An input file or record can't be used."""


class GradingFailed(UnmaskError):
    """Most verdicts of a batch are missing because graders crashed or hung; learning from zeros would be worse."""


class TrajectoryError(UnmaskError):
    """A trajectory group breaks its contract (``rollout.trajectory``)."""


class WaitTimeout(UnmaskError, TimeoutError):
    """A bounded wait ran out; the message names who was awaited and for how long."""


class WorkerLost(UnmaskError):
    """A rollout actor or learner rank died and could not be replaced."""


class OutOfMemory(UnmaskError):
    """A GPU's memory didn't suffice; the message says for whom, and what to change first."""


class RayLost(UnmaskError):
    """Ray itself is gone: its control service, or the raylet of this node."""


class WeightMismatch(UnmaskError):
    """Weights and the digest or version recorded for them disagree."""


class CheckpointError(UnmaskError):
    """No usable checkpoint, or one that doesn't fit this run."""


class StoreError(UnmaskError):
    """The run store can't be opened or read."""


class TrainingDiverged(UnmaskError):
    """Too many updates in a row had non-finite gradients."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
