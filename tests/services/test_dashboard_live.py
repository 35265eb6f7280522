"""The dashboard's pages while things change: runs that write, services and stores that go and come back."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import realistic_runs
from tests.support.browsers import Watched, watched
from tests.support.dashboards import Dashboard, dashboard
from tests.support.real_runs import RUN_LIMIT_S, Runs

pytestmark = pytest.mark.slow

WATCHED = 40
"""Iterations of the run that trains before our eyes."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with dashboard(tmp_path_factory.mktemp("runs")) as found:
        yield found


def test_curves_move_without_a_reload(browser: Any, service: Dashboard) -> None:
    with realistic_runs.open_store(service.runs, "live") as store, watched(browser, service.url) as page:
        store.metrics(1, realistic_runs.figures(1))
        assert store.flush(30)
        page.wait_until("the new run", lambda: "live" in service.get("/api/v1/runs").text)
        page.open("/run/live")
        page.shows("[data-chart=reward] .main-svg")
        page.shows("#live[data-state=live]", "connected")
        page.page.evaluate("window.same = true")
        for iteration in range(2, 12):
            store.metrics(iteration, realistic_runs.figures(iteration))
        store.metrics(11, {"brand_new/metric": 4.25})
        store.event("warning", "something", "a live event")
        newest = "plot => plot.data[0].x.at(-1)"
        plot = "[data-chart=reward] .plot"
        page.wait_until("iteration 11", lambda: page.page.eval_on_selector(plot, newest) == 11)
        drawn = "[data-chart=solve] .scatterlayer .points path"
        page.wait_until("eleven marks, drawn", lambda: page.page.locator(drawn).count() == 11)
        page.shows(".event .text", "a live event")
        page.shows("[data-chart='other-brand_new'] b", "4.25")
        page.shows(".strip .note", "iteration 11 / 200")
        assert page.page.eval_on_selector(plot, "plot => plot.data[0].x") == list(range(1, 12))
        assert page.page.evaluate("window.same") is True


def held_back(page: Watched, pattern: str) -> list[tuple[Any, Any]]:
    """Requests with their answers, as the service gave them, which the page gets only when they are fulfilled."""
    held: list[tuple[Any, Any]] = []
    page.page.route(pattern, lambda route: held.append((route, route.fetch())))
    return held


def release(page: Watched, held: list[tuple[Any, Any]], pattern: str) -> None:
    for route, response in held:
        route.fulfill(response=response)
    page.page.unroute(pattern)


@pytest.mark.parametrize("pattern", ["**/metrics?*", "**/ledger"])
def test_what_comes_while_a_page_loads_is_not_lost(browser: Any, service: Dashboard, pattern: str) -> None:
    name = "early-" + pattern.strip("*/?")
    with realistic_runs.open_store(service.runs, name) as store, watched(browser, service.url) as page:
        store.metrics(1, realistic_runs.figures(1))
        assert store.flush(30)
        page.wait_until("the new run", lambda: name in service.get("/api/v1/runs").text)
        held = held_back(page, pattern)
        page.open(f"/run/{name}")
        page.wait_until("an answer", lambda: bool(held))
        for iteration in (2, 3):
            store.metrics(iteration, realistic_runs.figures(iteration))
        page.shows(".strip .note", "iteration 3 / 200")
        release(page, held, pattern)
        page.shows("[data-chart=reward] .main-svg")
        store.metrics(4, realistic_runs.figures(4))
        drawn = "plot => plot.data[0].x"
        page.wait_until("4", lambda: 4 in page.page.eval_on_selector("[data-chart=reward] .plot", drawn))
        assert page.page.eval_on_selector("[data-chart=reward] .plot", drawn) == [1, 2, 3, 4]


def test_what_comes_while_a_resumed_run_is_loaded_anew_is_not_lost(browser: Any, service: Dashboard) -> None:
    with realistic_runs.open_store(service.runs, "anew") as store, watched(browser, service.url) as page:
        for iteration in range(1, 6):
            store.metrics(iteration, realistic_runs.figures(iteration))
        assert store.flush(30)
        page.wait_until("the new run", lambda: "anew" in service.get("/api/v1/runs").text)
        page.open("/run/anew")
        page.shows("[data-chart=reward] .main-svg")
        held = held_back(page, "**/metrics?*")
        store.truncate_after(2)
        page.wait_until("an answer", lambda: bool(held))
        for iteration in (3, 4):
            store.metrics(iteration, realistic_runs.figures(iteration))
        page.shows(".strip .note", "iteration 4 / 200")
        release(page, held, "**/metrics?*")
        store.metrics(5, realistic_runs.figures(5))
        drawn = "plot => plot.data[0].x"
        page.wait_until("5", lambda: 5 in page.page.eval_on_selector("[data-chart=reward] .plot", drawn))
        assert page.page.eval_on_selector("[data-chart=reward] .plot", drawn) == [1, 2, 3, 4, 5]


