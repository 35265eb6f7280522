"""Asking a run for something as the dashboard does, and waiting for what its controller says."""

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from learner.runs.directory import RunDirectory
from services.store import actions, schema
from services.store.actions import Action
from services.store.reader import Reader
from tests.support.real_runs import StartedRun, wait_until

ANSWER_LIMIT_S = 240.0
OPEN = ("requested", "accepted")


@contextlib.contextmanager
def store(run_dir: RunDirectory) -> Iterator[sa.Engine]:
    engine = schema.open_engine(run_dir.store_url, create=False)
    try:
        yield engine
    finally:
        engine.dispose()


def ask(run_dir: RunDirectory, action: str, **arguments: Any) -> Action:
    with store(run_dir) as engine:
        return actions.request(engine, run_dir.id, action, arguments, "a test")


def now(run_dir: RunDirectory, action: Action) -> Action:
    with store(run_dir) as engine:
        found = actions.find(Reader(engine).select, action.id, run_id=run_dir.id)
    assert found is not None
    return found


def answer(run: StartedRun, action: str, **arguments: Any) -> Action:
    """The action as it ended."""
    asked = ask(run.dir, action, **arguments)
    assert asked.status == "requested", asked.result
    wait_until(lambda: now(run.dir, asked).status not in OPEN, f"an end of {action}", ANSWER_LIMIT_S)
    return now(run.dir, asked)


def run_row(run_dir: RunDirectory) -> dict[str, Any]:
    with store(run_dir) as engine:
        run = Reader(engine).run(run_dir.id)
    assert run is not None
    return run
