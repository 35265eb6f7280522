"""Bounded waits on Ray: every wait has an end, and its error names who was awaited and for how long.

No other file calls ``ray.get`` or ``ray.wait``; a lint test sees to it.
"""

import logging
from collections.abc import Sequence
from typing import Any

import ray

from rewards.errors import UnmaskError, WaitTimeout
from rollout.given_up import ray_given_up, require_ray

logger = logging.getLogger(__name__)


def bounded_get(refs: ray.ObjectRef[Any] | Sequence[ray.ObjectRef[Any]], *, who: str, timeout_s: float) -> Any:
    """The value of a reference, or the list of values of several.

    Args:
        refs: one reference or a sequence of them.
        who: whose answer this is, for the error ("learner rank 0 (update 12)").
        timeout_s: seconds to wait for all of them together.

    Raises:
        RayLost: Ray itself is gone.
        WaitTimeout: nothing came in time.
        UnmaskError, ObjectLostError: what the remote task raised, as itself and not in Ray's wrapping.
        ray.exceptions.RayError: any other failure of the task, its process or its objects.
    """
    require_ray()
    try:
        return ray.get(refs if isinstance(refs, ray.ObjectRef) else list(refs), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise WaitTimeout(f"{who} did not answer within {timeout_s:g} s") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UnmaskError | ray.exceptions.ObjectLostError):
            raise error.cause from error
        raise


def bounded_wait(
    refs: Sequence[ray.ObjectRef[Any]], *, who: str, timeout_s: float, num_returns: int = 1
) -> tuple[list[ray.ObjectRef[Any]], list[ray.ObjectRef[Any]]]:
    """Split references into (done, pending) once ``num_returns`` are done or ``timeout_s`` seconds are over.

    A failed task is done, and ``bounded_get`` says how it failed. Raises RayLost when Ray itself is gone.
    """
    require_ray()
    if not refs:
        return [], []
    count = min(num_returns, len(refs))
    done, pending = ray.wait(list(refs), num_returns=count, timeout=timeout_s, fetch_local=False)
    if len(done) < count:
        logger.debug("%d of %d answers of %s are not in after %g s", count - len(done), count, who, timeout_s)
    return done, pending


def end_actor(handle: Any) -> None:
    """Have an actor's process killed; a Ray that is gone takes its actors with it."""
    if not ray_given_up():
        ray.kill(handle, no_restart=True)