def test_service_that_goes_away_and_comes_back(browser: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with realistic_runs.open_store(runs, "one") as store:
        store.metrics(1, realistic_runs.figures(1))
        assert store.flush(30)
        with dashboard(runs) as first, watched(browser, first.url) as page:
            page.page.clock.install()
            page.open("/run/one")
            page.shows("[data-chart=reward] .main-svg")
            page.shows("#live[data-state=live]")
            first.process.kill()
            first.process.wait()
            page.shows("#live[data-state=reconnecting], #live[data-state=stale]")
            page.shows(".banner", "does not answer")
            assert page.page.locator("[data-chart=reward] .main-svg").count()  # what was there stays
            page.page.clock.fast_forward(30_000)
            page.shows("#live[data-state=stale]", "stale since")
            store.metrics(2, realistic_runs.figures(2))
            assert store.flush(30)
            with dashboard(runs, "--port", str(first.port)):
                page.shows("#live[data-state=live]")
                newest = "plot => plot.data[0].x.at(-1)"
                page.wait_until(
                    "what was written meanwhile",
                    lambda: page.page.eval_on_selector("[data-chart=reward] .plot", newest) == 2,
                )
                page.wait_until("no banner", lambda: page.page.locator(".banner").count() == 0)
                page.expect_errors("net::ERR_")


def test_broken_store_is_explained_and_recovers(browser: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    realistic_runs.finished(runs, "good", 5)
    (runs / "bad").mkdir()
    (runs / "bad" / "store.sqlite").write_bytes(b"no database " * 1000)
    with dashboard(runs) as service, watched(browser, service.url) as page:
        page.open("/run/bad")
        page.shows(".state.failed, .banner")
        (runs / "bad" / "store.sqlite").unlink()
        realistic_runs.finished(runs, "bad", 7)
        page.shows("[data-chart=reward] .main-svg")
        page.shows(".strip .note", "iteration 7 / 200")
        page.expect_errors("503")


def test_deleted_and_unknown_runs_are_explained(browser: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    realistic_runs.finished(runs, "doomed", 5)
    with dashboard(runs) as service, watched(browser, service.url) as page:
        page.open("/run/nobody")
        page.shows(".state.empty", "nobody")
        page.open("/run/doomed")
        page.shows("[data-chart=reward] .main-svg")
        shutil.rmtree(runs / "doomed")
        page.shows(".banner", "gone")
        page.open("/runs")
        page.shows(".state.empty", "No runs yet")
        page.expect_errors("404")


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.heavy
def test_curves_move_while_a_run_trains(browser: Any, runs: Runs) -> None:
    with dashboard(runs.folder) as service, watched(browser, service.url) as page:
        page.open("/runs")
        page.shows("h1", "Runs")
        with runs.started("watched", f"run.iterations={WATCHED}", "run.dashboard=false") as run:
            page.shows("tr[data-run=watched] .pill", "running", limit_s=RUN_LIMIT_S)  # it appears by itself
            page.open("/run/watched")
            run.wait_for_row(1)
            plot = "[data-chart=reward] .plot"
            page.shows(f"{plot} .main-svg")
            seen = set()

            def over() -> bool:
                if page.page.locator(f"{plot} .main-svg").count():
                    seen.add(page.page.eval_on_selector(plot, "plot => plot.data[0]?.x.length ?? 0"))
                return WATCHED in seen

            page.wait_until("all iterations", over, limit_s=RUN_LIMIT_S)
            assert run.wait() == 0, run.output()
        assert len(seen) > 1, seen  # it grew before our eyes, on one page
        page.shows("h1 + span .pill", "finished")
        stored = service.api("runs/watched/metrics", name="reward/mean")["series"]["reward/mean"]["value"]
        assert page.page.eval_on_selector(plot, "plot => plot.data[0].y") == stored
        issued = service.api("runs/watched/ledger")["consumed"]
        page.wait_until("the ledger", lambda: page.text("[data-state=consumed] .number") == f"{issued:,}")
        page.open("/run/watched/workers")
        for worker in ("learner-0", "rollout-0"):
            page.shows(f"[data-worker={worker}] [data-cell=memory]", "MiB")
