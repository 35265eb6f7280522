"""A run that was killed, disturbed or stopped gives the numbers of one that nothing happened to, bit for bit.

Compared are the rows of metrics.jsonl, times and machine figures aside, the final adapter's digest and the summary.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from learner.runs.directory import RunDirectory
from learner.settings.run import load_dumped
from rollout.adapters import digest, read_peft_folder
from tests.support.real_runs import (
    LEDGER_STATES,
    Runs,
    StartedRun,
    adapter_digest,
    assert_ledger_balances,
    iterations,
    newest_state,
    rows,
    saved_iterations,
    send,
    store_events,
    store_status,
    summary,
    training_rows,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(1200)]


def assert_same_run(run_dir: RunDirectory, other: RunDirectory) -> None:
    assert rows(run_dir) == rows(other)
    assert adapter_digest(run_dir) == adapter_digest(other)
    assert summary(run_dir) == summary(other)


def copy_of(run_dir: RunDirectory, name: str) -> RunDirectory:
    """The run under another name: what a process that was killed right after its last checkpoint would leave."""
    copied = RunDirectory(run_dir.path.with_name(name))
    shutil.copytree(run_dir.path, copied.path)
    (copied.path / "store.sqlite").unlink()  # it holds the run by its old name
    return copied


# ---- SIGKILL


def test_run_killed_twice_repeats_the_undisturbed_one(runs: Runs, undisturbed: RunDirectory) -> None:
    run_dir = runs["killed"]
    with runs.started("killed", "checkpoint.every=3") as run:
        run.wait_for_row(1)
        assert run.actors() and run.ranks()
        os.killpg(run.popen.pid, signal.SIGKILL)  # the controller and all of its Ray
        wait_until(lambda: not run.members(), "the end of all processes", 30)
    assert run.wait() == -signal.SIGKILL
    assert saved_iterations(run_dir) == [], "too late: its first checkpoint is written"

    with runs.started("killed", "checkpoint.every=3", "resume=auto") as run:
        run.wait_for_row(4)
        os.kill(run.popen.pid, signal.SIGKILL)  # this time the controller alone, as the kernel's OOM killer does
        wait_until(lambda: not run.working(), "the end of the dead controller's actors and ranks", 60)
    assert run.wait() == -signal.SIGKILL
    assert "no checkpoint" in run.output() and "from the start" in run.output()
    assert iterations(run_dir)[-1] in (4, 5) and saved_iterations(run_dir) == [3], "not between two checkpoints"
    assert not run_dir.summary_path.exists()

    output = runs.train("killed", "checkpoint.every=3", "resume=auto")
    assert "goes on after iteration 3" in output
    assert_same_run(run_dir, undisturbed)
    assert_ledger_balances(run_dir)
    assert store_status(run_dir) == ("finished", 3)


def test_rollout_actor_killed_over_its_work(runs: Runs, undisturbed: RunDirectory) -> None:
    with runs.started("actor", "rollout.actors=2") as run:
        run.wait_for_row(2)  # its actors are there
        victim = stall(run)
        send(signal.SIGKILL, [victim])
        assert run.wait() == 0, run.output()
    assert_same_run(runs["actor"], undisturbed)
    assert_ledger_balances(runs["actor"])
    last = training_rows(runs["actor"])[-1]
    assert last["machine/ledger_failed"] == 1 and last["machine/ledger_relet"] == 1, "it held no lease"
    assert training_rows(undisturbed)[-1]["machine/ledger_failed"] == 0
    assert [event["text"] for event in store_events(runs["actor"]) if event["kind"] == "fault"], "nothing was reported"


@pytest.mark.heavy
def test_a_straggler_s_lease_is_given_a_second_time(runs: Runs, undisturbed: RunDirectory) -> None:
    more = ("rollout.actors=2", "rollout.second_lease_after_s=6", "timeouts.heartbeat=240")
    with runs.started("straggler", *more) as run:
        run.wait_for_row(2)
        stall(run)  # longer than its lease needs, and shorter than what counts as hung
        assert run.wait() == 0, run.output()
    assert_same_run(runs["straggler"], undisturbed)
    assert_ledger_balances(runs["straggler"])
    last = training_rows(runs["straggler"])[-1]
    assert last["machine/ledger_second"] >= 1 and last["machine/ledger_failed"] == 0
    assert training_rows(undisturbed)[-1]["machine/ledger_second"] == 0


def stall(run: StartedRun) -> int:
    """Stop the first rollout actor when the run can't go on without the lease that it holds, or is given."""
    victim = run.actors()[0]
    for row in (3, 5):  # after an even row comes an evaluation, whose chunks are no leases
        run.wait_for_row(row)
        send(signal.SIGSTOP, [victim])
        run.wait_for("a standstill", lambda: stands_still(run))
        if iterations(run.dir)[-1] == row:
            return victim
        send(signal.SIGCONT, [victim])
    raise AssertionError(f"{run.dir.id} never stood still over a lease")


