"""The page of a run tells the truth: against the best and the recent past, with intervals, never from the future; what
can be taken is what is there; how it ended and how to go on."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.store.starts import BEGUN
from tests.support import realistic_runs
from tests.support.browsers import Watched
from tests.support.dashboards import Dashboard, dashboard, writer

pytestmark = pytest.mark.slow

STATIC = Path(__file__).parents[2] / "services" / "dashboard" / "static"
RATES = {0: 0.0625, 10: 0.3, 20: 0.6, 30: 0.75, 40: 0.203}
ITERATIONS = 45
COMMAND = "python -m learner.main recipe=sudoku run.name=fell"
RECORD = {
    "recipe": "sudoku",
    "code": {"git_commit": "0123abcd", "changed": True},
    "versions": {"torch": "2.9"},
    "machine": {"host": "box", "gpus": ["H200"]},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A run whose held-out rate fell, one that failed, and one that was only evaluated at the start and is alive."""
    runs = tmp_path_factory.mktemp("run page")
    with realistic_runs.open_store(runs, "fell", total_iterations=ITERATIONS) as store:
        store.event("info", BEGUN, COMMAND, RECORD)
        for iteration, rate in RATES.items():
            store.metrics(iteration, {"eval/m/solve_rate": rate, "eval/problems": 128.0})
            store.checkpoint(iteration, f"/elsewhere/checkpoints/iteration-{iteration:06d}")
        for iteration in range(1, ITERATIONS + 1):
            constant = {"clip_fraction/low": 0.0, "clip_fraction/high": 0.0, "ratio/mean": 1.0, "ratio/max": 1.0}
            sign = {"loss": (-1.0) ** iteration * iteration}
            store.metrics(iteration, realistic_runs.figures(iteration) | constant | sign)
        store.event("warning", "fell", "held-out solve rate 0.203: below its best", {"best": 0.75})
        store.status("finished", {"train_seconds": 100.0})
        assert store.flush(30)
    for iteration in (30, 40):
        (runs / "fell" / "checkpoints" / f"iteration-{iteration:06d}").mkdir(parents=True)
    with writer(runs, "failed") as store:
        store.metrics(3, {"reward/mean": 1.0})
        store.event("error", "failed", "the run failed: OutOfMemoryError: lower rollout.max_rows")
        store.status("failed")
        assert store.flush(30)
    config = realistic_runs.CONFIG
    with writer(runs, "young", config=config) as young:
        young.metrics(0, {"eval/m/solve_rate": 0.0625, "eval/problems": 128.0})
        young.metrics(1, {"reward/mean": 1.0, "time/iteration_s": 2.0, "machine/to_go_s": 250.0})
        for name, role, version in (("rollout-0", "rollout", 1), ("rollout-1", "rollout", 0), ("rank", "learner", 2)):
            young.worker(name, role=role, status="busy", policy_version=version)
        assert young.flush(30)
        with dashboard(runs) as found:
            yield found


def note(page: Watched, vital: str) -> str:
    page.wait_until("the health", lambda: page.text("[data-figure=Health] .text") != "…")
    return page.text(f"[data-figure='{vital}'] .note")


def entry(page: Watched, metric: str) -> str:
    """The readout of a curve."""
    return " ".join(page.page.locator(f".entry[data-key='{metric}']").first.inner_text().split())


def test_the_overview_of_a_run_that_fell(page: Watched) -> None:
    page.open("/run/fell")
    page.shows("[data-chart=eval] .main-svg")

    # Vitals: held-out is red against its best, though it lies above the base.
    assert note(page, "Held out") == "▼ 54.7 points below its best (75.0% at 30)"
    assert page.page.get_attribute("[data-figure='Held out']", "data-tone") == "bad"
    assert note(page, "Took").endswith("training 1 min 40 s")
    assert "mean of the newest 10" in note(page, "Reward")
    page.shows(".event[data-kind=fell]")

    # Checkpoints: those on disk, best and last marked.
    rows = page.page.locator(".checkpoints li")
    assert [row.split("\n")[0] for row in rows.all_inner_texts()] == ["Iteration 40", "Iteration 30"]
    assert "best" in rows.nth(1).inner_text() and "held out 75.0%" in rows.nth(1).inner_text()
    assert "last" in rows.nth(0).inner_text()
    page.shows(".card .note", "No longer on disk: iterations 0, 10, 20")
    copy = rows.nth(1).locator("button")
    assert "learner.evaluate --run" in copy.nth(1).get_attribute("title")
    assert copy.nth(2).get_attribute("title").endswith("iteration-000030/adapter' --out merged")

    # The readout reaches back, never ahead, and says to when; evaluations have Wilson's intervals, and no smoothing.
    page.page.focus("[data-chart=reward] .plot")
    for _ in range(20):
        page.page.keyboard.press("ArrowLeft")
    assert page.page.locator("[data-chart=eval] .cursor").get_attribute("data-x") == "26"
    assert entry(page, "eval/m/solve_rate") == "m steps 60.0% 51.3%–68.1% at 20"
    traces = "plot => plot.data.length"
    bars = "plot => [plot.data[0].error_y.array.length, plot.data[0].y.length]"
    assert page.page.eval_on_selector("[data-chart=eval] .plot", bars) == [5, 5]
    page.page.keyboard.press("s")
    page.wait_until("smoothing", lambda: page.page.eval_on_selector("[data-chart=solve] .plot", traces) == 2)
    assert page.page.eval_on_selector("[data-chart=eval] .plot", traces) == 1

    # A log axis: what it can't show is said, ticks are 1, 2, 5.
    page.page.click("[data-chart=loss] .log")
    page.shows("[data-chart=loss] .hidden-values", "23 values ≤ 0 not shown")
    ticks = page.page.eval_on_selector("[data-chart=loss] .plot", "plot => plot._fullLayout.yaxis.tickvals")
    assert ticks == [2, 5, 10, 20, 50]
    assert page.page.eval_on_selector("[data-chart=loss] .plot", "p => p._fullLayout.xaxis.title.text") == "iteration"
    page.wait_until("the address", lambda: page.page.url.endswith("?smooth=5&log=loss"))

    # Charts that never move are one line; internals are folded; each chart says what it is.
    page.shows("[data-section='policy health'] .constants summary", "clip fraction 0.0%, importance ratio 1")
    assert not page.page.locator("[data-chart=clip]").is_visible()
    assert not page.page.locator(".ledger-card").is_visible()
    page.page.click("[data-chart=entropy] .info")
    page.shows("[data-chart=entropy] .about", "If not:")

    # All of it is there again: from the address, and the smoothing in this browser.
    page.page.reload()
    page.shows("[data-chart=loss] .log[aria-pressed=true]")
    page.open("/run/failed")
    page.shows(".banner", "OutOfMemoryError: lower rollout.max_rows")
    page.shows("[data-chart=reward]")
    assert page.page.locator(".segments button[aria-pressed=true]").inner_text() == "5"
    assert page.text(".banner code").endswith("run.name=failed resume=auto")


