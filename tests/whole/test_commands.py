"""What a run is asked to do while it runs: confirmed by the run itself, and without another bit in what it computes."""

import contextlib
import signal
import sqlite3
import time
from typing import Any

import pytest
import sqlalchemy as sa

from learner.runs.directory import RunDirectory
from services.store import schema
from services.store.reader import Reader
from tests.support.actions import answer, ask, run_row, store
from tests.support.real_runs import Runs, iterations, saved_iterations, send, wait_until
from tests.whole.test_resume import assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(1200)]

SETTINGS = ("recipe=smoke", "run.iterations=24", "checkpoint.every=100", "rollout.actors=1")


@pytest.fixture(scope="module")
def long_runs(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Long enough to be asked for something in the middle."""
    return Runs(tmp_path_factory.mktemp("asked"), runs.cache, settings=SETTINGS)


@pytest.fixture(scope="module")
def left_alone(long_runs: Runs) -> RunDirectory:
    long_runs.train("left-alone")
    return long_runs["left-alone"]


def test_paused_resized_saved_and_resumed_run_has_the_same_bits(long_runs: Runs, left_alone: RunDirectory) -> None:
    with long_runs.started("asked", "rollout.actors=2", "rollout.max_actors=3") as run:
        run.wait_for_row(1)
        paused = answer(run, "pause")
        at = iterations(run.dir)[-1]
        assert (paused.status, paused.result) == ("done", f"paused after iteration {at}"), paused
        assert at < 24, "too late: the run is over"
        wait_until(lambda: run_row(run.dir)["status"] == "paused", "the status", 30)
        assert run_row(run.dir)["ended"] is None
        heartbeat = run_row(run.dir)["heartbeat"]

        assert answer(run, "pause").result == "the run is paused already"
        assert saved_iterations(run.dir) == []
        saved = answer(run, "checkpoint")
        assert (saved.status, saved.result) == ("done", f"saved after iteration {at}")
        assert saved_iterations(run.dir) == [at]

        assert len(run.actors()) == 2
        fewer = answer(run, "set_actors", actors=1)
        assert (fewer.status, fewer.result) == ("done", "now 1, before 2")
        wait_until(lambda: len(run.actors()) == 1, "the end of an actor", 30)
        more = answer(run, "set_actors", actors=3)
        assert (more.status, more.result) == ("done", "now 3, before 1")
        assert len(run.actors()) == 3
        too_many = answer(run, "set_actors", actors=4)
        assert too_many.status == "refused" and "it stays at 3" in too_many.result and "max_actors=4" in too_many.result
        none = answer(run, "set_actors", actors=0)
        assert none.status == "refused" and "at least 1" in none.result
        assert len(run.actors()) == 3
        unknown = answer(run, "dance")
        assert unknown.status == "refused" and "can't dance" in unknown.result

        wait_until(lambda: run_row(run.dir)["heartbeat"] > heartbeat, "a sign of life of a paused run", 30)
        assert iterations(run.dir)[-1] == at, "it went on while it was paused"
        resumed = answer(run, "resume")
        assert (resumed.status, resumed.result) == ("done", f"goes on with iteration {at + 1}")
        assert answer(run, "set_actors", actors=1).status == "done", "while actors work"
        assert run.wait() == 0, run.output()
    assert_same_run(run.dir, left_alone)
    assert run_row(run.dir)["status"] == "finished"
    over = ask(run.dir, "pause")
    assert (over.status, over.result) == ("refused", "the run is over (finished)")


@pytest.mark.heavy
def test_stopped_run_confirms_saves_and_does_not_hear_old_requests_again(
    long_runs: Runs, left_alone: RunDirectory
) -> None:
    with long_runs.started("stopped") as run:
        run.wait_for_row(1)
        assert answer(run, "resume").result == "the run is not paused"
        stopped = answer(run, "stop")
        assert run.wait() == 128 + signal.SIGTERM, run.output()
    at = iterations(run.dir)[-1]
    assert (stopped.status, stopped.result) == ("done", f"stopped after iteration {at}; resume=auto goes on there")
    assert saved_iterations(run.dir) == [at] and at < 24
    assert run_row(run.dir)["status"] == "stopped"

    # What somebody asked for between two lives of the run: written past the check that refuses it.
    with store(run.dir) as engine, engine.begin() as connection:
        row = {"run_id": "stopped", "action": "stop", "arguments": {}, "requested_by": "a ghost", "time": time.time()}
        connection.execute(schema.actions.insert().values(row | {"status": "requested"}))
    output = long_runs.train("stopped", "resume=auto")
    assert f"goes on after iteration {at}" in output
    assert_same_run(run.dir, left_alone)
    with store(run.dir) as engine, engine.connect() as connection:
        ghost = connection.execute(sa.select(schema.actions).where(schema.actions.c.requested_by == "a ghost")).one()
    assert (ghost.status, ghost.result) == ("expired", "the run was started again before it was done")


@pytest.mark.heavy
def test_stuck_workers_are_told_and_a_locked_store_holds_nothing_up(long_runs: Runs, left_alone: RunDirectory) -> None:
    """The run goes on while its store is locked, and hears again when it is free. While it waits for its workers, it
    tells of them."""
    with long_runs.started("locked") as run:
        run.wait_for_row(1)
        for role, processes in (("learner", run.ranks()), ("rollout", run.actors())):
            send(signal.SIGSTOP, processes)
            first = told_at_work(run.dir, role)
            again = told_at_work(run.dir, role, after=first["data"]["told"])
            assert first["heartbeat"] <= first["data"]["since"] < first["data"]["told"] < again["data"]["told"]
            assert [again[key] for key in ("status", "heartbeat")] == ["busy", first["heartbeat"]], "nothing was heard"
            send(signal.SIGCONT, processes)
        with contextlib.closing(sqlite3.connect(run.dir.store_path, timeout=30)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            run.wait_for_row(iterations(run.dir)[-1] + 4)
            connection.rollback()
        assert answer(run, "checkpoint").status == "done"
        assert run.wait() == 0, run.output()
    assert_same_run(run.dir, left_alone)


def told_at_work(run_dir: RunDirectory, role: str, *, after: float = 0.0) -> dict[str, Any]:
    """What the run tells of its worker of that role, later than ``after`` and while it works."""
    found: dict[str, Any] = {}

    def there() -> bool:
        with store(run_dir) as engine:
            found.update({row["role"]: row for row in Reader(engine).workers(run_dir.id)})
        data = found[role]["data"] if role in found else {}
        return bool(data.get("doing")) and data["told"] > after

    wait_until(there, f"news of the {role} worker", 120)
    return found[role]
