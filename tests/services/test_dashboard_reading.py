"""Reading the dashboard: what a glance tells, zoom and bands, addresses, keyboard, contrast, calm."""

import math
from collections.abc import Iterator
from typing import Any

import pytest

from learner.finetuning.settings import load_sft_config
from tests.support import realistic_runs
from tests.support.browsers import Watched, watched
from tests.support.dashboards import Dashboard, dashboard, writer
from tests.support.page_contrast import faint_texts

pytestmark = pytest.mark.slow

LONG = 2000
SPIKE = 1003


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A short run, one with more iterations than a chart has points, one that warned, one that failed, a fine-tuning
    run, and one that is alive."""
    runs = tmp_path_factory.mktemp("reading")
    realistic_runs.finished(runs, "short", 60)
    with writer(runs, "long", total_iterations=LONG) as store:
        for iteration in range(1, LONG + 1):
            store.metrics(iteration, {"reward/mean": 50.0 if iteration == SPIKE else math.sin(iteration / 99)})
        store.status("finished")
        assert store.flush(60)
    with writer(runs, "warned") as store:
        store.metrics(1, {"reward/mean": 1.0})
        store.event("warning", "lease", "lease 3 timed out; its groups are leased again")
        store.status("finished")
        assert store.flush(30)
    with writer(runs, "failed") as store:
        store.metrics(1, {"reward/mean": 1.0})
        store.event("error", "failed", "the run failed: OutOfMemoryError")
        store.status("failed")
        assert store.flush(30)
    config = load_sft_config(["recipe=sft_d1_s1k"]).model_dump(mode="json")
    with writer(runs, "tuned", task="sft", objective="sft", config=config) as store:
        for iteration in range(1, 41):
            store.metrics(iteration, {"loss": 2.0 / iteration, "held_out/loss": 2.2 / iteration, "sft/tokens": 9.0})
        store.status("finished")
        assert store.flush(30)
    with writer(runs, "alive", total_iterations=100) as alive:
        for iteration in range(1, 31):
            alive.metrics(iteration, {"reward/mean": iteration / 10, "machine/to_go_s": 6.0 * (100 - iteration)})
        assert alive.flush(30)
        with dashboard(runs) as found:
            yield found


# ---- a glance


def vital(page: Watched, name: str) -> tuple[str, str]:
    """A figure of the strip and the note below it, once warnings and trends are known."""
    page.wait_until("the health", lambda: page.text("[data-figure=Health] .text") != "…")
    cell = f"[data-figure='{name}']"
    return page.text(f"{cell} .text"), page.text(f"{cell} .note")


def test_a_glance_tells_whether_it_lives_learns_is_healthy_and_how_long_it_takes(page: Watched) -> None:
    page.open("/run/alive")
    page.shows(".pill[data-status=running]")
    assert vital(page, "To go") == ("7 min", "iteration 30 / 100"), "70 iterations of 6 s"
    assert vital(page, "Reward") == ("2.55", "mean of the newest 10, last 3; ▲ 1 lately, ▲ 2 since start")
    assert vital(page, "Health") == ("✓ good", "no warning, no restart")
    assert page.page.locator("[data-figure=Reward] svg.spark polyline").count() == 1
    page.open("/run/warned")
    text, note = vital(page, "Health")
    assert text == "▲ 1 warning" and note.startswith("lease, ")
    page.page.click("[data-figure=Health] a")
    page.shows(".event .text", "lease 3 timed out")
    assert page.page.locator(".event").count() == 1 and page.page.url.endswith("/run/warned/events?level=warning")
    page.open("/run/failed")
    page.shows("h1", "failed")
    assert vital(page, "Health")[0] == "◆ 1 error"
    assert vital(page, "Reward")[1] == "last iteration", "one value is no trend"


def test_a_fine_tuning_run_has_losses_for_vitals(page: Watched) -> None:
    page.open("/run/tuned")
    page.shows("[data-chart=loss] .main-svg")
    assert "▼" in vital(page, "Loss")[1]
    assert vital(page, "Held out") == ("0.055", "loss at iteration 40")
    labels = page.page.locator("[data-chart=loss] .entry .label").all_text_contents()
    assert labels == ["loss", "held_out/loss"]
    assert page.page.locator("[data-figure=Reward]").count() == 0
    page.shows(".events .note, .events + .note, .card:has(.events)")
    internals = page.page.locator("[data-section=internals]")
    page.wait_until("no ledger: it leases nothing", lambda: not internals.is_visible())
    page.open("/run/tuned/config?q=packing")
    page.shows(".settings dt .meaning", "Lay several examples into one row")
    page.open("/run/short")
    page.shows("[data-section=internals] > summary").click()
    page.shows(".ledger-card")  # the control


# ---- zoom


def xs(page: Watched, trace: int = 0) -> list[float]:
    """Iterations of a curve of the chart of rewards; the band's outline, where there is one, is trace 0."""
    return list(page.page.eval_on_selector("[data-chart=reward] .plot", f"plot => plot.data[{trace}]?.x ?? []"))


def refetches(page: Watched) -> list[str]:
    return [url for url in page.requests if "/metrics?" in url and "first=" in url]


def drag(page: Watched, first: float, last: float) -> None:
    """Drag over the chart between two iterations."""
    left, right, middle = page.page.eval_on_selector(
        "[data-chart=reward] .plot",
        """(plot, ends) => {
          const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
          const axis = plot._fullLayout.xaxis;
          const at = (x) => plot.getBoundingClientRect().left + axis._offset + axis.l2p(x);
          return [...ends.map(at), box.top + box.height / 2];
        }""",
        [first, last],
    )
    mouse = page.page.mouse
    mouse.move(left, middle)
    mouse.down()
    mouse.move((left + right) / 2, middle, steps=4)
    mouse.move(right, middle, steps=4)
    mouse.up()


