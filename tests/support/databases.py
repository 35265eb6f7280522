"""Real databases for tests: SQLite files, and a PostgreSQL server of the machine's own package."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

USER = "postgres"  # initdb refuses root: the package's user serves then


def binaries() -> Path | None:
    """Folder of the newest PostgreSQL server installed, None when there is none."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    on_path = shutil.which("initdb")
    found += [Path(on_path).resolve().parent] if on_path else []
    return max(found, key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0, default=None)


class Server:
    """A PostgreSQL server on a free port of 127.0.0.1, in a folder of its own under the system's temporary one (the
    unprivileged user that runs it must get there, and can't enter root's). It goes with this process, however that
    ends: a shell waits for the end of a pipe, then stops the server and removes the folder."""

    def __init__(self) -> None:
        folder = binaries()
        if folder is None:
            pytest.skip("no PostgreSQL server here: install Debian's package postgresql")
        self._bin = folder
        self.home = Path(tempfile.mkdtemp(prefix="unmask-postgresql-"))
        self._as_user: list[str] = []
        self._free: list[str] = []
        self._made = 0
        if os.geteuid() == 0:
            shutil.chown(self.home, USER)
            self._as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        self._keeper = self._keep()
        self.port = _free_port()
        self._call("initdb", "-D", str(self.home / "data"), "-U", "unmask", "-A", "trust", "-E", "UTF8", "--no-sync")
        for attempt in range(3):
            try:
                self.start()
                return
            except AssertionError:  # somebody else may have taken the port meanwhile
                if attempt == 2 or "could not create any TCP/IP sockets" not in self.log():
                    raise
                self.port = _free_port()

    def start(self, *, largest_file: int | None = None) -> None:
        """largest_file: bytes beyond which no file of the server's grows."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        data, log = str(self.home / "data"), str(self.home / "log")
        limit = [] if largest_file is None else ["prlimit", f"--fsize={largest_file}"]
        self._call("pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "-t", "60", "start", limit=limit)

    def kill(self) -> None:
        """As a power cut would: no goodbye to anybody."""
        self._call(*self._stop)

    def log(self) -> str:
        """What the server wrote so far."""
        path = self.home / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def remove(self) -> None:
        """Stop it, if it runs, and remove its folder."""
        self._keeper.communicate(timeout=120)
        assert not self.home.exists()

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        address = f"host=127.0.0.1 port={self.port} user=unmask dbname={database} connect_timeout=10"
        return psycopg.connect(address, autocommit=True)

    def disconnect(self, database: str) -> None:
        """Cut all connections to it."""
        with self.connect() as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """URL of an empty database, which is emptied afterwards: that is much faster than a new one each time."""
        if self._free:
            name = self._free.pop()
        else:
            self._made += 1
            name = f"store_{self._made}"
            with self.connect() as connection:
                connection.execute(f"CREATE DATABASE {name}")
        yield f"postgresql://unmask@127.0.0.1:{self.port}/{name}"
        self.disconnect(name)
        with self.connect(name) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        self._free.append(name)

    @property
    def _stop(self) -> list[str]:
        return ["pg_ctl", "-D", str(self.home / "data"), "-m", "immediate", "-w", "-t", "60", "stop"]

    def _keep(self) -> subprocess.Popen[bytes]:
        program, *arguments = self._stop
        wait = 'cat; "$@"; rm -rf "$0"'
        command = ["sh", "-c", wait, str(self.home), *self._as_user, str(self._bin / program), *arguments]
        return subprocess.Popen(
            command,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends the tests' processes as a group must leave it
        )

    def _call(self, program: str, *arguments: str, limit: Sequence[str] = ()) -> None:
        """pg_ctl's server keeps what it inherits: its output goes to a file, which has an end."""
        with tempfile.TemporaryFile() as output:
            command = [*limit, *self._as_user, str(self._bin / program), *arguments]
            done = subprocess.run(command, cwd="/", stdout=output, stderr=output, timeout=120)
            output.seek(0)
            assert done.returncode == 0, output.read().decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Returns when ``condition()`` holds; fails when it doesn't in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"did not come about within {timeout_s:g} s"
        time.sleep(0.05)
