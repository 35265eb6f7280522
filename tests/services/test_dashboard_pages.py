"""The dashboard's pages in a real Chromium, before a real service on real stores."""

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.support import realistic_runs
from tests.support.browsers import watched
from tests.support.dashboards import Dashboard, dashboard

PlaywrightError = pytest.importorskip("playwright.sync_api", reason="the pages are tested with playwright").Error
pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=document.title='owned'>"
SLY = "'; DROP TABLE runs; --\u202egnp.x"
"""SQL, and a character that turns the direction of what follows."""
SCRIPT = "</td><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Three finished runs, one of them with hostile texts and a NaN, and a store that is none."""
    runs = tmp_path_factory.mktemp("runs")
    realistic_runs.finished(runs, "alpha", 60)
    other = {**realistic_runs.CONFIG, "learner": {**realistic_runs.CONFIG["learner"], "lr": 5e-4}}
    realistic_runs.finished(runs, "beta", 40, seed=1, config=other)
    with realistic_runs.open_store(runs, HOSTILE, task=SCRIPT, config={SCRIPT: SCRIPT}) as store:
        realistic_runs.fill(store, 20, nan_at=12)
        realistic_runs.add_sample(store, 20, SCRIPT, row=2)
        store.metrics(20, {SCRIPT: 1.0})
        store.event("error", SCRIPT, SCRIPT, {SCRIPT: SCRIPT})
        store.worker("evil", role="rollout", status="lost", node=HOSTILE, last_error=SCRIPT)
        store.status("failed")
        assert store.flush(30)
    realistic_runs.finished(runs, SLY, 5)
    (runs / "broken").mkdir()
    (runs / "broken" / "store.sqlite").write_bytes(b"no database " * 1000)
    with dashboard(runs) as found:
        yield found


def quoted(text: str) -> str:
    return quote(text, safe="")


ROUTES = [
    "/runs",
    "/run/alpha",
    "/run/alpha/samples",
    "/run/alpha/workers",
    "/run/alpha/events",
    "/run/alpha/config",
    "/compare?run=alpha&run=beta",
]
CONTENT = {
    "/runs": "tr[data-run=alpha]",
    "/run/alpha": "[data-chart=reward] .main-svg",
    "/run/alpha/samples": ".samples tbody tr",
    "/run/alpha/workers": "[data-worker=rollout-0]",
    "/run/alpha/events": ".event",
    "/run/alpha/config": ".settings",
    "/compare?run=alpha&run=beta": ".differences tbody tr",
}


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_pages_load_without_errors_and_ask_nobody_else(browser: Any, service: Dashboard, phone: bool) -> None:
    with watched(browser, service.url, phone=phone) as page:
        for route in ROUTES:
            page.open(route)
            page.shows(CONTENT[route])
            page.page.wait_for_timeout(300)
            assert page.overflow() <= 0, route
        assert len(page.requests) > 20


def test_the_watch_sees_errors_strangers_and_overflow(browser: Any, service: Dashboard) -> None:
    """Control of the test above, and of what ``watched`` demands of every page."""
    with pytest.raises(AssertionError, match="an error of this page"), watched(browser, service.url) as page:
        page.open("/runs")
        page.page.evaluate("console.error('an error of this page')")
    with pytest.raises(AssertionError, match="127.0.0.2"), watched(browser, service.url) as page:
        with contextlib.suppress(PlaywrightError):  # nobody answers there
            page.page.goto("http://127.0.0.2:9/")
        page.errors.clear()
    with watched(browser, service.url, phone=True) as page:
        page.open("/runs")
        page.shows(CONTENT["/runs"])
        page.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.2:9/pixel.png'}))")
        page.page.evaluate("document.querySelector('h1').style.width = '900px'")
        page.wait_until("the refusal of the policy", lambda: bool(page.errors))
        page.expect_errors("Content Security Policy")
        page.requests.clear()
        assert page.overflow() > 0


