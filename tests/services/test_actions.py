"""The inbox of a run: what is asked for, taken, settled, expired and refused. On SQLite and on PostgreSQL."""

import contextlib
import queue
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from services.store import actions, schema
from services.store.actions import Action, Inbox
from services.store.reader import Reader
from services.store.writer import StoreWriter
from tests.support.real_runs import wait_until

LIMIT_S = 30.0


@pytest.fixture
def engine(store_url: str) -> Iterator[sa.Engine]:
    """Of a store with one live run, r."""
    with StoreWriter(store_url, "r", task="t", objective="o", total_iterations=3):
        opened = schema.open_engine(store_url, create=False)
        yield opened
        opened.dispose()


@contextlib.contextmanager
def inbox(store_url: str, *, since: float | None = None) -> Iterator[tuple[Inbox, "queue.SimpleQueue[Action]"]]:
    """The controller's side, and what it has taken."""
    taken: queue.SimpleQueue[Action] = queue.SimpleQueue()
    opened = Inbox(store_url, "r", since=time.time() if since is None else since, on_action=taken.put)
    try:
        yield opened, taken
    finally:
        opened.close(LIMIT_S)


def now(engine: sa.Engine, action: Action) -> Action:
    found = actions.find(Reader(engine).select, action.id, run_id="r")
    assert found is not None
    return found


def change(engine: sa.Engine, table: sa.Table, **values: object) -> None:
    with engine.begin() as connection:
        connection.execute(table.update().values(**values))


def test_action_is_taken_once_and_settled_by_who_took_it(engine: sa.Engine, store_url: str) -> None:
    with inbox(store_url) as (controller, taken):
        asked = actions.request(engine, "r", "set_actors", {"actors": 3}, "somebody")
        assert (asked.status, asked.result, asked.decided) == ("requested", None, None)
        action = taken.get(timeout=LIMIT_S)
        assert (action.id, action.action, action.arguments, action.requested_by) == (
            asked.id,
            "set_actors",
            {"actors": 3},
            "somebody",
        )
        assert now(engine, asked).status == "accepted", "it is not done before the controller says so"
        controller.settle(asked.id, "done", "3 actors")
        wait_until(lambda: now(engine, asked).status == "done", "the confirmation", LIMIT_S)
        assert now(engine, asked).result == "3 actors"
        assert not actions.settle(engine, asked.id, "refused", "changed my mind"), "what is over stays as it is"
        time.sleep(2 * actions.POLL_S)
        assert taken.empty(), "taken twice"


def test_what_was_asked_of_an_earlier_process_expires(engine: sa.Engine, store_url: str) -> None:
    waiting, begun = (actions.request(engine, "r", "stop", {}, "somebody") for _ in range(2))
    with engine.begin() as connection:
        table = schema.actions
        connection.execute(table.update().where(table.c.id == begun.id).values(status="accepted"))
    with inbox(store_url) as (_, taken):
        wait_until(lambda: now(engine, waiting).status == "expired", "its end", LIMIT_S)
        assert now(engine, begun).status == "expired"
        assert now(engine, begun).result == "the run was started again before it was done"
        assert taken.empty()
        assert actions.request(engine, "r", "pause", {}, "somebody").status == "requested"
        assert taken.get(timeout=LIMIT_S).action == "pause", "the control: what comes later is taken"


def test_what_nobody_takes_expires(engine: sa.Engine, store_url: str) -> None:
    asked = actions.request(engine, "r", "pause", {}, "somebody")
    assert now(engine, asked).status == "requested"
    change(engine, schema.actions, time=schema.actions.c.time - actions.LIFETIME_S - 10)
    shown = now(engine, asked)
    assert (shown.status, shown.result) == ("expired", "no process of the run took it within 60 s")
    with inbox(store_url, since=0.0) as (_, taken):  # the process was there all the time, and came too late
        wait_until(lambda: now(engine, asked).result == "the run did not take it in time", "its end", LIMIT_S)
        assert taken.empty()


def test_accepted_action_of_a_run_that_fell_silent_is_over(engine: sa.Engine, store_url: str) -> None:
    with inbox(store_url) as (_, taken):
        asked = actions.request(engine, "r", "pause", {}, "somebody")
        taken.get(timeout=LIMIT_S)
    assert now(engine, asked).status == "accepted", "a moment's silence is none"
    change(engine, schema.runs, heartbeat=time.time() - actions.SILENT_AFTER_S - 10)
    assert now(engine, asked).status == "expired"
    change(engine, schema.runs, heartbeat=time.time())
    assert now(engine, asked).status == "accepted", "it had only been cut off"


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_run_that_is_over_refuses_at_once(engine: sa.Engine, status: str) -> None:
    change(engine, schema.runs, status=status, ended=time.time())
    asked = actions.request(engine, "r", "resume", {}, "somebody")
    assert (asked.status, asked.result) == ("refused", f"the run is over ({status})")
    assert now(engine, asked) == asked, "the trail has it"


def test_silent_and_unknown_runs_refuse_at_once(engine: sa.Engine) -> None:
    change(engine, schema.runs, heartbeat=time.time() - 90)
    silent = actions.request(engine, "r", "resume", {}, "somebody")
    assert silent.status == "refused" and "no sign of life for 90 s" in (silent.result or "")
    assert actions.request(engine, "s", "resume", {}, "somebody").status == "refused"


def test_trail_comes_newest_first_in_pages(engine: sa.Engine) -> None:
    asked = [actions.request(engine, "r", "pause", {}, f"somebody {number}") for number in range(5)]
    read = Reader(engine).select
    first = actions.newest(read, run_id="r", limit=3)
    rest = actions.newest(read, run_id="r", limit=3, before_id=first[-1].id)
    assert [each.id for each in first + rest] == [each.id for each in reversed(asked)]
    assert actions.newest(read, run_id=None, limit=3) == []
    assert actions.open_requests(read, "r") == 5


def test_locked_store_holds_no_caller_up(engine: sa.Engine, store_url: str) -> None:
    """The outcome waits in the inbox's thread and is written when the store is free again."""
    with inbox(store_url) as (controller, taken):
        asked = actions.request(engine, "r", "pause", {}, "somebody")
        taken.get(timeout=LIMIT_S)
        locker = schema.open_engine(store_url, create=False)
        with locker.connect() as connection:
            table = schema.actions
            connection.execute(table.update().where(table.c.id == asked.id).values(action="pause"))
            controller.settle(asked.id, "done", "paused")  # returns: else this test would hang
            time.sleep(2 * actions.POLL_S)
            assert now(engine, asked).status == "accepted", "the control: it was written past the lock"
            connection.rollback()
        locker.dispose()
        wait_until(lambda: now(engine, asked).status == "done", "the outcome", LIMIT_S)
