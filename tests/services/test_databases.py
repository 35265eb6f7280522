"""The tests' own PostgreSQL server goes with the process that started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.databases import Server, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]

SERVE = """
import signal
from tests.support.databases import Server
server = Server()
with server.connect() as connection:
    print(server.home, server._keeper.pid, connection.execute("SELECT 1").fetchone()[0], flush=True)
signal.pause()
"""


@pytest.mark.slow
@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_a_killed_owner_leaves_neither_server_nor_folder(postgresql: Server, user: str) -> None:
    as_user = []
    if user == "nobody":
        if os.geteuid() != 0:
            pytest.skip("only root can be another user")
        as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        if subprocess.run([*as_user, "ls", str(REPOSITORY), sys.executable], capture_output=True).returncode:
            pytest.skip(f"nobody can't read {REPOSITORY}, or run its Python")
    command = [*as_user, sys.executable, "-c", SERVE]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder, keeper, one = owner.stdout.readline().split()
        home = Path(folder)
        pid = int((home / "data" / "postmaster.pid").read_text().split()[0])
        assert one == "1" and running(pid) and running(int(keeper))  # the control: with its owner it serves
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not running(pid) and not home.exists() and not running(int(keeper)))
    with postgresql.connect() as connection:  # and no other server goes
        assert connection.execute("SELECT 1").fetchone() == (1,)


def running(pid: int) -> bool:
    return (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    )