def test_hostile_names_are_text_everywhere(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/runs")
        page.shows("tr[data-run] a", HOSTILE)
        page.shows("td.name .note", SCRIPT)
        run = f"/run/{quoted(HOSTILE)}"
        for tab, selector, text in [
            ("", "h1", HOSTILE),
            ("", ".entry .label", "document.title"),  # the metric
            ("/samples", "td.completion a", SCRIPT),
            ("/events", ".event .text", SCRIPT),
            ("/workers", ".card h2", HOSTILE),
            ("/config", ".settings dd", SCRIPT),
        ]:
            page.open(run + tab)
            page.shows(selector, text)
            assert page.page.title() != "owned"
            assert page.page.locator("main img, main script").count() == 0
        # The control: parsed as markup, the name would have taken over.
        page.page.goto("about:blank")
        page.page.evaluate("text => { document.body.innerHTML = text }", HOSTILE)
        page.wait_until("the name's script", lambda: page.page.title() == "owned")


def test_a_name_of_sql_and_turned_text_is_only_a_name(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open(f"/run/{quoted(SLY)}")
        page.shows("[data-chart=reward] .main-svg")
        assert page.text("h1") == SLY
        beside = page.shows(".run-title .pill").bounding_box()
        assert beside["x"] > page.shows("h1").bounding_box()["x"], "the turn ends with the name"
        page.page.click(".tabs a:has-text('Config')")
        page.shows(".settings")
        page.open("/runs")
        page.shows("tr[data-run=alpha]")
        page.page.fill("input[type=search]", "' or 1=1 --")
        page.shows(".state.empty", "No run matches")
        page.page.fill("input[type=search]", "DROP TABLE")
        page.wait_until("the one", lambda: page.page.locator("tr[data-run]").count() == 1)
        assert page.text("tr[data-run] a") == SLY
        assert service.api("runs")["total"] == 5, "no table is gone"


# ---- the list of runs


def test_runs_filter_sort_and_open_by_keyboard(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/runs")
        page.shows("tr[data-run=alpha]")
        page.shows("tr[data-run=broken] .pill", "unreadable")
        page.shows("tr[data-run=alpha] svg.spark polyline")
        keys = page.page.keyboard
        keys.press("/")
        keys.type("BET")
        page.wait_until("one row", lambda: page.page.locator("tr[data-run]").count() == 1)
        keys.press("Escape")
        keys.press("j")
        page.shows("tr.at[data-run=beta]")
        keys.press("Enter")
        page.shows("h1", "beta")
        keys.press("Escape")
        page.shows("tr[data-run=alpha]")
        page.page.click("th[data-column=name] button")
        names = page.page.locator("tr[data-run]").evaluate_all("rows => rows.map(row => row.dataset.run)")
        assert names == sorted(names)
        page.page.click("th[data-column=name] button")
        assert page.page.locator("tr[data-run]").evaluate_all("rows => rows.map(row => row.dataset.run)") == names[::-1]
        page.page.click(".segments button:has-text('failed')")
        page.wait_until("the failed run alone", lambda: page.page.locator("tr[data-run]").count() == 1)


def test_help_and_theme_keys(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/runs")
        page.shows("tr[data-run=alpha]")
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.page.evaluate(ground)
        page.page.keyboard.press("t")
        assert page.page.evaluate(ground) == light  # from the system's light to the chosen one
        page.page.keyboard.press("t")
        dark = page.page.evaluate(ground)
        assert dark != light
        page.page.reload()
        page.shows("tr[data-run=alpha]")
        assert page.page.evaluate(ground) == dark
        page.page.keyboard.press("?")
        page.shows("dialog kbd", "j")
        page.page.keyboard.press("Escape")
        page.wait_until("no dialog", lambda: page.page.locator("dialog").count() == 0)


def test_two_runs_on_shared_axes(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/runs")
        for name in ("alpha", "beta"):
            page.shows(f"tr[data-run={name}] input").click()
        page.page.keyboard.press("c")
        chart = "[data-chart='reward/mean']"
        page.shows(f"{chart} .main-svg")
        assert sorted(page.page.locator(f"{chart} .entry .label").all_text_contents()) == ["alpha", "beta"]
        assert page.text(".differences thead") == "Runlearner.lr"
        assert page.page.locator(".differences tbody tr").all_text_contents() == ["alpha1e-3", "beta5e-4"]
        # The list of metrics lies over nothing, and what is clicked beside it is clicked.
        page.page.get_by_label("Find a metric").fill("clues")
        page.shows(".suggestions button", "reward/clues").click()
        page.shows("[data-chart='reward/clues'] h2")
        page.page.get_by_label("Find a metric").fill("e")
        assert page.page.locator(".suggestions button").count() > 20 and page.covered(".suggestions") == []
        page.page.eval_on_selector(".suggestions", "list => (list.style.position = 'absolute')")
        assert page.covered(".suggestions")  # the control
        page.page.eval_on_selector(".suggestions", "list => (list.style.position = '')")
        page.page.locator("[data-axis=seconds]").click()
        page.shows("[data-axis=seconds][aria-pressed=true]")
        assert not page.page.locator(".suggestions").is_visible() and "x=seconds" in page.page.url


# ---- a run


def test_run_shows_curves_ledger_and_marks_what_is_no_number(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open(f"/run/{quoted(HOSTILE)}")
        page.shows("[data-chart=reward] .main-svg")
        series = service.api(f"runs/{quoted('alpha')}/metrics", name="reward/mean")["series"]["reward/mean"]
        assert len(series["value"]) == 60
        assert page.text("[data-state=consumed] .number") == "318"
        assert "= 8 + 4 + 4 + 318 + 2" in page.text(".ledger-card .body > .note")
        page.shows("[data-section=internals] > summary").click()
        page.shows(".reasons li", "too stale")
        loss = "[data-chart=loss] .plot"
        page.page.locator(loss).scroll_into_view_if_needed()
        page.shows("[data-chart=loss] .main-svg")
        marks = "plot => plot.data.filter(trace => trace.yaxis === 'y2').flatMap(trace => trace.x)"
        assert page.page.eval_on_selector(loss, marks) == [12]
        assert page.page.eval_on_selector("[data-chart=reward] .plot", marks) == []
        page.shows("[data-chart='other-my_own'] h2")


def test_smoothing_and_log_scale_keep_the_raw_data(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/run/alpha")
        page.shows("[data-chart=reward] .main-svg")
        plot = "[data-chart=reward] .plot"
        values = "plot => plot.data.map(trace => trace.y)"
        raw = page.page.eval_on_selector(plot, values)
        page.page.keyboard.press("s")
        page.wait_until("smoothed curves", lambda: len(page.page.eval_on_selector(plot, values)) == 2 * len(raw))
        after = page.page.eval_on_selector(plot, values)
        assert all(line in after for line in raw)
        page.page.hover(plot)
        page.page.click("[data-chart=reward] .log")
        page.wait_until(
            "a log axis", lambda: page.page.eval_on_selector(plot, "p => p._fullLayout.yaxis.type") == "log"
        )
        assert all(line in page.page.eval_on_selector(plot, values) for line in raw)


def test_one_cursor_for_all_charts(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/run/alpha")
        page.shows("[data-chart=reward] .main-svg")
        page.shows("[data-chart=solve] .main-svg")
        page.page.focus("[data-chart=reward] .plot")
        page.page.keyboard.press("ArrowLeft")
        assert page.page.locator("[data-chart=solve] .cursor").get_attribute("data-x") == "60"
        page.page.keyboard.press("ArrowLeft")
        assert page.page.locator("[data-chart=solve] .cursor").get_attribute("data-x") == "59"
        shown = page.text("[data-chart=solve] .entry b")
        assert shown == f"{100 * realistic_runs.figures(59)['solve_rate']:.1f}%"


def test_config_difference(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/run/alpha/config")
        page.shows(".settings dt", "sampler.position_rule")
        page.page.select_option("select", "beta")
        row = page.shows(".differences tbody tr")
        assert row.text_content() == "learner.lr0.0010.0005"
