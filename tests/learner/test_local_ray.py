"""Where a run's Ray is, and where a local one puts its files."""

import os
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private import node

from learner.runs.local_ray import check_place, local_ray, start_errors
from learner.runs.session import check_cluster, joins
from rewards.errors import ConfigError, WaitTimeout


@pytest.mark.parametrize(
    "variable, setting, joined",
    [
        (None, None, False),
        ("", None, False),
        ("local", None, False),
        ("auto", None, True),
        ("10.0.0.1:6379", None, True),
        ("10.0.0.1:6379", "local", False),
        ("local", "10.0.0.1:6379", True),
        ("", "auto", True),
    ],
)
def test_what_names_a_cluster(
    variable: str | None, setting: str | None, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert joins(setting) == joined


def test_a_job_joins_the_ray_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert joins(None) and not joins("local")


@pytest.mark.parametrize("folder", ["/nowhere", "/dev/null", "/proc"])
def test_no_place_for_its_files_is_told_in_one_sentence(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(ConfigError, match="a local Ray has no place for its files .*; set RAY_TMPDIR to a folder"):
        check_cluster(None, insecure=False)


def test_a_long_path_is_replaced_by_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has at most 107 bytes."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    check_place()
    assert not list(long.iterdir())


@pytest.mark.slow
def test_workers_write_files_as_the_caller_does() -> None:
    """A group's shared cache of models is to stay readable for the group."""
    import ray

    before = os.umask(0o027)
    try:
        with local_ray(num_cpus=1):
            found = ray.get(ray.remote(lambda: os.umask(0o027)).remote(), timeout=120)
    finally:
        os.umask(before)
    assert oct(found) == oct(0o027)


@pytest.mark.slow
def test_no_worker_is_started_ahead_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(workers_of_one_actor()) == 1
    monkeypatch.setattr("learner.runs.local_ray._SYSTEM_CONFIG", {})
    assert len(workers_of_one_actor()) > 1, "the control: as Ray does by itself"


def workers_of_one_actor() -> list[str]:
    import ray

    class Actor:
        def pid(self) -> int:
            return os.getpid()

    with local_ray(num_cpus=2):
        actor: Any = ray.remote(Actor).remote()
        ray.get(actor.pid.remote(), timeout=120)
        lines = [" ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)]
        return [line for line in lines if re.match(r"ray::(?!\w*Agent)|\S*python\S* \S*_worker\.py", line)]


def test_a_ray_that_does_not_come_up_is_said_in_one_sentence() -> None:
    said = "timed out during startup"
    assert f"The current node {said}" in Path(node.__file__).read_text(), "Ray says it in other words now"
    with pytest.raises(WaitTimeout, match="too busy"), start_errors():
        raise Exception(f"The current node {said}. This could happen because")
    with pytest.raises(Exception, match="another") as other, start_errors():
        raise Exception("another")
    assert other.type is Exception