def stands_still(run: StartedRun) -> bool:
    before = iterations(run.dir)
    time.sleep(2.0)  # ten times what an iteration takes, on a machine that is not busy
    return iterations(run.dir) == before


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (signal.SIGKILL, "died"),
        pytest.param(signal.SIGSEGV, "died", marks=pytest.mark.heavy),
        pytest.param(signal.SIGSTOP, "hung", marks=pytest.mark.heavy),
    ],
)
def test_a_lost_learner_rank_costs_an_iteration_and_no_bit(
    runs: Runs, undisturbed: RunDirectory, how: signal.Signals, cause: str
) -> None:
    name = f"rank-{how.name.lower()}"
    with runs.started(name, "timeouts.heartbeat=5") as run:
        run.wait_for_row(2)
        (before,) = run.ranks()
        send(how, [before])
        assert run.wait() == 0, run.output()
        assert "Traceback" not in run.output()
    assert_same_run(runs[name], undisturbed)
    assert_ledger_balances(runs[name])
    (fault,) = [event for event in store_events(runs[name]) if event["kind"] == "fault"]
    assert fault["data"]["part"] == "rank" and fault["data"]["cause"] == cause and fault["data"]["iterations"] == 1
    assert store_status(runs[name]) == ("finished", 1)


@pytest.mark.heavy
def test_ranks_that_are_lost_time_and_again_end_the_run_which_can_be_resumed(
    runs: Runs, undisturbed: RunDirectory
) -> None:
    with runs.started("ranks-gone", "checkpoint.every=100") as run:
        run.wait_for_row(2)
        killed: set[int] = set()
        deadline = time.monotonic() + 300
        while run.popen.poll() is None and time.monotonic() < deadline:
            send(signal.SIGKILL, new := [pid for pid in run.ranks() if pid not in killed])
            killed |= set(new)
            time.sleep(0.2)
        assert run.wait() == 1, run.output()
    assert "ranks were lost 4 times in a row" in run.output() and "Traceback" not in run.output()
    assert len(killed) == 4
    assert store_status(runs["ranks-gone"]) == ("failed", 1)
    assert saved_iterations(runs["ranks-gone"]) == [iterations(runs["ranks-gone"])[-1]], "what was learned is kept"
    runs.train("ranks-gone", "resume=auto")
    assert rows(runs["ranks-gone"]) == rows(undisturbed)


@pytest.mark.heavy
def test_asynchronous_run_killed_goes_on_within_its_bounds(runs: Runs) -> None:
    run_dir, settings = runs["async"], ("rollout.max_staleness=1", "checkpoint.every=2")
    with runs.started("async", *settings) as run:
        run.wait_for_row(3)
        os.killpg(run.popen.pid, signal.SIGKILL)
    (issued_ahead,) = {chunk["iteration"] for chunk in newest_state(run_dir)["ledger"]["chunks"]}
    assert issued_ahead == 2, "nothing was under way for the iteration after the checkpoint's"
    runs.train("async", *settings, "resume=auto")
    reported = training_rows(run_dir)
    assert [row["iteration"] for row in reported] == [1, 2, 3, 4, 5, 6]
    assert reported[0]["staleness/max"] == 0
    assert max(row["staleness/max"] for row in reported) == 1, "no rollout overlapped an update"
    for row in reported:
        assert 0 <= row["staleness/mean"] <= row["staleness/max"] <= 1
        assert row["ledger/issued"] == sum(row[f"ledger/{state}"] for state in LEDGER_STATES)
        assert row["ledger/consumed"] == 4 * row["iteration"]
        assert ("log_ratio/unupdated_abs_max" in row) == (row["staleness/max"] == 0)


# ---- asked to stop


