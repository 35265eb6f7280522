"""The run directory, its lock, and files that are there whole or not at all."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from learner.runs.atomic import atomic_dir, atomic_write_text, recover_replaced, remove_leftovers
from learner.runs.directory import RunDirectory
from learner.runs.start import open_run
from learner.settings.sections import RunPlace
from rewards.errors import ConfigError, UnmaskError, WaitTimeout
from services.store.schema import open_engine
from services.store.writer import StoreWriter
from tests.support.store_rows import list_events

REPOSITORY = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def no_room():
    """Files of this process can't grow beyond a few bytes, as on a full disk. pytest's own output may be one of them:
    keep the block to the writes in question."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_create_open_and_what_lies_where(tmp_path):
    with RunDirectory.create(tmp_path / "runs", "first") as run:
        run.write_config('{"seed": 1}\n')
        run.write_summary({"base": {"greedy": {"m": 0.1}}})
        assert run.path == tmp_path / "runs" / "first" and run.id == "first"
        assert names(run.path) == [
            *("checkpoints", "config.json", "plots", "run.lock", "run.uuid", "samples", "summary.json")
        ]
        assert json.loads(run.summary_path.read_text())["base"] == {"greedy": {"m": 0.1}}
    with RunDirectory.open(tmp_path / "runs" / "first") as run:
        assert run.store_url == f"sqlite:///{tmp_path}/runs/first/store.sqlite"


@pytest.mark.parametrize(("umask", "shared"), [(0o022, 0o755), (0, 0o777), (0o077, 0o700)])
def test_a_run_is_its_owners_alone_unless_it_is_shared(tmp_path, umask, shared):
    (tmp_path / "empty").mkdir(mode=0o755)
    before = os.umask(umask)
    try:
        modes = []
        for place in (RunPlace(dir=str(tmp_path), name="new"), RunPlace(dir=str(tmp_path), name="empty")):
            run, _ = open_run(place, kind="run", label="x")
            with run:
                modes.append(run.path.stat().st_mode & 0o777)
        run, _ = open_run(RunPlace(dir=str(tmp_path), name="shared", shared=True), kind="sft", label="x")
        with run, StoreWriter(run.store_url, "shared"):
            assert run.path.stat().st_mode & 0o777 == shared, "the control"
    finally:
        os.umask(before)
    assert modes == [0o700, 0o700]


def test_any_name_of_the_folder_leads_to_the_store(tmp_path):
    folder = tmp_path / "50% of #1? a & b=c @ x:y"
    with RunDirectory.create(folder, "first") as run, StoreWriter(run.store_url, "first") as store:
        store.event("info", "x", "here")
    assert run.store_path.is_file() and [path.name for path in tmp_path.iterdir()] == [folder.name]
    engine = open_engine(RunDirectory(run.path).store_url, create=False)
    assert [event["text"] for event in list_events(engine, "first")] == ["here"]
    engine.dispose()


def test_a_run_is_told_from_others_of_its_name(tmp_path):
    runs = [RunDirectory.create(tmp_path / folder, "same") for folder in ("a", "b")]
    identities = [run.identity for run in runs]
    assert len(set(identities)) == 2 and all(len(identity) == 36 for identity in identities)
    for run in runs:
        run.write_config("{}")
        run.close()
    with RunDirectory.open(runs[0].path) as again:
        assert again.identity == identities[0]
    (tmp_path / "b" / "same" / "run.uuid").unlink()  # as an earlier Unmask made it
    with RunDirectory.open(runs[1].path) as old:
        assert old.identity == ""


def test_a_run_without_a_name_gets_one_of_its_own(tmp_path):
    ids = []
    for _ in range(3):
        with RunDirectory.create(tmp_path, label="my recipe/../sudoku") as run:
            ids.append(run.id)
    assert len(set(ids)) == 3 and names(tmp_path) == sorted(ids)
    assert all("-my-recipe-..-sudoku-" in name for name in ids)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x" * 101])
def test_names_that_are_no_folder_names_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="not usable"):
        RunDirectory.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_a_taken_name_and_a_missing_run_are_refused(tmp_path):
    with RunDirectory.create(tmp_path, "x") as run:
        run.metrics_path.write_text('{"iteration": 1, "loss": 0.5}\n')
    with pytest.raises(ConfigError, match="exists already"):
        RunDirectory.create(tmp_path, "x")
    with pytest.raises(ConfigError, match="no run at"):
        RunDirectory.open(tmp_path / "y")


