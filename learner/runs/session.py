"""The Ray that a run works on: a cluster that is there, or a local one started for the run."""

import contextlib
import ipaddress
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import grpc
import ray
from ray.util import get_node_ip_address

from learner.runs.local_ray import abandon, check_place, local_ray, loopback_only, token_header
from learner.settings.run import RunConfig, check_resources, in_ray_job, required_resources
from rewards.errors import ConfigError
from rollout.given_up import ray_given_up
from rollout.process import for_ray_workers

_KNOCK_LIMIT_S = 10.0
_NO_CLUSTER = "set resources.ray_address=local"


@contextlib.contextmanager
def ray_session(config: RunConfig) -> Iterator[str]:
    """The Ray of a run that samples and learns; see ``joined_ray``."""
    cpus, _ = required_resources(config)
    room = (config.rollout.most_actors - config.rollout.fewest_actors) * config.resources.cpus_per_actor
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
            check_cluster(wanted, insecure=insecure)
            address = stack.enter_context(_cluster(_named(wanted)))
            told = f"joined the Ray cluster at {address}"
            if _is_open(address, answer(address)):
                _refuse_unless(insecure, address)
                told += "; it lets everybody in (resources.ray_insecure=true)"
        else:
            count = max(1, math.ceil(cpus))
            stack.enter_context(local_ray(num_cpus=count))
            told = f"started a local Ray with {count} logical CPUs"
        have = ray.cluster_resources()
        check(have.get("CPU", 0.0), have.get("GPU", 0.0))
        yield told


def check_cluster(wanted: str | None, *, insecure: bool) -> None:
    """Refuses at once what can't or mustn't be joined, as far as it is named by host and port, and a local Ray that
    would have no place for its files; Ray would take half a minute and say less. Nothing is asked where Ray is to find
    the cluster (auto).

    Raises:
        ConfigError: when nobody listens there, this shell has not the right token, or everybody is let in; see also
            ``check_place``.
    """
    if not joins(wanted):
        check_place()
        return
    address = _named(wanted)
    if address == "auto":
        return
    host, port = _host_and_port(address)
    if not port:
        raise ConfigError(f"the Ray address {address} must be auto, local or host:port")
    if _is_loopback(address) and not _only_on_loopback(address):
        host = get_node_ip_address()  # Ray's own word for it
    reached = host_port(host, port)
    try:
        socket.create_connection((host, port), timeout=_KNOCK_LIMIT_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray answers at {address} ({error}); start one, or {_NO_CLUSTER}") from error
    said = answer(reached)
    if _is_open(reached, said):
        _refuse_unless(insecure, reached)
    if said == grpc.StatusCode.UNAUTHENTICATED:
        mine = token_header()
        if not mine:
            raise ConfigError(
                f"no Ray answers at {address} without its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to "
                f"the file that holds it, or {_NO_CLUSTER}"
            )
        if answer(reached, mine) == grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError(
                f"no Ray answers at {address} to this shell's token; set RAY_AUTH_TOKEN_PATH to the file that holds "
                f"the right one, or {_NO_CLUSTER}"
            )


def check_local_gpus(wanted: str | None, needed: float) -> None:
    """Refuses at once a run on a local Ray that needs more GPUs than this machine has.

    Raises:
        ConfigError: saying how many there are.
    """
    if not needed or joins(wanted):
        return
    import torch  # takes a second, for which a run on CPUs needn't wait here

    there = torch.cuda.device_count()
    if needed > there:
        raise ConfigError(
            f"the settings ask for more GPUs ({needed:g}, by resources.gpus_per_rank and gpus_per_actor) than this "
            f"machine has ({there or 'none'}); start it where they are, or join their cluster (resources.ray_address)"
        )


def joins(wanted: str | None) -> bool:
    """Whether ``wanted`` (``resources.ray_address``), or else RAY_ADDRESS, means a Ray that is there, rather than a
    local one to start."""
    named = wanted or os.environ.get("RAY_ADDRESS")  # Ray too takes an empty one for none
    return named != "local" if named else in_ray_job()


def answer(address: str, header: Mapping[str, str] | None = None) -> grpc.StatusCode:
    """What the Ray at ``host:port`` says to a question that comes with this header, by default without a token."""
    metadata = [(name.lower(), value) for name, value in (header or {}).items()]
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=_KNOCK_LIMIT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _is_open(address: str, answer: grpc.StatusCode) -> bool:
    """Whether a Ray that gave this answer without a token lets everybody in over the network. One that wants a
    certificate (RAY_USE_TLS) doesn't answer."""
    return answer == grpc.StatusCode.OK and not _is_loopback(address)


def _refuse_unless(insecure: bool, address: str) -> None:
    if not insecure:
        raise ConfigError(
            f"the Ray cluster at {address} has no authentication: whoever reaches that address can run commands as "
            "you; start it with RAY_AUTH_MODE=token, or set resources.ray_insecure=true"
        )


def _named(wanted: str | None) -> str:
    """What is to be joined: auto, or host:port."""
    return wanted or os.environ.get("RAY_ADDRESS") or "auto"


@contextlib.contextmanager
def _cluster(wanted: str) -> Iterator[str]:
    """Be a driver of the Ray at ``wanted`` (auto or host:port); yields its own word for where it listens."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with loopback_only() if _only_on_loopback(wanted) else contextlib.nullcontext():
            ray.init(address=wanted, runtime_env=for_ray_workers(), log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(f"no Ray answers at {wanted} ({error}); start one, or {_NO_CLUSTER}") from error
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        if ray_given_up():
            abandon()
        else:
            ray.shutdown()


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


def host_port(host: str, port: int) -> str:
    """One address of both, as gRPC wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_and_port(address: str) -> tuple[str, int]:
    """Port 0 for what is no host:port, such as auto."""
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() and "//" not in host else ("", 0)