@pytest.mark.parametrize("signum, to_all", [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["term", "ctrl-c"])
def test_stopped_run_saves_its_last_iteration_and_goes_on(
    runs: Runs, undisturbed: RunDirectory, signum: signal.Signals, to_all: bool
) -> None:
    name = f"stopped-{signum.name}"
    run_dir = runs[name]
    with runs.started(name, "checkpoint.every=4") as run:
        run.wait_for_row(2)
        if to_all:  # a terminal sends Ctrl-C to the whole foreground group
            os.killpg(run.popen.pid, signum)
        else:
            run.popen.send_signal(signum)
        asked, under_way = time.monotonic(), iterations(run_dir)[-1] + 1
        assert run.wait() == 128 + signum, run.output()
        assert time.monotonic() - asked < load_dumped(run_dir.config_path).timeouts.stop + 20
        wait_until(lambda: not run.members(), "the end of its Ray", 30)
    done = iterations(run_dir)[-1]
    assert done <= under_way, "it went on after it was asked to stop"
    assert saved_iterations(run_dir) == [done] and newest_state(run_dir)["iteration"] == done
    assert store_status(run_dir) == ("stopped", 1)
    assert f"asked to stop by {signum.name}" in run.output() and "Traceback" not in run.output()
    assert summary(run_dir)["iterations"] == done
    if not to_all:
        runs.train(name, "checkpoint.every=4", "resume=auto")
        assert_same_run(run_dir, undisturbed)
        assert store_status(run_dir) == ("finished", 2)


@pytest.mark.parametrize("awaited", ["update", "evaluation"])
@pytest.mark.heavy
def test_stopped_run_does_not_wait_longer_than_it_was_told(runs: Runs, undisturbed: RunDirectory, awaited: str) -> None:
    name = f"impatient-{awaited}"
    run_dir = runs[name]
    with runs.started(name, "timeouts.stop=2") as run:
        run.wait_for_row(2)  # an evaluation comes next
        stopped = run.ranks() if awaited == "update" else run.actors()
        send(signal.SIGSTOP, stopped)
        run.wait_for("a standstill", lambda: stands_still(run))
        run.popen.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM, run.output()
    assert "Traceback" not in run.output()
    done, saved = iterations(run_dir)[-1], newest_state(run_dir)["iteration"]
    assert saved >= done - 1, "a checkpoint's worth of work was lost, and this run saves every iteration"
    assert f"resume=auto will go on after iteration {saved}" in run.output()
    if awaited == "evaluation":  # the resumed run makes up for it
        runs.train(name, "resume=auto")
        assert_same_run(run_dir, undisturbed)


@pytest.mark.heavy
def test_stopped_before_there_is_anything_to_save(runs: Runs) -> None:
    with runs.started("too-early", "model.base.sft_steps=5000") as run:
        run.wait_for("progress of the base", lambda: "base: step" in run.output())
        run.popen.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in run.output() and "Traceback" not in run.output()
    assert store_status(runs["too-early"]) == ("stopped", 1)


@pytest.mark.heavy
def test_stopped_while_ranks_start(runs: Runs) -> None:
    """Patience is over before there is a controller."""
    with runs.started("not-yet", "timeouts.stop=0.1") as run:
        run.wait_for("a rank", lambda: bool(run.ranks()))
        send(signal.SIGSTOP, run.ranks())
        run.popen.terminate()
        assert run.wait(60) == 128 + signal.SIGTERM, run.output()
    assert "asked to stop by SIGTERM while the run's processes were starting" in run.output()
    assert "Traceback" not in run.output()
    assert store_status(runs["not-yet"]) == ("stopped", 1)


@pytest.mark.heavy
def test_renamed_run_goes_on_as_the_same_run(runs: Runs, undisturbed: RunDirectory) -> None:
    runs.train("old-name", "run.iterations=4")
    begun = store_events(runs["old-name"])
    runs["old-name"].path.rename(runs["new-name"].path)
    runs.train("new-name", "resume=auto")
    assert_same_run(runs["new-name"], undisturbed)
    assert store_status(runs["new-name"]) == ("finished", 2), "one run in its store, and only one"
    told = store_events(runs["new-name"])
    assert told[: len(begun)] == [{**event, "run_id": "new-name"} for event in begun]
    assert "renamed" in [event["kind"] for event in told]


# ---- damage, other settings


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_taken(runs: Runs, undisturbed: RunDirectory) -> None:
    run_dir = copy_of(undisturbed, "damaged")
    newest = run_dir.checkpoints_dir / "iteration-000006"
    shard = newest / "optimizer-0000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    output = runs.train("damaged", "resume=auto")
    assert f"warning: {shard} is damaged" in output
    assert "goes on after iteration 5" in output
    assert_same_run(run_dir, undisturbed)


@pytest.mark.heavy
def test_going_back_with_another_setting_says_so_and_is_another_future(runs: Runs, undisturbed: RunDirectory) -> None:
    """The control of the tests above: the comparison sees it. And the old iteration 6 must not pass for the newest."""
    run_dir = copy_of(undisturbed, "back")
    from_four = run_dir.checkpoints_dir / "iteration-000004"
    output = runs.train("back", "learner.lr=0.002", "run.iterations=5", f"resume={from_four}")
    assert "resumed with another setting: learner.lr: 0.001 -> 0.002" in output
    assert load_dumped(run_dir.config_path).learner.lr == 0.002
    assert iterations(run_dir) == [1, 2, 3, 4, 5]
    old, new = ([{**row, "lr": None} for row in rows(each)] for each in (undisturbed, run_dir))
    shared = [row for row in old if row["iteration"] <= 4]
    assert new[: len(shared)] == shared
    assert saved_iterations(undisturbed) == [4, 5, 6] and saved_iterations(run_dir) == [4, 5]
    old_fifth = read_peft_folder(undisturbed.checkpoints_dir / "iteration-000005" / "adapter")[0]
    assert adapter_digest(run_dir) != digest(old_fifth)


def test_resuming_where_there_is_no_good_checkpoint_is_refused(runs: Runs, undisturbed: RunDirectory) -> None:
    run_dir = copy_of(undisturbed, "hopeless")
    for manifest in Path(run_dir.checkpoints_dir).glob("*/manifest.json"):
        manifest.write_text("{")
    output = runs.train("hopeless", "resume=auto", status=1)
    assert "has no good checkpoint" in output and "Traceback" not in output
    assert output.count("warning:") == len(saved_iterations(run_dir))
    assert json.loads(undisturbed.summary_path.read_text()) == json.loads(run_dir.summary_path.read_text())


def everything_in(run_dir: RunDirectory) -> dict[str, str]:
    """Digest of every file of a run."""
    files = (path for path in sorted(run_dir.path.rglob("*")) if path.is_file())
    return {str(path.relative_to(run_dir.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_resume_that_is_refused_touches_nothing(runs: Runs, undisturbed: RunDirectory) -> None:
    run_dir = copy_of(undisturbed, "refused")
    before = everything_in(run_dir)
    older = f"run.resume={run_dir.checkpoints_dir / 'iteration-000004'}"
    for settings, fragment, status in (
        (("learner.ranks=2",), "learner.ranks=1, this run has 2", 1),
        (("run.seed=7",), "run.seed=7 would make refused another run", 2),
        (("resources.ray_address=127.0.0.1:1",), "no Ray answers at 127.0.0.1:1", 2),
    ):
        told = runs.train("refused", older, "run.iterations=9", *settings, status=status)
        assert fragment in told and "Traceback" not in told
        assert everything_in(run_dir) == before
    told = runs.train("refused", "resume=auto")  # finished, and to go on with nothing but what is named
    assert "has done 6 iterations, all of the 6" in told and "run.iterations=12" in told and "Ray" not in told
    assert everything_in(run_dir) == before


@pytest.mark.heavy
def test_a_resume_that_dies_before_its_first_checkpoint_is_undone(runs: Runs, undisturbed: RunDirectory) -> None:
    run_dir = copy_of(undisturbed, "undone")
    before = everything_in(run_dir)
    older = f"run.resume={run_dir.checkpoints_dir / 'iteration-000004'}"
    with runs.started("undone", older, "learner.lr=0.002", "checkpoint.every=50", "run.iterations=40") as run:
        run.wait_for("its first iteration", lambda: load_dumped(run_dir.config_path).learner.lr == 0.002)
        os.killpg(run.popen.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert saved_iterations(run_dir) == [4]
    told = runs.train("undone", "resume=auto")
    assert "the resume after iteration 4 ended before its first checkpoint and is undone" in told
    assert "has done 6 iterations" in told
    after = everything_in(run_dir)
    others = {"starts.jsonl", "run.uuid"}  # a copy beside its original is a run of its own from its first start on
    assert {name: after[name] for name in before if name not in others} == {
        name: digest for name, digest in before.items() if name not in others
    }
    starts = [json.loads(line) for line in (run_dir.path / "starts.jsonl").read_text().splitlines()]
    assert [start["goes_on_after"] for start in starts] == [None, 4]
    assert "learner.lr: 0.001 -> 0.002" in starts[1]["changes"] and starts[0]["recipe"] == "smoke"
    assert starts[0]["versions"]["torch"] and starts[0]["machine"]["cpus"] and "recipe=smoke" in starts[0]["command"]
