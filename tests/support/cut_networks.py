"""Ray nodes on this machine whose network can be cut: each in a Linux network namespace, on a bridge in the head's."""

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_runs import clean_environment

_START_LIMIT_S = 90.0
_CLONE_NEWNET = 0x40000000
_HEAD = 0
_PORTS = ("runtime-env-agent-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
"""Given, because a raylet waits 15 s only for agents that find some for themselves: too short on busy cores."""


class CutNetwork:
    """Namespaces, their links, and a Ray node in each; ``up`` makes them. Node 0 is the head."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = f"um{os.getpid()}"
        self._joining = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._made: set[int] = set()

    @property
    def joining(self) -> dict[str, str]:
        """What a driver needs of the environment; it must be started ``inside``."""
        return self._joining | {"RAY_ADDRESS": f"{_address(_HEAD)}:6379"}

    @contextlib.contextmanager
    def up(self, *cpus: int) -> Iterator[None]:
        """A head with so many CPUs, and nodes; with the block they end. Skips the test where the kernel, or the user's
        rights, allow no network namespaces."""
        self._folder.mkdir(mode=0o700)
        try:
            self._lay()
            for count in cpus:
                self.add_node(count)
            yield
        finally:
            for node in self._nodes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(node.pid, signal.SIGKILL)
                node.wait(timeout=30)
            for number in self._made:
                _ip("netns", "del", self._name(number))

    def add_node(self, cpus: int) -> int:
        """Its number. Waits until it is there."""
        number = len(self._nodes)
        if number != _HEAD:
            self._link(number)
        where = ["--head", "--port=6379", "--include-dashboard=false"]
        if number != _HEAD:
            where = [f"--address={_address(_HEAD)}:6379"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={_address(number)}", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        command += [f"--{name}={8000 + place}" for place, name in enumerate(_PORTS)]
        log = self._folder / f"node-{number}.log"
        with self.inside(number), log.open("wb") as output:
            self._nodes[number] = subprocess.Popen(
                [*command, f"--temp-dir={self._folder / str(number)}"],
                env=clean_environment() | self._joining,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_LIMIT_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            alive = self._nodes[number].poll() is None
            assert time.monotonic() < deadline and alive, f"node {number} did not start: {log.read_text()}"
            time.sleep(0.1)
        return number

    @contextlib.contextmanager
    def inside(self, number: int = _HEAD) -> Iterator[None]:
        """What this thread starts in the block lives in that node's namespace."""
        with Path("/proc/thread-self/ns/net").open() as before, Path("/run/netns", self._name(number)).open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    @contextlib.contextmanager
    def cut(self, number: int) -> Iterator[None]:
        """Nothing passes between the node and all others."""
        self._in(_HEAD, "link", "set", f"to{number}", "down")
        try:
            yield
        finally:
            self._in(_HEAD, "link", "set", f"to{number}", "up")

    def _lay(self) -> None:
        try:
            self._make(_HEAD)
            self._in(_HEAD, "link", "add", "bridge", "type", "bridge")
            self._in(_HEAD, "link", "add", "tried", "type", "veth", "peer", "name", "other")
        except FileNotFoundError:
            pytest.skip("there is no ip command (Debian's iproute2)")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces with links between them here: {error.stderr.strip()}")
        self._addressed(_HEAD, "bridge")

    def _link(self, number: int) -> None:
        self._make(number)
        there = ("peer", "name", "eth0", "netns", self._name(number))
        self._in(_HEAD, "link", "add", f"to{number}", "type", "veth", *there)
        self._in(_HEAD, "link", "set", f"to{number}", "master", "bridge", "up")
        self._addressed(number, "eth0")

    def _make(self, number: int) -> None:
        _ip("netns", "add", self._name(number))
        self._made.add(number)
        self._in(number, "link", "set", "lo", "up")

    def _addressed(self, number: int, device: str) -> None:
        self._in(number, "address", "add", f"{_address(number)}/24", "dev", device)
        self._in(number, "link", "set", device, "up")

    def _in(self, number: int, *arguments: str) -> None:
        _ip("-n", self._name(number), *arguments)

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number}"


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