def test_a_name_is_used_up_by_its_first_iteration(tmp_path):
    """What a full disk, a mistyped task or a base that can't be built leave is taken over."""
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    with open_run(RunPlace(dir=str(tmp_path), name="half", resume="auto"), kind="run", label="x")[0] as run:
        assert run.is_new
    with RunDirectory.create(tmp_path, "x") as run:
        run.write_config("{}")
        run.metrics_path.write_text('{"iteration": 0, "eval/m/solve_rate": 0.5}\n')
        identity = run.identity
        with pytest.raises(ConfigError, match="is being written by"):
            RunDirectory.create(tmp_path, "x")
    with RunDirectory.create(tmp_path, "x") as run:
        assert run.identity == identity, "its store knows it by this"
    (run.checkpoints_dir / "iteration-000001").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        RunDirectory.create(tmp_path, "x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        RunDirectory.create(tmp_path, "foreign")
    assert names(tmp_path / "foreign") == ["thesis.txt"]


def test_a_new_run_that_never_began_leaves_no_folder(tmp_path):
    for begun in (False, True):
        with RunDirectory.create(tmp_path, "x") as run:
            if begun:
                run.write_config("{}")
            run.remove_unless_begun()
            assert run.path.exists() == begun
    with RunDirectory.create(tmp_path, "y") as run:
        (run.samples_dir / "mine.txt").touch()
        run.remove_unless_begun()
    assert (run.samples_dir / "mine.txt").exists()


def test_two_writers_are_one_too_many(tmp_path):
    run = RunDirectory.create(tmp_path, "x")
    run.write_config("{}")
    with pytest.raises(ConfigError, match=f"written by process {os.getpid()} on "):
        RunDirectory.open(run.path)
    run.close()
    RunDirectory.open(run.path).close()  # the control: refused above for the lock alone


HOLD = """
import sys, time
from learner.runs.directory import RunDirectory
from learner.runs.start import open_run
from learner.settings.sections import RunPlace
run = RunDirectory.open(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    run = RunDirectory.create(tmp_path, "x")
    run.write_config("{}")
    run.close()
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            RunDirectory.open(run.path)
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie: its pid exists
        RunDirectory.open(run.path).close()


def test_open_clears_what_a_killed_writer_left(tmp_path):
    run = RunDirectory.create(tmp_path, "x")
    run.write_config("{}")
    (run.checkpoints_dir / ".000004.tmp-1-abcd").mkdir()
    (run.path / ".summary.json.tmp-1-abcd").write_text("{")
    (run.checkpoints_dir / "000003").mkdir()
    (run.path / ".adapter.old").mkdir()
    run.close()
    with RunDirectory.open(run.path):
        assert names(run.checkpoints_dir) == ["000003"] and run.adapter_dir.is_dir()
        assert not list(run.path.glob(".*"))


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    atomic_write_text(path, "old")
    atomic_write_text(path, "new \N{SNOWMAN}")
    assert path.read_text(encoding="utf-8") == "new \N{SNOWMAN}" and names(tmp_path) == ["summary.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "adapter"
    for content in ("old", "new"):
        with atomic_dir(path) as folder:
            assert not path.exists() or (path / "file").read_text() == "old"
            (folder / "file").write_text(content)
    assert (path / "file").read_text() == "new" and names(path.parent) == ["adapter"]


def test_a_block_that_raises_leaves_the_old_folder(tmp_path):
    path = tmp_path / "adapter"
    with atomic_dir(path) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(WaitTimeout, match="mine"), atomic_dir(path) as folder:  # an OSError too, but one of ours
        (folder / "file").write_text("half")
        raise WaitTimeout("mine")
    assert (path / "file").read_text() == "old" and names(tmp_path) == ["adapter"]


def test_a_replacement_cut_in_two_is_put_right(tmp_path):
    path, old = tmp_path / "adapter", tmp_path / ".adapter.old"
    old.mkdir()
    (old / "file").write_text("old")
    recover_replaced(path)  # cut between the renames: the old content comes back
    assert (path / "file").read_text() == "old" and not old.exists()
    old.mkdir()
    recover_replaced(path)  # cut after them: the new content stays
    assert (path / "file").read_text() == "old" and names(tmp_path) == ["adapter"]
    (tmp_path / ".x.tmp-1-ab").write_text("half")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["adapter"]


def test_a_full_disk_is_one_sentence_and_keeps_the_old(tmp_path):
    path, folder_path = tmp_path / "summary.json", tmp_path / "checkpoint"
    atomic_write_text(path, "x" * 1000)
    with no_room():
        atomic_write_text(tmp_path / "small", "fits")  # the control: it is the size that fails
        with pytest.raises(UnmaskError, match=rf"cannot write {path}: File too large \(\d.*MiB free there\)"):
            atomic_write_text(path, "y" * 1000)
        with pytest.raises(UnmaskError, match=f"cannot write {folder_path}: "), atomic_dir(folder_path) as folder:
            save_file({"weight": np.zeros(1000, dtype=np.float32)}, folder / "adapter.safetensors")
    assert path.read_text() == "x" * 1000 and names(tmp_path) == ["small", "summary.json"]