def test_zoom_shows_the_stretch_at_its_own_height(page: Watched) -> None:
    page.open("/run/fell?from=0.5&to=9.5")
    page.shows("[data-chart=loss] .main-svg")
    height = "plot => plot._fullLayout.yaxis.range.map(Math.abs).reduce((a, b) => Math.max(a, b))"
    page.wait_until("the stretch", lambda: page.page.eval_on_selector("[data-chart=loss] .plot", height) < 12)
    page.page.keyboard.press("z")
    page.wait_until("the whole", lambda: page.page.eval_on_selector("[data-chart=loss] .plot", height) > 40)
    page.wait_until("the address", lambda: page.page.url.endswith("/run/fell"))


def test_tabs_of_a_run(page: Watched, service: Dashboard) -> None:
    page.open("/run/young")
    page.shows("[data-chart=reward]")
    assert note(page, "Held out") == "base; first evaluation at 10"
    assert page.text("[data-figure='To go'] .text") == "4 min 10 s", "the run's own estimate"
    page.open("/run/young/workers")
    page.shows("[data-worker=rollout-1] [data-late]", "1 older than it should be")
    assert page.page.locator("[data-late]").count() == 1, "one version is normal: new weights come with the next lease"

    page.open("/run/fell/events")
    page.shows(".chip", "begun").click()
    page.wait_until("that kind", lambda: page.page.locator(".event").count() == 1)
    assert page.page.url.endswith("?kind=begun")
    assert page.page.locator(".chip").all_inner_texts() == ["begun1", "fell1"]
    page.page.reload()
    page.shows(".chip[aria-pressed=true]", "begun")

    page.open("/run/fell/config?q=objective.beta")
    page.shows(".starts code", COMMAND)
    page.shows(".starts dd", "0123abcd, with changes")
    page.shows(".settings dt", "beta")
    assert "null" not in page.text(".config-cards")

    page.open("/run/later")
    page.shows(".state a", "All runs")
    realistic_runs.finished(service.runs, "later", 3)
    page.shows("[data-chart=reward] .main-svg")
    page.expect_errors("404")


NOISE = """
const { trend } = await import(process.argv[1]);
let state = 7;
const uniform = () => ((state = (Math.imul(state, 1664525) + 1013904223) >>> 0) + 1) / 4294967297;
const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const variance = (values) => values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1);
const before = (values) => { // twice the standard error, from two values on
  const n = Math.min(10, Math.floor(values.length / 3));
  if (n < 2) return false;
  const [first, last] = [values.slice(0, n), values.slice(-n)];
  return Math.abs(mean(last) - mean(first)) > 2 * Math.sqrt((variance(first) + variance(last)) / n);
};
const now = (values) => {
  const found = trend(values);
  return found !== null && (found.lately !== 0 || found.start !== 0);
};
const share = (rule) => {
  let ever = 0;
  for (let run = 0; run < 200; run += 1) {
    const values = Array.from({ length: 60 }, normal);
    if (values.some((_, index) => rule(values.slice(0, index + 1)))) ever += 1;
  }
  return ever / 200;
};
const rising = Array.from({ length: 60 }, (_, index) => index / 30 + 0.3 * normal());
const seen = [trend(rising).start > 0, trend(rising.slice(0, 9)) === null].map(Number);
console.log([share(now), share(before), ...seen].join(" "));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="the rule is in the page's language")
def test_few_runs_of_noise_ever_show_a_trend() -> None:
    done = subprocess.run(
        ["node", "--input-type=module", "-e", NOISE, str(STATIC / "run" / "trend.js")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    now, before, rising, early = map(float, done.stdout.split())
    assert now < 0.08
    assert before > 0.5, "control: the rule as it was"
    assert rising == 1 and early == 1
