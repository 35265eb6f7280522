"""deploy/local.sh: a real cluster of several local nodes."""

import json
import os
import re
import sqlite3
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.listening import listeners
from tests.support.local_clusters import PORT, LocalCluster, short_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


ALIVE_NODES = """
import json, ray
ray.init(logging_level="error")
nodes = [node for node in ray.nodes() if node["Alive"]]
print(json.dumps({"nodes": len(nodes), "cpus": ray.cluster_resources()["CPU"]}))
"""


UNPACKED = """
import pathlib, ray
ray.init(log_to_driver=False, logging_level="error")
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def look():
    return ray.get_runtime_context().get_node_id(), sum(file.stat().st_size for file in pathlib.Path().rglob("*.dat"))
seen = dict(ray.get([look.remote() for _ in range(12)], timeout=60))
print("unpacked on", len(seen), "nodes:", *sorted(set(seen.values())))
"""


def dashboard_status(port: int) -> int:
    """HTTP status of a request for the list of jobs that brings no token."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs/", timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize(
    "auth_mode, nodes, status", [("token", 3, 401), pytest.param("disabled", 1, 200, marks=pytest.mark.heavy)]
)
def test_local_cluster_has_its_nodes_and_stops_without_a_trace(
    folder: Path, auth_mode: str, nodes: int, status: int
) -> None:
    local = LocalCluster(folder, PORT, CPUS_PER_NODE="2", RAY_AUTH_MODE=auth_mode)
    try:
        started = local.call("start", str(nodes))
        assert started.returncode == 0, started.stderr
        assert f"127.0.0.1:{PORT}" in started.stdout and "ray job submit" in started.stdout

        answer = local.python("-c", ALIVE_NODES)
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout.splitlines()[-1]) == {"nodes": nodes, "cpus": 2.0 * nodes}

        token = folder / ".ray" / "auth_token"
        assert token.exists() == (auth_mode == "token")
        assert not token.exists() or token.stat().st_mode & 0o777 == 0o600
        assert dashboard_status(PORT + 1) == status

        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if local.owns(path)]
        found = listeners(pids)
        assert len(found) > 4 * nodes and {host for host, _ in found} == {"127.0.0.1"}, sorted(found)

        second = local.call("start", "1")
        assert second.returncode == 1 and "holds a cluster already" in second.stderr
        assert len(local.processes()) > 3  # the control of the last assertion: the search does find them
    finally:
        stopped = local.call("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert re.search(r"stopped \d+ processes", stopped.stdout)
    assert local.processes() == []


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.heavy
def test_training_runs_on_a_cluster_with_actors_on_several_nodes(folder: Path, bases: Path, tmp_path: Path) -> None:
    local = LocalCluster(folder, PORT, CPUS_PER_NODE="1", UNMASK_CACHE=str(bases))
    try:
        assert local.call("start", "3").returncode == 0
        arguments = ("recipe=smoke", f"run.dir={tmp_path}", "run.name=spread", "rollout.actors=2")
        run = local.python("-m", "learner.main", *arguments, timeout_s=600)
    finally:
        stopped = local.call("stop")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "joined the Ray cluster" in run.stdout
    store = sqlite3.connect(tmp_path / "spread" / "store.sqlite")
    rows = store.execute("select data from workers where role = 'rollout'").fetchall()
    assert len({json.loads(data)["node_id"] for (data,) in rows}) == 2
    assert stopped.returncode == 0, stopped.stderr


@pytest.mark.slow
@pytest.mark.heavy
def test_a_jobs_files_are_whole_on_every_node(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(UNPACKED)
    for i in range(1500):
        (tmp_path / f"{i}.dat").write_bytes(os.urandom(1000))
    local = LocalCluster(folder, PORT, CPUS_PER_NODE="4")
    try:
        assert local.call("start", "3").returncode == 0
        job = local.python(
            "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(tmp_path), "--", "python", "job.py"
        )
    finally:
        stopped = local.call("stop")
    assert "unpacked on 3 nodes: 1500000" in job.stdout, job.stdout + job.stderr
    assert stopped.returncode == 0, stopped.stderr


@pytest.mark.slow
def test_stop_leaves_other_processes_alone(folder: Path) -> None:
    local = LocalCluster(folder, 21000)
    folder.mkdir(mode=0o700)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        (folder / "pids").write_text(f"{bystander.pid} 1\n")  # the pid of ours, used again by somebody else
        assert "stopped 0 processes" in local.call("stop").stdout
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("arguments, message", [((), "deploy/local.sh start"), (("start", "none"), "NODES is 'none'")])
def test_wrong_arguments_get_a_sentence(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    answer = LocalCluster(folder, 21000).call(*arguments)
    assert answer.returncode == 2 and message in answer.stdout + answer.stderr


NOBODY = 65534


def hostile(folder: Path, kind: str) -> Path:
    """A state folder that others have a say in, with a cluster's pids in it."""
    state = folder / "state"
    state.mkdir(parents=True, mode=0o700)
    (state / "pids").write_text("")
    folder.chmod(0o700)
    if kind == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can make a folder of another user")
        os.chown(state, NOBODY, NOBODY)
    elif kind == "below another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can make a folder of another user")
        os.chown(folder, NOBODY, NOBODY)
    elif kind == "open to others":
        state.chmod(0o770)
    elif kind == "below an open one":
        folder.chmod(0o777)
    elif kind == "a link":
        (folder / "link").symlink_to(state)
        return folder / "link"
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("of another user", f"state belongs to user {NOBODY}"),
        ("below another user's", f"belongs to user {NOBODY}"),
        ("open to others", "state is open to others (mode 770)"),
        ("below an open one", "others may write in"),
        ("a link", "link is a symbolic link"),
    ],
)
def test_a_state_folder_that_others_have_a_say_in_is_refused(folder: Path, kind: str, message: str) -> None:
    state = hostile(folder, kind)
    local = LocalCluster(state, 21000)
    for command in ("start", "stop"):
        answer = local.call(command, timeout_s=60)
        assert answer.returncode == 1 and message in answer.stderr and "UNMASK_LOCAL_DIR" in answer.stderr
        assert len(answer.stderr.splitlines()) == 1
    assert [path.name for path in (folder / "state").iterdir()] == ["pids"], "nothing was written"


def test_nothing_is_made_below_a_folder_that_others_may_write(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    answer = LocalCluster(folder / "new" / "state", 21000).call("start", "1", timeout_s=60)
    assert answer.returncode == 1 and "others may write in" in answer.stderr
    assert list(folder.iterdir()) == []


def test_a_state_folder_of_ones_own_is_taken(folder: Path) -> None:
    """The control of the two tests above; /tmp, where it lies, is sticky. The cluster in it is none."""
    state = hostile(folder, "mine")
    local = LocalCluster(state, 21000)
    assert "holds a cluster already" in local.call("start", "1", timeout_s=60).stderr
    stopped = local.call("stop", timeout_s=60)
    assert stopped.returncode == 0 and "stopped 0 processes" in stopped.stdout
    assert not (state / "pids").exists()
