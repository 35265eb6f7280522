"""A run grows to a node that is added. Then that node's network is cut for a while, and after it the ranks' node's."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from learner.runs.directory import RunDirectory
from services.store.faults import FAULT
from services.store.reader import Reader
from tests.support.actions import answer, ask, run_row, store
from tests.support.cut_networks import CutNetwork
from tests.support.local_clusters import short_folder
from tests.support.real_runs import Runs, StartedRun, adapter_digest, assert_ledger_balances, rows, store_events

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(1200)]

SETTINGS = ("rollout.actors={min: 1, max: 2}", "timeouts.heartbeat=5")
CUT_S = 9.0
"""Longer than ``timeouts.heartbeat``, and shorter than Ray gives a node."""


def events(run: StartedRun, kind: str, **data: str) -> list[dict[str, Any]]:
    return [each for each in store_events(run.dir) if each["kind"] == kind and data.items() <= each["data"].items()]


def actors(run: StartedRun) -> list[dict[str, Any]]:
    """Those that have started, as the run told of them last."""
    with store(run.dir) as engine:
        found = Reader(engine).workers(run.dir.id)
    return [each for each in found if each["role"] == "rollout" and each["status"] in ("idle", "busy")]


@contextlib.contextmanager
def cut_for_a_while(net: CutNetwork, node: int) -> Iterator[None]:
    """As long as the block lasts, ``CUT_S`` at least."""
    began = time.monotonic()
    with net.cut(node):
        yield
        time.sleep(max(0.0, began + CUT_S - time.monotonic()))


def test_networks_that_are_cut_and_heal_cost_nothing_but_time(runs: Runs, undisturbed: RunDirectory) -> None:
    with contextlib.ExitStack() as stack:
        net = CutNetwork(stack.enter_context(short_folder()))
        stack.enter_context(net.up(0, 2))
        with net.inside():
            run = stack.enter_context(runs.started("cut", *SETTINGS, forked=False, **net.joining))
        run.wait_for("its start", lambda: run.dir.config_path.exists() and bool(events(run, "start")))
        assert answer(run, "pause").status == "done"
        assert len(actors(run)) == 1
        added = net.add_node(1)
        run.wait_for("an actor on the node that was added", lambda: len(actors(run)) == 2)
        assert len({each["data"]["node_id"] for each in actors(run)}) == 2

        assert answer(run, "resume").status == answer(run, "pause").status == "done"
        run.wait_for("work of both", lambda: all(each["policy_version"] is not None for each in actors(run)))
        assert not events(run, FAULT), "the control: nothing was cut so far"

        assert answer(run, "resume").status == "done"
        with cut_for_a_while(net, added):
            run.wait_for("an actor that hangs", lambda: bool(events(run, FAULT, part="actor", cause="hung")))
            ask(run.dir, "pause")
        run.wait_for("a new actor", lambda: run_row(run.dir)["status"] == "paused" and len(actors(run)) == 2)

        assert answer(run, "resume").status == "done"
        with cut_for_a_while(net, 1):
            run.wait_for("a rank that hangs", lambda: bool(events(run, "rank")))
        assert run.wait() == 0, run.output()
        assert events(run, FAULT, part="rank", cause="hung")
    assert rows(runs["cut"]) == rows(undisturbed)
    assert adapter_digest(runs["cut"]) == adapter_digest(undisturbed)
    assert_ledger_balances(runs["cut"])
