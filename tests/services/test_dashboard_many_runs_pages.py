"""The pages with a folder of 200 runs, on a screen and on a phone: nothing is cut off, a finger hits what it wants, and
curves that share a colour share a setting."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support import many_runs
from tests.support.browsers import Watched, watched
from tests.support.dashboards import Dashboard

pytestmark = pytest.mark.slow

RUNS = 200
LOOKS = 32
"""Eight colours in four dashes."""
FINGER = 40
LOW = """least => [...document.querySelectorAll("main button, main input:not([type=checkbox]), main select")]
  .filter((each) => each.checkVisibility() && each.closest(".legend td.name, thead, tr.group .name") === null)
  .map((each) => [each.ariaLabel || each.textContent, each.getBoundingClientRect().height])
  .filter(([, height]) => height < least)"""
CUT = """selector => [...document.querySelectorAll(selector)]
  .filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.textContent)"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with many_runs.served(tmp_path_factory.mktemp("many pages") / "runs", RUNS) as found:
        yield found


@pytest.fixture(params=[False, True], ids=["light", "dark"])
def phone(request: pytest.FixtureRequest, browser: Any, service: Dashboard) -> Iterator[Watched]:
    with watched(browser, service.url, phone=True, dark=request.param) as page:
        yield page


def style_of_swatches(page: Watched) -> dict[str, set[str]]:
    """The learning rates that each look of the legend's swatches stands for."""
    rows = page.page.eval_on_selector_all(
        ".legend tbody tr", "rows => rows.map((row) => [row.dataset.run, row.querySelector('.eye').dataset.of])"
    )
    rates = {many_runs.name_of(number): str(many_runs.settings_of(number)["learner.lr"]) for number in range(RUNS)}
    looks: dict[str, set[str]] = {}
    for run, style in rows:
        looks.setdefault(style, set()).add(rates[run])
    return looks


# ---- runs


