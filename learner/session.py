"""The Ray that a run works on: a cluster that is there, or a local one started for the run."""

import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray

from learner.config import RunConfig, check_resources, in_ray_job, required_resources
from rewards.errors import ConfigError

_KNOCK_LIMIT_S = 10.0


@contextlib.contextmanager
def ray_session(config: RunConfig) -> Iterator[str]:
    """The Ray of a run that samples and learns; see ``joined_ray``."""
    cpus, _ = required_resources(config)
    room = (config.rollout.most_actors - config.rollout.actors) * config.resources.cpus_per_actor
    with joined_ray(config.resources.ray_address, cpus + room, partial(check_resources, config)) as told:
        yield told


@contextlib.contextmanager
def joined_ray(wanted: str | None, cpus: float, check: Callable[[float, float], None]) -> Iterator[str]:
    """Join the Ray that ``wanted`` (``resources.ray_address``), RAY_ADDRESS or a Ray job names, or start a local one;
    yields a sentence that says which.

    A local Ray declares as many logical CPUs as the run asks for: two cores can hold two ranks and two actors, which
    take turns in a synchronous run. ``check(cpus, gpus)`` is asked whether what Ray has will do.

    Raises:
        ConfigError: when the Ray named can't be reached, or has less than the run asks for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if joins(wanted):
        address = wanted or os.environ.get("RAY_ADDRESS") or "auto"
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray answers at {address} ({error}); start one, or set resources.ray_address=local"
            ) from error
        told = f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}"
    else:
        # From 2.59 on a local Ray writes a token, readable by all unless the mask says otherwise.
        with _private_files():
            ray.init(address="local", num_cpus=max(1, math.ceil(cpus)), include_dashboard=False, **quiet)
        told = f"started a local Ray with {math.ceil(cpus)} logical CPUs"
    try:
        have = ray.cluster_resources()
        check(have.get("CPU", 0.0), have.get("GPU", 0.0))
        yield told
    finally:
        ray.shutdown()


def joins(wanted: str | None) -> bool:
    """Whether ``wanted`` (``resources.ray_address``) means a Ray that is there, rather than a local one to start."""
    return wanted not in (None, "local") or (wanted is None and ("RAY_ADDRESS" in os.environ or in_ray_job()))


def _knock(address: str) -> None:
    """Raises OSError when nobody listens at ``host:port``, which Ray would find out after many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_LIMIT_S).close()


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
