"""What the dashboard says of a run's workers: who works for it, who no longer does, and when each was heard from."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.browsers import watched
from tests.support.dashboards import Dashboard, Place, dashboard, eventually, writer


def counts(service: Dashboard, run: str) -> set[int]:
    """The number of workers, wherever it is told."""
    listed = {each["id"]: each["workers"] for each in service.api("runs")["items"]}
    return {listed[run], service.api(f"runs/{run}")["workers"]}


def test_retired_workers_are_shown_and_not_counted(place: Place) -> None:
    with writer(place, "shrinks") as store, dashboard(place) as service:
        for name in ("rollout-0", "rollout-1"):
            store.worker(name, role="rollout", status="idle")
        store.worker("learner-0", role="learner", status="ready")
        assert store.flush(20)
        eventually(lambda: counts(service, "shrinks") == {3})
        store.worker("rollout-1", role="rollout", status="retired")
        assert store.flush(20)
        eventually(lambda: counts(service, "shrinks") == {2})
        shown = {each["worker_id"]: each["status"] for each in service.api("runs/shrinks/workers")["items"]}
        assert shown == {"rollout-0": "idle", "rollout-1": "retired", "learner-0": "ready"}
        text = service.get("/metrics").text
        assert 'unmask_run_workers{role="rollout",run="shrinks",status="retired"} 1.0' in text
        assert 'unmask_run_workers{role="rollout",run="shrinks",status="idle"} 1.0' in text


@pytest.mark.slow
def test_workers_of_an_earlier_process_are_retired(place: Place) -> None:
    with writer(place, "resumed") as store:
        for name in ("rollout-0", "rollout-1"):
            store.worker(name, role="rollout", status="busy")
    with dashboard(place) as service:
        eventually(lambda: counts(service, "resumed") == {2})
        marker = service.api("runs/resumed")["marker"]
        with writer(place, "resumed") as store:
            eventually(lambda: counts(service, "resumed") == {0})
            assert service.api("runs/resumed")["marker"] != marker, "who follows the run is told"
            store.worker("rollout-0", role="rollout", status="busy")
            assert store.flush(20)
            eventually(lambda: counts(service, "resumed") == {1})


@pytest.mark.slow
def test_page_says_what_a_worker_does_and_when_it_was_heard_from(browser: Any, tmp_path: Path) -> None:
    with writer(tmp_path / "runs", "long") as store, dashboard(tmp_path / "runs") as service:
        now = time.time()
        work: dict[str, tuple[str, str, float, dict[str, Any]]] = {
            "learner-0": ("learner", "busy", 700, {"doing": "held_out", "since": now - 600, "told": now}),
            "rollout-0": ("rollout", "idle", 700, {"doing": None, "since": None, "told": now}),
            "rollout-1": ("rollout", "busy", 700, {"doing": "lease 7", "since": now - 600, "told": now - 300}),
            "rollout-2": ("rollout", "starting", 120, {"doing": "start", "since": now - 120, "told": now}),
            "rollout-3": ("rollout", "retired", 700, {"doing": None, "since": None, "told": now - 300}),
        }
        for name, (role, status, silent_s, data) in work.items():
            store.worker(name, role=role, status=status, node="here", heartbeat=now - silent_s, data=data)
        assert store.flush(20)
        with watched(browser, service.url) as page:
            page.open("/run/long/workers")
            page.shows("header .note", "3 rollout actors, 1 learner rank, 1 retired")
            for name, status, heard in [
                ("learner-0", "busy held out for 10 min", "11 min ago"),
                ("rollout-0", "idle", "11 min ago"),
                ("rollout-1", "busy lease 7 for 10 min", "11 min ago as the run told 5 min ago"),
                ("rollout-2", "starting start for 2 min", "–"),
                ("rollout-3", "retired", "11 min ago"),
            ]:
                cells = [page.shows(f"[data-worker={name}] [data-cell={cell}]") for cell in ("status", "heartbeat")]
                told = [" ".join(cell.inner_text().split()) for cell in cells]
                assert told[0].startswith(status) and told[1].startswith(heard), told  # seconds may follow
            assert page.page.locator("[data-silent=true]").count() == 1, "what the run has not told for a minute"


def test_faults_are_counted_by_part_and_cause(place: Place) -> None:
    with writer(place, "faulty") as store, dashboard(place) as service:
        store.event("warning", "fault", "an actor died", {"part": "actor", "cause": "died", "groups": 2})
        store.event("warning", "fault", "another", {"part": "actor", "cause": "died"})
        store.event("warning", "fault", "graders", {"part": "grader", "cause": "hung", "times": 4})
        store.event("warning", "fault", "another", {"part": "grader", "cause": "hung", "times": "many"})
        store.event("warning", "fault", "a rank hangs", {"part": "rank", "cause": "hung"})
        store.event("warning", "fault", "of a later version", {"part": "coffee machine", "cause": ["empty"]})
        store.event("warning", "store", "no fault", {"part": "disk", "cause": "full"})
        assert store.flush(20)

        def told() -> list[str]:
            return [line for line in service.get("/metrics").text.splitlines() if line.startswith("unmask_run_faults")]

        eventually(lambda: len(told()) == 4)
        assert told() == [
            'unmask_run_faults_total{cause="died",part="actor",run="faulty"} 2.0',
            'unmask_run_faults_total{cause="hung",part="grader",run="faulty"} 5.0',
            'unmask_run_faults_total{cause="other",part="other",run="faulty"} 1.0',
            'unmask_run_faults_total{cause="hung",part="rank",run="faulty"} 1.0',
        ]
        store.event("warning", "fault", "once more", {"part": "rank", "cause": "hung"})
        assert store.flush(20)
        eventually(lambda: told()[-1].endswith(" 2.0"))