@pytest.mark.heavy
def test_grouped_runs_are_read_sorted_ticked_and_compared_on_a_phone(phone: Watched) -> None:
    phone.open("/runs")
    phone.shows("tr[data-run]")
    phone.page.get_by_role("button", name="Group seeds").tap()
    phone.shows("tr.group")
    assert phone.page.locator("tr.group").count() == -(-RUNS // many_runs.SEEDS)
    assert phone.overflow() <= 0
    told = ".runs td.name :is(.differs, .note), .segments, .segments button"
    assert phone.page.evaluate(CUT, told) == [], "which settings a group has"
    assert phone.page.evaluate(LOW, FINGER) == []
    narrow = "all => all.forEach((each) => (each.style.cssText = 'white-space: nowrap; max-width: 9em'))"
    phone.page.eval_on_selector_all(".runs td.name .differs", narrow)
    assert phone.page.evaluate(CUT, told), "control: beside something else they are cut off"
    phone.page.reload()
    phone.shows("tr.group")
    phone.page.get_by_label("Sort by").select_option("-best")
    best = phone.page.locator("tr.group [data-cell=best] span:first-child")
    shares = [float(text.removesuffix("%")) for text in best.all_text_contents()]
    assert shares == sorted(shares, reverse=True) and "sort=-best" in phone.page.url
    # Beside the box, in its cell: the row is ticked, neither opened nor folded out.
    phone.page.locator("tr.group td.choose").first.tap(position={"x": 3, "y": 8})
    go = phone.shows(".compare-chosen", "Compare 3")
    assert phone.page.locator("tr.indent").count() == 0
    phone.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    box = go.bounding_box()
    assert box["y"] > 0 and box["y"] + box["height"] <= phone.page.viewport_size["height"], "at the list's end too"
    phone.wait_until("the last row is above the button", lambda: phone.covered(".compare-chosen") == [])
    phone.page.get_by_label("Filter runs").fill("lr=3e-3 wd1 seed=2")
    phone.wait_until("what was found", lambda: phone.text("main .note").startswith("6 in "))
    phone.page.get_by_role("button", name="Tick all 6").tap()
    phone.shows(".compare-chosen", "Compare 9, 3 not listed")
    assert phone.overflow() <= 0
    phone.page.get_by_role("button", name="Tick none").tap()
    phone.shows(".compare-chosen", "Compare 3, 3 not listed").tap()
    phone.shows(".legend tbody tr:nth-child(3)")


# ---- compare


@pytest.mark.parametrize("small", [True, False], ids=["phone", "desktop"])
@pytest.mark.heavy
def test_a_comparison_of_200_runs_has_a_legend(browser: Any, service: Dashboard, small: bool) -> None:
    with watched(browser, service.url, phone=small, dark=small) as page:
        page.open(many_runs.comparison_of(RUNS))
        page.shows(".colour-key .entry", "lr 3e-3", limit_s=120)
        for width in (390, 1000) if small else (1280, 1440):
            page.page.set_viewport_size({"width": width, "height": 900})
            assert page.overflow() <= 0, width
        assert page.page.locator(".legend tbody tr").count() == RUNS and page.text("h1") == "200 runs"
        looks = style_of_swatches(page)
        assert len(looks) == len(many_runs.LRS) and all(len(rates) == 1 for rates in looks.values())
        keys = page.page.locator(".colour-key .entry").all_text_contents()
        assert [text.split(" ")[1][:4] for text in keys] == ["3e-4", "1e-3", "3e-3", "0.01"]
        page.page.get_by_label("Colour by").select_option("run")
        page.shows(".colour-key", f"200 curves share {LOOKS} looks.")
        looks = style_of_swatches(page)
        assert len(looks) == LOOKS and any(len(rates) > 1 for rates in looks.values()), "control"
        settings = page.page.locator(".table-wrap:has(.differences)")
        assert settings.evaluate("box => box.clientHeight < innerHeight && box.scrollHeight > 4 * innerHeight")
        if small:
            assert page.page.evaluate(LOW, FINGER) == []
            page.page.eval_on_selector(".segments button", "button => (button.style.minHeight = '26px')")
            page.page.eval_on_selector(".legend .eye", "eye => (eye.style.padding = '4px')")
            assert page.page.evaluate(LOW, FINGER), "control"


def test_many_runs_are_filtered_as_in_the_list(browser: Any, service: Dashboard) -> None:
    runs = 48
    with watched(browser, service.url, phone=True) as page:
        page.open(many_runs.comparison_of(runs))
        page.shows(".colour-key .entry", limit_s=60)
        page.page.get_by_label("Filter runs").fill("lr=3e-3 seed=2")
        wanted = {
            many_runs.name_of(number)
            for number in range(runs)
            if (found := many_runs.settings_of(number))["learner.lr"] == 3e-3 and found["run.seed"] == 2
        }
        page.wait_until("the rows", lambda: page.page.locator(".legend tbody tr").count() == len(wanted))
        assert page.text("h1") == f"{len(wanted)} of {runs} runs"
        rows = page.page.locator(".legend tbody tr").evaluate_all("rows => rows.map((row) => row.dataset.run)")
        assert set(rows) == wanted
        series = "[data-chart='eval/m/solve_rate'] .entry"
        page.wait_until("the curves", lambda: page.page.locator(series).count() == len(wanted))
        assert parse_qs(urlsplit(page.page.url).fragment)["q"] == ["lr=3e-3 seed=2"]
        page.page.get_by_label("Filter runs").fill("lr=0.0031")
        page.wait_until("none", lambda: page.page.locator(".legend tbody tr").count() == 0)
        page.page.get_by_role("button", name="Show all").tap()
        page.wait_until("all", lambda: page.page.locator(".legend tbody tr").count() == runs)
        page.page.locator(".legend tbody tr:nth-child(2) .differs").tap()
        page.wait_until("that one alone", lambda: page.text("h1") == f"1 of {runs} runs")


def test_curves_of_many_runs_have_no_points_to_draw(browser: Any, service: Dashboard) -> None:
    """A mark for each of 30 values of 200 runs in nine charts held up a pointer for seconds."""
    modes = "plot => [...new Set(plot.data.map((trace) => trace.mode))]"
    plot = "[data-chart='eval/m/solve_rate'] .plot"
    with watched(browser, service.url) as page:
        page.open(many_runs.comparison_of(LOOKS + 1))
        page.shows(f"{plot} .main-svg")
        page.wait_until("curves", lambda: page.page.eval_on_selector(plot, "p => p.data.length") == LOOKS + 1)
        assert page.page.eval_on_selector(plot, modes) == ["lines"]
        page.page.get_by_label(f"Leave {many_runs.name_of(0)} out").click()
        page.wait_until("control: points of fewer runs", lambda: page.page.eval_on_selector(plot, modes) != ["lines"])


# ---- other pages of a run with a long name


def test_config_of_a_long_name_fits_a_phone(phone: Watched) -> None:
    phone.open(f"/run/{many_runs.name_of(0)}/config?q=lr&other={many_runs.name_of(5)}")
    phone.shows(".differences tbody tr")
    value = phone.shows("[data-differs=true] dd").bounding_box()
    meaning = phone.shows("[data-differs=true] .meaning").bounding_box()
    assert meaning["y"] >= value["y"] + value["height"] - 1 and meaning["width"] > 300, "below both, as wide as both"
    assert phone.overflow() <= 0
    assert phone.page.locator("select option").count() == RUNS
    phone.page.eval_on_selector("select", "select => (select.style.maxWidth = 'none')")
    assert phone.overflow() > 0, "control"
