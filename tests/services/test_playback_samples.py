"""Finding samples in a real browser: what the task shows of them, the film of a problem, the tab Samples."""

from collections.abc import Iterator

import pytest

from tests.support.browsers import Watched
from tests.support.dashboards import Dashboard, dashboard
from tests.support.page_contrast import faint_texts
from tests.support.playable_runs import write_playable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    runs = tmp_path_factory.mktemp("samples")
    write_playable(runs, "sudoku-a")
    with dashboard(runs) as service:
        yield service


def test_the_task_shows_the_answer_and_every_sample_is_reached(page: Watched, service: Dashboard) -> None:
    listed = service.api("runs/sudoku-a/samples", kind="base")["items"]
    base = service.api(f"runs/sudoku-a/samples/{listed[0]['id']}")
    page.open(f"/run/sudoku-a/play/{base['id']}?step=0")
    page.shows(".play-cell")
    assert page.text(".play-ask") == "Puzzle: 0321003004002100"
    assert page.page.get_by_role("img", name="4321123434122143").count() == 1, "the expected answer, as a grid"
    grid = page.page.locator(".play-hero .play-answer:not(.small) > span")
    assert grid.locator("nth=0").get_attribute("class") == "masked"
    clues = grid.evaluate_all("all => all.map((cell) => cell.dataset.mark)")
    assert clues == ["" if clue == "0" else "clue" for clue in "0321003004002100"], "before anything is written"
    page.page.keyboard.press("End")
    marks = grid.evaluate_all("all => all.map((cell) => cell.dataset.mark)")
    assert marks == [cell["mark"] for cell in base["layout"]["cells"]] and {"clue", "right", "wrong"} == set(marks)
    assert page.text(".play-hero .play-answer:not(.small)") == base["completion"][8:24]
    at = base["layout"]["cells"][marks.index("wrong")]["positions"][0]
    assert page.page.locator(f".play-cell[data-position='{at}']").get_attribute("data-mark") == "wrong"
    # The same problem through training.
    frames = page.page.locator(".play-film a")
    assert frames.evaluate_all("all => all.map((frame) => frame.ariaLabel)") == [
        f"{name}: {'right' if frame['correct'] else 'wrong'}"
        for name, frame in zip(("base model", "trained, iteration 3"), base["counterparts"], strict=True)
    ]
    frames.last.click()
    page.wait_until("the trained model's answer", lambda: page.text("h1") == "trained, iteration 3")
    # Kind, iteration, choice, search.
    page.page.get_by_role("button", name="Training").click()
    page.wait_until("a training sample", lambda: page.text("h1") == "Iteration 3, completion 1")
    page.page.get_by_label("Iteration", exact=True).fill("0")
    page.wait_until("the first iteration", lambda: page.text("h1") == "Iteration 1, completion 1")
    page.wait_until("its samples", lambda: page.page.get_by_label("Sample", exact=True).locator("option").count() == 8)
    page.page.get_by_label("Search samples").fill("made-up-1")
    page.shows(".play-hit", "base model")
    assert page.covered(".suggestions") == []
    page.shows(".play-hit", "base model").click()
    page.wait_until("what was found", lambda: page.text(".play-head p.note") == "made-up-1")


def test_the_tab_groups_samples_by_prompt_and_what_is_wrong_stands_out(page: Watched, service: Dashboard) -> None:
    page.open("/run/sudoku-a/samples?correct=false")
    page.shows(".samples tbody tr.link")
    assert page.page.get_by_role("button", name="Wrong").get_attribute("aria-pressed") == "true", "as the address says"
    assert page.page.locator(".samples tr.link[data-correct=true]").count() == 0
    wrong, right = (
        page.page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
        for name in ("bad", "ok")
    )
    assert (
        wrong != right
        and page.page.locator(".samples .verdict").first.evaluate("e => getComputedStyle(e).fontWeight") == "650"
    )
    page.page.get_by_role("button", name="All").click()
    listed = service.api("runs/sudoku-a/samples", limit=50)["items"]
    page.wait_until("all of them", lambda: page.page.locator(".samples tr.link").count() == len(listed))
    assert "correct" not in page.page.url
    headings = page.page.locator(".samples tr.group").all_inner_texts()
    own = [sample for sample in listed if (sample["kind"], sample["iteration"]) == ("train", 3)]
    rate = f"{sum(sample['correct'] for sample in own)} of {len(own)} right"
    assert any(
        "Iteration 3, training" in text and "Puzzle: 0321003004002100" in text and rate in text for text in headings
    )
    assert len(headings) == 3 + 2, "a group of each iteration, base and trained"
    assert page.page.locator(".samples td.question").first.inner_text() == "Puzzle: 0321003004002100"
    page.page.keyboard.press("j")
    assert page.page.locator(".samples tr.at.link").count() == 1, "headings are passed over"
    assert faint_texts(page.page) == [] and page.overflow() <= 0
    page.page.get_by_label("Search samples").fill("nothing has this")
    page.shows(".state.empty", "No samples")
    assert "q=nothing+has+this" in page.page.url