def test_zoom_fetches_every_value_and_the_band_keeps_extremes(page: Watched) -> None:
    page.open("/run/long")
    page.shows("[data-chart=reward] .main-svg")
    page.wait_until("the curve", lambda: len(xs(page, 1)) > 0)
    points = len(xs(page, 1))
    assert points <= 500
    band = page.page.eval_on_selector("[data-chart=reward] .plot", "p => [p.data[0].fill, Math.max(...p.data[0].y)]")
    assert band == ["toself", 50.0], "one value in 2,000 is in the band"
    line = page.page.eval_on_selector("[data-chart=reward] .plot", "p => Math.max(...p.data[1].y)")
    assert line < 20, "control: the mean of its point hides it"
    drag(page, 950, 1050)
    page.wait_until("a closer look", lambda: SPIKE in xs(page) and len(xs(page)) < points)
    assert refetches(page)
    seen = xs(page)
    assert seen == list(range(int(seen[0]), int(seen[-1]) + 1)), "every iteration"
    assert page.page.eval_on_selector("[data-chart=reward] .plot", "p => Math.max(...p.data[0].y)") == 50.0
    page.page.keyboard.press("z")
    page.wait_until("the whole run", lambda: len(xs(page, 1)) == points)


def test_zoom_into_a_short_run_asks_for_nothing(page: Watched) -> None:
    """The control: what is shown has every value already, and no band."""
    page.open("/run/short")
    page.shows("[data-chart=reward] .main-svg")
    page.wait_until("the curve", lambda: len(xs(page)) == 60)
    drag(page, 20, 40)
    span = "p => p._fullLayout.xaxis.range[1] - p._fullLayout.xaxis.range[0]"
    page.wait_until("the zoom", lambda: page.page.eval_on_selector("[data-chart=reward] .plot", span) < 25)
    assert refetches(page) == []
    assert (
        page.page.eval_on_selector("[data-chart=reward] .plot", "p => p.data.some((t) => t.fill === 'toself')") is False
    )


# ---- addresses and history


def test_titles_addresses_and_the_way_back(page: Watched) -> None:
    page.open("/runs")
    page.shows("tr[data-run=short] a").click()
    page.shows("h1", "short")
    page.wait_until("the title", lambda: page.page.title() == "finished 60/200 · short · Unmask")
    page.page.click(".tabs a:has-text('Events')")
    page.shows(".event")
    page.wait_until("the title", lambda: page.page.title() == "finished 60/200 · short · Events · Unmask")
    page.page.reload()
    page.shows(".event")
    assert page.page.get_attribute(".tabs a:has-text('Events')", "aria-current") == "page"
    page.page.go_back()
    page.shows("[data-chart=reward]")
    page.page.go_back()
    page.shows("h1", "Runs")
    page.wait_until("the title", lambda: page.page.title() == "Runs · Unmask")
    page.page.go_forward()
    page.shows("h1", "short")


# ---- keyboard, contrast, motion


def focused(page: Watched) -> dict[str, Any]:
    found: dict[str, Any] = page.page.evaluate(
        """() => {
          const at = document.activeElement;
          const style = getComputedStyle(at);
          const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
          const name = at.getAttribute("aria-label") ?? at.labels?.[0]?.textContent ?? at.textContent;
          return { tag: at.tagName, name: name.trim(), ring, id: at.id, skip: at.classList.contains("skip") };
        }"""
    )
    return found


@pytest.mark.parametrize("route", ["/runs", "/run/short"])
def test_everything_is_reached_by_tab_and_seen_when_it_is(page: Watched, route: str) -> None:
    page.open(route)
    page.shows("tr[data-run=short]" if route == "/runs" else "[data-chart=reward] .main-svg")
    page.page.keyboard.press("Tab")
    assert focused(page)["skip"]
    page.page.keyboard.press("Enter")
    assert focused(page)["id"] == "main" and page.page.url.endswith(f"#{route}"), "the skip link is no route"
    page.page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.page.keyboard.press("Tab")
        reached.append(focused(page))
    assert [item for item in reached if item["tag"] != "BODY" and not (item["ring"] and item["name"])] == []
    wanted = "Compare short" if route == "/runs" else "Samples"
    assert wanted in {item["name"] for item in reached}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_readable(browser: Any, service: Dashboard, dark: bool) -> None:
    routes = {
        "/runs": "tr[data-run=short]",
        "/run/short": "[data-chart=reward] .main-svg",
        "/run/failed/events": ".event",
        "/run/short/workers": "[data-worker]",
        "/run/short/samples": ".samples tbody tr",
        "/run/short/config": ".settings",
        "/compare?run=short&run=long": ".legend tbody tr",
    }
    with watched(browser, service.url, dark=dark) as page:
        for route, content in routes.items():
            page.open(route)
            page.shows(content)
            assert faint_texts(page.page) == [], route
        page.page.evaluate(
            "document.querySelector('h1').style.color = 'color-mix(in srgb, var(--text) 45%, var(--bg))'"
        )
        assert len(faint_texts(page.page)) == 1  # the control


def test_a_reader_who_wants_no_motion_gets_none(browser: Any, service: Dashboard) -> None:
    times = {}
    for calm in (False, True):
        with watched(browser, service.url, calm=calm) as page:
            page.open("/run/short")
            bar = page.shows(".run-progress i")
            times[calm] = bar.evaluate("bar => parseFloat(getComputedStyle(bar).transitionDuration)")
    assert times[True] == 0 and times[False] > 0
