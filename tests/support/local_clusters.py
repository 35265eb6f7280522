"""Ray clusters of several nodes on this machine, as deploy/local.sh starts them."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.real_runs import TEST_PROCESS, command_line

LOCAL = Path(__file__).resolve().parents[2] / "deploy" / "local.sh"
PORT = 21000 + 2000 * (TEST_PROCESS % 5)
"""The first of 2,000 that no other process of this test session uses."""


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for a cluster, not made yet. Short, because Ray's sockets live below it; the number of the test process
    keeps two suites apart."""
    path = Path(f"/tmp/unmask-t{os.getpid()}")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class LocalCluster:
    """deploy/local.sh with state and ports of its own."""

    def __init__(self, folder: Path, port: int, **environment: str) -> None:
        self.folder = folder
        without_ray = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = without_ray | {"UNMASK_LOCAL_DIR": str(folder), "PORT": str(port)} | environment

    def call(self, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(LOCAL), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    @contextlib.contextmanager
    def running(self, nodes: int) -> Iterator[None]:
        """The cluster is up; with the block it ends."""
        try:
            started = self.call("start", str(nodes))
            assert started.returncode == 0, started.stderr
            yield
        finally:
            stopped = self.call("stop")
        assert stopped.returncode == 0, stopped.stderr

    def python(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs this interpreter in a shell that sourced the cluster's environment."""
        shell = ["bash", "-c", f'. "{self.folder}/env" && exec "$@"', "bash", sys.executable, *arguments]
        return subprocess.run(shell, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def joining(self) -> dict[str, str]:
        """What the environment of a process that joins it holds beside its own."""
        shell = ["bash", "-c", f'. "{self.folder}/env" && env -0']
        found = subprocess.run(shell, env=self.environment, capture_output=True, text=True, timeout=30, check=True)
        pairs = [pair.partition("=") for pair in found.stdout.split("\0")]
        return {name: value for name, _, value in pairs if name.startswith("RAY_")}

    def processes(self) -> list[str]:
        """Command lines of the cluster's live processes."""
        return [command_line(int(path.name)) for path in Path("/proc").glob("[0-9]*") if self.owns(path)]

    def raylets(self, title: str) -> set[int]:
        """Process ids of the raylets of those nodes where a process of Ray's has this title."""
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            if command_line(int(path.name)).startswith(title) and self.owns(path):
                with contextlib.suppress(OSError):  # it has ended
                    found.add(int((path / "stat").read_text().rpartition(")")[2].split()[1]))
        return {pid for pid in found if "raylet/raylet" in command_line(pid)}

    def owns(self, process: Path) -> bool:
        """Whether it mentions the cluster's folder or carries it in its environment; ``process`` is its folder in
        /proc."""
        try:
            arguments, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            return False
        return int(process.name) != os.getpid() and str(self.folder).encode() in arguments + environment
