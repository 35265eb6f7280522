"""The Ray that a run works on: a cluster that is there, or a local one started for the run."""

import contextlib
import ipaddress
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial

import grpc
import ray
from ray.util import get_node_ip_address

from learner.runs.local_ray import local_ray, loopback_only
from learner.settings.run import RunConfig, check_resources, in_ray_job, required_resources
from rewards.errors import ConfigError

_KNOCK_LIMIT_S = 10.0


@contextlib.contextmanager
def ray_session(config: RunConfig) -> Iterator[str]:
    """The Ray of a run that samples and learns; see ``joined_ray``."""
    cpus, _ = required_resources(config)
    room = (config.rollout.most_actors - config.rollout.actors) * config.resources.cpus_per_actor
    resources = config.resources
    wanted, check = resources.ray_address, partial(check_resources, config)
    with joined_ray(wanted, cpus + room, check, insecure=resources.ray_insecure) as told:
        yield told


@contextlib.contextmanager
def joined_ray(
    wanted: str | None, cpus: float, check: Callable[[float, float], None], *, insecure: bool = False
) -> Iterator[str]:
    """Join the Ray that ``wanted`` (``resources.ray_address``), RAY_ADDRESS or a Ray job names, or start a local one;
    yields a sentence that says which.

    A local Ray declares as many logical CPUs as the run asks for: two cores can hold two ranks and two actors, which
    take turns in a synchronous run. ``check(cpus, gpus)`` is asked whether what Ray has will do.

    Args:
        insecure: join a Ray too that lets everybody in who reaches it over the network (``resources.ray_insecure``).

    Raises:
        ConfigError: when the Ray named can't be reached, lets everybody in, or has less than the run asks for.
    """
    with contextlib.ExitStack() as stack:
        if joins(wanted):
            address = stack.enter_context(_cluster(wanted or os.environ.get("RAY_ADDRESS") or "auto"))
            told = f"joined the Ray cluster at {address}"
            if lets_everybody_in(address) and not _is_loopback(address):
                if not insecure:
                    raise ConfigError(
                        f"the Ray cluster at {address} has no authentication: whoever reaches that address can run "
                        "commands as you; start it with RAY_AUTH_MODE=token, or set resources.ray_insecure=true"
                    )
                told += "; it lets everybody in (resources.ray_insecure=true)"
        else:
            count = max(1, math.ceil(cpus))
            stack.enter_context(local_ray(num_cpus=count))
            told = f"started a local Ray with {count} logical CPUs"
        have = ray.cluster_resources()
        check(have.get("CPU", 0.0), have.get("GPU", 0.0))
        yield told


def joins(wanted: str | None) -> bool:
    """Whether ``wanted`` (``resources.ray_address``) means a Ray that is there, rather than a local one to start."""
    return wanted not in (None, "local") or (wanted is None and ("RAY_ADDRESS" in os.environ or in_ray_job()))


def lets_everybody_in(address: str) -> bool:
    """Whether the Ray at ``host:port`` answers a question that comes without a token. One that wants a certificate
    (RAY_USE_TLS) doesn't."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=_KNOCK_LIMIT_S)
        except grpc.RpcError:
            return False
    return True


@contextlib.contextmanager
def _cluster(wanted: str) -> Iterator[str]:
    """Be a driver of the Ray at ``wanted`` (auto or host:port); yields its own word for where it listens."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _knock(wanted)
        with loopback_only() if _only_on_loopback(wanted) else contextlib.nullcontext():
            ray.init(address=wanted, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"no Ray answers at {wanted} ({error}); start one, give this shell its token (RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH) if it has one, or set resources.ray_address=local"
        ) from error
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError when nobody listens at ``host:port``, which Ray would find out after many minutes."""
    host, port = _host_and_port(address)
    if port:
        socket.create_connection((host, port), timeout=_KNOCK_LIMIT_S).close()


def _only_on_loopback(address: str) -> bool:
    """Whether ``host:port`` is of loopback and nobody listens at that port of the node's network address, which Ray
    would take in its place."""
    host, port = _host_and_port(address)
    if not port or not _is_loopback(address):
        return False
    with socket.socket(socket.AF_INET6 if ":" in get_node_ip_address() else socket.AF_INET) as probe:
        probe.settimeout(_KNOCK_LIMIT_S)
        return probe.connect_ex((get_node_ip_address(), port)) != 0


def _is_loopback(address: str) -> bool:
    host, _ = _host_and_port(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _host_and_port(address: str) -> tuple[str, int]:
    """Port 0 for what is no host:port, such as auto."""
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() and "//" not in host else ("", 0)
