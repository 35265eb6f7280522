"""A Ray of this process's own that nobody else gets into: a token, loopback only, its files in a private folder.

Ray leaves all three open by default: every port listens on all interfaces, its job agent runs a shell command for
whoever posts one, and its session folders are writable by all. Authentication is a setting of the environment that Ray
reads while it is imported, and it turns 127.0.0.1 into the node's network address unless it believes that there are no
clusters on this platform. So this module reaches into Ray, under the names ``ray._private`` and ``ray._raylet``, and no
other one does; ``tests/whole/test_closed_ray.py`` attacks what comes of it.
"""

import atexit
import contextlib
import itertools
import logging
import os
import secrets
import shutil
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray._private.worker
from ray._private import ray_constants
from ray._raylet import (  # type: ignore[attr-defined]  # its stub names a few things only
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
)

from learner.runs.stopping import not_for_children, uninterrupted
from rewards.errors import ConfigError, WaitTimeout
from rollout.given_up import ray_given_up
from rollout.process import for_ray_workers

LOOPBACK = "127.0.0.1"

_SYSTEM_CONFIG = {
    # Ray starts a Python process for each logical CPU ahead of any work, 0.8 s of CPU time each. They are not prepared
    # (``for_ray_workers``), so no actor of ours ever gets one.
    "prestart_worker_first_driver": False,
}

_SOCKET_PATH_BYTES = 107
_LONGEST_BELOW = len("/um-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")


@contextlib.contextmanager
def local_ray(*, num_cpus: int, **options: Any) -> Iterator[dict[str, str]]:
    """Start a Ray on this machine and end it with the block.

    Yields the environment of another process that may join it: address, mode and token. They are not in this process's
    own environment, so nothing that it starts besides Ray has them. Ray's logs stay, and their folder is named on
    standard error, when the block ends with an exception that is no ConfigError.

    Args:
        num_cpus: logical CPUs that Ray declares.
        options: further ones of ``ray.init``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Ray opens the folder that it is given to everybody, so that one lies in a folder that only we may enter.
    private = _private_folder()
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
    failed = False
    try:
        # Half of a Ray, and one whose end is cut short, leave processes behind.
        with uninterrupted(), _authentication(token), loopback_only(), not_for_children():
            own: dict[str, Any] = {
                "_node_ip_address": LOOPBACK,
                "_temp_dir": str(private / "ray"),
                "_system_config": _SYSTEM_CONFIG,
            }
            with start_errors():
                ray.init(address="local", num_cpus=num_cpus, runtime_env=for_ray_workers(), **own, **quiet | options)
        address = ray.get_runtime_context().gcs_address
        assert get_authentication_mode() == AuthenticationMode.TOKEN, "Ray started without a token"
        assert address.startswith(f"{LOOPBACK}:"), f"Ray listens at {address}"
        yield {"RAY_ADDRESS": address} | token
    except Exception as error:
        failed = not isinstance(error, ConfigError)
        raise
    finally:
        with uninterrupted():
            if ray_given_up():
                abandon()
                failed = False  # a Ray that somebody killed has nothing to say
            else:
                ray.shutdown()
            _forget_authentication()
            if failed:
                _keep_logs(private)
            else:
                shutil.rmtree(private, ignore_errors=True)


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """In the block Ray takes 127.0.0.1 as it stands: what it starts listens there alone, and what listens there alone
    can be joined."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def core_processes() -> dict[str, int]:
    """Process ids of the raylet of this node and, where this process started it, of the GCS. Ray must be there."""
    node = _node()
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.connect(node.raylet_socket_name)
        pid, _, _ = struct.unpack("3i", raylet.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    found = {"raylet": pid}
    if started := node.all_processes.get(ray_constants.PROCESS_TYPE_GCS_SERVER):
        found["GCS"] = started[0].process.pid
    return found


def abandon() -> None:
    """Leave a Ray whose core has died: end what this process started of it, and have Ray do nothing at exit, where it
    would wait for what isn't there any more."""
    atexit.unregister(ray._private.worker.shutdown)
    for each in itertools.chain.from_iterable(_node().all_processes.values()):
        with contextlib.suppress(ProcessLookupError):
            each.process.kill()


def _node() -> Any:
    node: Any = ray._private.worker._global_node
    assert node is not None, "Ray was never started"
    return node


def token_header() -> dict[str, str]:
    """The header with which Ray would ask from this shell; empty without a token."""
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        return {}
    try:
        return AuthenticationTokenLoader.instance().get_token_for_http_header()
    except ray.exceptions.AuthenticationError:  # no file, or an empty one
        return {}


@contextlib.contextmanager
def _authentication(variables: Mapping[str, str]) -> Iterator[None]:
    """What Ray starts in the block inherits ``variables``, and this process keeps to them after it: Ray remembers."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update(variables)
    try:
        _forget_authentication()
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def _forget_authentication() -> None:
    """Ray reads mode and token from the environment anew; it remembers those of its import otherwise."""
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


@contextlib.contextmanager
def start_errors() -> Iterator[None]:
    """A Ray that isn't up in the time that it gives itself, 30 s, raises a bare ``Exception``: say what to do."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception and "timed out during startup" in str(error):
            raise WaitTimeout(
                "Ray did not start on this machine within 30 s: the machine is too busy, or short of memory; "
                "look what else runs (uptime, free -h), and start again"
            ) from error
        raise


def check_place() -> None:
    """Refuses a local Ray that would have no place for its files. Raises ConfigError."""
    _private_folder().rmdir()


def _private_folder() -> Path:
    """A new one where Ray would put its files, unless the paths of its sockets would be too long there."""
    try:
        wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
        folder = wanted if len(os.fsencode(wanted)) + _LONGEST_BELOW <= _SOCKET_PATH_BYTES else "/tmp"
        return Path(tempfile.mkdtemp(prefix="um-", dir=folder))
    except OSError as error:
        raise ConfigError(
            f"a local Ray has no place for its files ({error}); set RAY_TMPDIR to a folder that can be written, whose "
            f"path has at most {_SOCKET_PATH_BYTES - _LONGEST_BELOW} bytes"
        ) from error


def _keep_logs(private: Path) -> None:
    """Ray's logs instead of its session, whose object store may have spilled gigabytes."""
    for logs in private.glob("ray/session_*/logs"):
        if not logs.parent.is_symlink():  # session_latest
            logs.rename(private / "logs")
            print(f"Ray's logs are in {private / 'logs'}", file=sys.stderr)
    shutil.rmtree(private / "ray", ignore_errors=True)
