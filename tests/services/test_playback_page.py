"""Playback in a real browser: scrubbing, playing, comparing; what a completion says is shown and never done."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browsers import Watched, watched
from tests.support.dashboards import Dashboard, dashboard, writer
from tests.support.page_contrast import faint_texts
from tests.support.playable_runs import GRID, ODD, playable, write_playable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    runs = tmp_path_factory.mktemp("pages")
    write_playable(runs, "sudoku-a")
    write_playable(runs, "gsm8k-a", long=True, iterations=1)
    write_playable(runs, "whole", iterations=1, scored="nothing")
    write_playable(runs, "masks", iterations=1, scored="masks")
    write_playable(runs, "branched", iterations=1, scored="branches")
    with writer(runs, "empty") as store:
        assert store.flush(30)
    with writer(runs, "broken") as store:
        about: dict[str, Any] = {"problem_id": "p", "prompt": "", "completion": "", "correct": False, "rewards": {}}
        store.sample(1, kind="train", group_id=0, row=0, trajectory=b"<b>no</b>", **about)
        assert store.flush(30)
    with dashboard(runs) as service:
        yield service


def sample(service: Dashboard, run: str, row: int = 0, **filters: Any) -> dict[str, Any]:
    """The playback document of one sample."""
    listed = service.api(f"runs/{run}/samples", limit=200, **filters)["items"]
    (chosen,) = [item["id"] for item in listed if item["row"] == row and item["group_id"] == listed[0]["group_id"]]
    found: dict[str, Any] = service.api(f"runs/{run}/samples/{chosen}")
    return found


END = "?step=999"
"""The finished text, whatever the number of steps."""


def play(page: Watched, run: str, document: dict[str, Any], query: str = END) -> None:
    page.open(f"/run/{run}/play/{document['id']}{query}")
    page.shows(".play-cell")
    page.shows(".play-axis svg")


def positions(page: Watched, kind: str, panel: int = 0) -> set[int]:
    """Positions of the cells of this class; the folded end of the text stands for its first one."""
    found = page.page.locator(".play-flow").nth(panel).locator(f".play-cell{kind}")
    return {int(value) for value in found.evaluate_all("all => all.map((cell) => cell.dataset.position)")}


FOLDED = len(GRID)
"""Where the ends of the text begin, which are one cell."""


def drawn_before(document: dict[str, Any], step: int) -> set[int]:
    return {min(position, FOLDED) for position, at in enumerate(document["cells"]["step"]) if at < step}


def drawn_at(document: dict[str, Any], step: int) -> set[int]:
    return {min(position, FOLDED) for position, at in enumerate(document["cells"]["step"]) if at == step}


def counter(page: Watched) -> str:
    return page.text(".play-counter")


def test_scrubbing_shows_each_state_that_the_rollout_went_through(page: Watched, service: Dashboard) -> None:
    document = sample(service, "sudoku-a", row=1, kind="train", iteration=1)
    play(page, "sudoku-a", document)
    assert counter(page) == "8 / 8" and positions(page, ".masked") == set()
    assert "".join(GRID[:5]) in page.text(".play-flow")
    everything = set(range(FOLDED + 1))
    for step in range(7, -1, -1):
        page.page.keyboard.press("ArrowLeft")
        assert counter(page) == f"{step} / 8"
        assert positions(page, ":not(.masked)") == drawn_before(document, step)
        assert positions(page, ".masked") == everything - drawn_before(document, step)
        assert positions(page, ".new") == drawn_at(document, step - 1)
        written = sum(at == step - 1 for at in document["cells"]["step"])
        left = sum(at >= step for at in document["cells"]["step"])
        if step:
            told = f"Step {step} of 8: wrote {written} tokens where the model was least undecided; {left} still masked."
            assert page.text(".play-caption") == told
    assert "[MASK ×24]" in page.text("p.sr"), "what a screen reader reads hides what isn't revealed yet"
    page.page.keyboard.press("End")
    assert counter(page) == "8 / 8" and "[MASK" not in page.text("p.sr")
    page.page.keyboard.press("Home")
    assert counter(page) == "0 / 8"
    page.page.locator(".play-transport input").fill("3")
    assert counter(page) == "3 / 8" and "step=3" in page.page.url
    assert page.page.locator(".play-transport input").get_attribute("aria-valuetext") == "after 3 of 8 steps"


def test_it_opens_playing_and_space_pauses(browser: Any, page: Watched, service: Dashboard) -> None:
    """Once, and not where a step is asked for, nor for a reader who wants no motion."""
    document = sample(service, "sudoku-a", kind="train", iteration=1)
    with watched(browser, service.url, calm=True) as calm:
        play(calm, "sudoku-a", document, "")
        assert counter(calm) == "8 / 8" and calm.page.locator(".play-button").get_attribute("aria-label") == "Play"
    play(page, "sudoku-a", document, "?step=0")
    page.page.wait_for_timeout(1200)
    assert counter(page) == "0 / 8" and "all 24 positions are masked" in page.text(".play-caption")
    page.page.get_by_role("button", name="Copy link").click()
    page.shows(".toast")
    play(page, "sudoku-a", document, "?speed=4")
    page.wait_until("the first step", lambda: counter(page) != "0 / 8")
    assert "step=" not in page.page.url, "nobody chose one"
    page.wait_until("a state in the middle", lambda: counter(page) in {f"{n} / 8" for n in range(1, 7)})
    page.page.keyboard.press(" ")
    at = counter(page)
    page.page.wait_for_timeout(700)  # four steps' time
    assert counter(page) == at and page.page.locator(".play-button").get_attribute("aria-label") == "Play"
    page.page.locator(".play-button").click()
    page.wait_until("the end", lambda: counter(page) == "8 / 8")
    page.wait_until("a rest", lambda: page.page.locator(".play-button").get_attribute("aria-pressed") == "false")


def test_the_steps_that_the_update_drew_are_marked(page: Watched, service: Dashboard) -> None:
    document = sample(service, "sudoku-a", row=1, kind="train", iteration=2)
    play(page, "sudoku-a", document)
    for update, name in ((1, "Update 2"), (0, "Update 1")):
        page.page.get_by_role("button", name=name).click()
        scored = [step for step in document["scored"] if step["update"] == update]
        assert scored and page.page.locator("circle.play-drawn").count() == len(scored)
        rows = page.page.locator(".play-scroll tbody tr").all_inner_texts()
        assert [int(row.split("\t")[0]) for row in rows] == [step["step"] + 1 for step in scored]
        assert [row.split("\t")[1] for row in rows] == [f"×{step['count']}" for step in scored]
        tokens = {min(token["position"], FOLDED) for step in scored for token in step["tokens"]}
        assert positions(page, ".scored") == tokens
    page.page.locator(".play-scroll tbody tr").first.click()
    assert positions(page, ".scored") == {min(token["position"], FOLDED) for token in scored[0]["tokens"]}
    page.page.locator(f".play-cell[data-position='{min(tokens)}']").click()
    assert "Ratio new / old" in page.text(".play-facts >> nth=0")
    # Lanes have the scale of the whole batch, and what is rounding is drawn as nothing.
    assert f"largest dot weight {document['scales']['weight']:.2g}" in page.text(".play-axis")
    heights = "all => all.map((line) => Math.abs(line.getAttribute('y1') - line.getAttribute('y2')))"
    ratios = page.page.locator(".play-ratio line").evaluate_all(heights)
    assert max(ratios) < 0.01 * 34 < 34 * max(abs(step["log_ratio"]) for step in document["scored"]), (
        "moved by 1e-7 only"
    )
    page.page.get_by_role("button", name="Update 2").click()
    assert max(page.page.locator(".play-ratio line").evaluate_all(heights)) > 1, "control: moved by 0.05"


def test_drawn_masks_are_masks_and_no_steps(page: Watched, service: Dashboard) -> None:
    document = sample(service, "masks", row=1, kind="train")
    play(page, "masks", document)
    page.page.get_by_role("button", name="Update 1").click()
    assert page.page.locator(".play-drawn, .play-ratio").count() == 0, "they have no place among the steps"
    assert "The update scored 2 drawn masks." in str(page.page.locator(".play-axis svg").get_attribute("aria-label"))
    views = [view for view in document["scored"] if view["update"] == 0]
    rows = [row.split("\t") for row in page.page.locator(".play-scroll tbody tr").all_inner_texts()]
    assert [row[0] for row in rows] == ["mask 1", "mask 2"]
    assert [row[2:4] for row in rows] == [["0.5", "24"], ["−0.25", str(len(views[1]["tokens"]))]]
    assert "ratio" not in page.text(".play-scroll thead").lower(), "there is nothing to compare with"
    labels = page.page.locator(".play-strip").evaluate_all(
        "all => all.map((strip) => strip.getAttribute('aria-label'))"
    )
    assert labels == ["24 of 24 positions", f"{len(views[1]['tokens'])} of 24 positions"]
    within, without = (
        next(p for p in range(FOLDED) if (p in {token["position"] for token in views[1]["tokens"]}) == inside)
        for inside in (True, False)
    )
    for position, masks in ((within, ["mask 1", "mask 2"]), (without, ["mask 1"])):
        page.page.locator(f".play-cell[data-position='{position}']").click()
        facts = page.text(".play-facts >> nth=0")
        assert [name for name in ("mask 1", "mask 2") if f"Log-prob, {name} (update 1)" in facts] == masks
        assert "Ratio" not in facts
    page.page.get_by_role("button", name="Update 2").click()
    page.wait_until(
        "the other update's masks", lambda: page.text(".play-scroll tbody") != "\n".join(map("\t".join, rows))
    )


def test_branches_are_shown_with_their_rewards(page: Watched, service: Dashboard) -> None:
    document = sample(service, "branched")
    assert [branch["step"] for branch in document["branches"]] == [5, 5]
    play(page, "branched", document)
    rows = page.page.get_by_role("region", name="Branches").locator("tbody tr")
    assert rows.count() == 2
    for row, branch in zip(rows.all(), document["branches"], strict=True):
        cells = row.locator("td").all_inner_texts()
        assert cells[0] == "6" and cells[2] == ("✓ right" if branch["correct"] else "✗ wrong")
        assert float(cells[1]) == pytest.approx(branch["reward"], abs=1e-3) and "-" in cells[3].replace("−", "-")
    assert document["completion"] in rows.nth(1).inner_text()
    play(page, "masks", sample(service, "masks"))
    assert not page.page.get_by_role("region", name="Branches").count(), "control: a method without branches"


def test_colours_have_legends_and_say_something(page: Watched, service: Dashboard) -> None:
    document = sample(service, "gsm8k-a", kind="train")
    play(page, "gsm8k-a", document)

    def background(position: int) -> str:
        cell = page.page.locator(f".play-cell[data-position='{position}']")
        return str(cell.evaluate("cell => getComputedStyle(cell).backgroundColor"))

    drawn = [p for p in range(60) if document["cells"]["drawn"][p]]
    sure = min(drawn, key=lambda p: 1 - document["cells"]["confidence"][p])
    assert document["cells"]["confidence"][sure] > 0.999
    assert background(sure).rstrip(")").endswith("/ 0"), "what is sure has no colour"
    for mode in ("confidence", "entropy", "step"):
        page.page.get_by_role("button", name=mode.capitalize(), exact=True).click()
        by_value = sorted(drawn, key=lambda p: document["cells"][mode][p])
        assert background(by_value[0]) != background(by_value[-1])
        assert mode in page.text(".play-key .play-legend .sr").lower()
    page.page.keyboard.press("c")
    assert page.page.get_by_role("button", name="Confidence", exact=True).get_attribute("aria-pressed") == "true"


def test_the_order_of_the_batch_is_drawn_and_leads_to_positions(page: Watched, service: Dashboard) -> None:
    document = sample(service, "sudoku-a", row=2, kind="train", iteration=1)
    play(page, "sudoku-a", document)
    canvas = page.page.locator(".play-map canvas")
    assert "over 48 completions" in str(canvas.get_attribute("aria-label"))
    colours = canvas.evaluate(
        """canvas => {
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          const seen = new Set();
          for (let at = 0; at < data.length; at += 4) seen.add(data.slice(at, at + 3).join());
          return seen.size;
        }"""
    )
    assert colours > 8, "counts of many sizes"
    box = canvas.bounding_box()
    canvas.click(position={"x": 40, "y": 12})  # the first position, the first step
    assert counter(page) == "1 / 8" and positions(page, ".selected") == {0}
    assert box["width"] > 250
    bars = page.page.locator(".play-bars > div")
    assert [bar.split()[0] for bar in bars.all_inner_texts()] == ["1–4", "5–9", "10–14", "15–19", "20–24"]
    assert "Written earlier than by chance: positions 20–24" in page.text(".play-map ~ div >> p.note")
    assert bars.last.get_attribute("data-clear") == "true"


def test_two_completions_of_a_group_scrub_together(page: Watched, service: Dashboard) -> None:
    first = sample(service, "sudoku-a", row=0, kind="train", iteration=1)
    second = sample(service, "sudoku-a", row=1, kind="train", iteration=1)
    play(page, "sudoku-a", first)
    page.page.get_by_label("Beside it").select_option(str(second["id"]))
    page.wait_until("two completions", lambda: page.page.locator(".play-flow").count() == 2)
    page.shows(".play-axis svg")
    for step in (7, 6, 5):
        page.page.keyboard.press("ArrowLeft")
        for panel, document in enumerate((first, second)):
            assert positions(page, ":not(.masked)", panel) == drawn_before(document, step)
    assert drawn_before(first, 5) != drawn_before(second, 5), "control: they were written in other orders"
    assert page.page.locator(".play-rewards thead th").all_inner_texts() == ["completion 1", "completion 2"]
    shares = page.page.locator(".play-reward i").evaluate_all(
        "bars => bars.map((b) => b.style.getPropertyValue('--share'))"
    )
    largest = {"length": 0.25, "clues": 0.5, "cells": 3.0}
    wanted = [abs(one["rewards"][name]) / largest[name] for name in first["rewards"] for one in (first, second)]
    assert [float(share) for share in shares] == pytest.approx(wanted), "out of what the component can be"
    assert "0.25 of 0.25" in page.text(".play-rewards") and " of 3" in page.text(".play-rewards")


def test_base_and_trained_on_the_same_prompt(page: Watched, service: Dashboard) -> None:
    base = sample(service, "sudoku-a", kind="base")
    play(page, "sudoku-a", base)
    assert page.text("h1") == "base model"
    page.page.get_by_label("Beside it").select_option(label=page.page.locator("optgroup option").last.inner_text())
    page.wait_until("two completions", lambda: page.page.locator(".play-flow").count() == 2)
    assert page.page.locator(".play-text h2").all_inner_texts() == ["base model", "trained, iteration 3"]
    assert "What the update scored" not in page.text(".play-more"), "no card without content"


def test_odd_tokens_are_text(page: Watched, service: Dashboard) -> None:
    opened: list[str] = []
    page.page.on("dialog", lambda dialog: (opened.append(dialog.message), dialog.dismiss()))
    play(page, "sudoku-a", sample(service, "sudoku-a", row=7, kind="train", iteration=3))
    shown = page.page.locator(".play-flow .play-cell").all_inner_texts()
    assert shown[-1] == f"∎ ×{24 - len(ODD)}"
    assert shown[:3] == ODD[:3] and opened == []
    assert shown[3:8] == ["↵", " ⇥", "⟨00⟩", "⟨1B⟩[31m", "⟨202E⟩"]
    assert shown[8] == "⟨200B⟩" and shown[11:13] == ["∅", "␣␣␣"]
    assert ODD[9] in shown and ODD[13] in shown and ODD[14] in shown
    assert page.page.locator(".play-flow script, .play-flow b").count() == 0
    assert max(len(text) for text in shown) <= 61, "a token of 300 characters is cut"
    assert page.overflow() <= 0


@pytest.mark.parametrize("dark", [False, True])
def test_long_completions_fit_a_phone(browser: Any, service: Dashboard, dark: bool) -> None:
    document = sample(service, "gsm8k-a", row=1, kind="train")
    assert len(document["cells"]["text"]) == 384
    with watched(browser, service.url, phone=True, dark=dark) as page:
        play(page, "gsm8k-a", document, "?step=20")
        assert page.overflow() <= 0
        for _ in range(3):  # confidence, entropy, step
            assert faint_texts(page.page) == []
            page.page.keyboard.press("c")
        page.page.locator(".play-button").tap()
        page.wait_until("it plays", lambda: counter(page) != f"20 / {document['steps']}")


def test_without_a_sample_the_newest_is_played(page: Watched, service: Dashboard) -> None:
    page.open("/run/sudoku-a/play")
    page.shows(".play-cell")
    page.wait_until("the newest", lambda: page.text("h1") == "Iteration 3, completion 1")
    page.page.keyboard.press("n")
    page.wait_until("the next of the group", lambda: page.text("h1") == "Iteration 3, completion 2")


def test_a_run_without_samples_says_so(page: Watched) -> None:
    page.open("/run/empty/play")
    page.shows(".state", "No completion yet")


def test_a_damaged_sample_says_what_is_wrong(browser: Any, service: Dashboard) -> None:
    with watched(browser, service.url) as page:
        page.open("/run/broken/play")
        page.shows(".state.failed", "can't be played back")
        page.expect_errors("409")


def test_every_control_has_a_name_and_is_reached_by_tab(page: Watched, service: Dashboard) -> None:
    play(page, "sudoku-a", sample(service, "sudoku-a", kind="train", iteration=1))
    page.page.locator(".play-siblings a").first.focus()
    reached = []
    for _ in range(20):
        page.page.keyboard.press("Tab")
        reached.append(
            page.page.evaluate(
                """() => {
                  const at = document.activeElement;
                  const label = at.labels?.[0]?.textContent ?? "";
                  return [at.tagName, at.getAttribute("aria-label") ?? "", at.textContent, label].join("|");
                }"""
            )
        )
    assert any(name.startswith("BUTTON|Play|") for name in reached)
    assert any(name.startswith("INPUT|Denoising step|") for name in reached)
    assert any(name.startswith("SELECT|Speed|") for name in reached)
    nameless = [name for name in reached if not name.split("|", 1)[1].strip("| ")]
    assert nameless == []


def test_an_objective_without_terms_by_step_is_played_too(page: Watched, service: Dashboard) -> None:
    document = sample(service, "whole", kind="train")
    assert document["scored"] == [] and document["advantage"] != 0
    play(page, "whole", document)
    page.page.keyboard.press("ArrowLeft")
    assert counter(page) == "7 / 8"
    assert "the update left it out" in page.text(".play-more")
    assert page.page.locator("circle.play-drawn").count() == 0 and positions(page, ".scored") == set()
    assert "scored by the update" not in page.text(".play-key")
    play(page, "sudoku-a", sample(service, "sudoku-a", kind="train", iteration=1))  # the control
    assert "scored by the update" in page.text(".play-key")


def test_a_map_is_asked_for_only_where_there_is_one(page: Watched, service: Dashboard) -> None:
    """A 404 would be an error in the console, which ends the test."""
    base = sample(service, "sudoku-a", kind="base")
    assert base["has_order_map"] is False
    play(page, "sudoku-a", base)
    assert not [url for url in page.requests if "order-map" in url]
    play(page, "sudoku-a", sample(service, "sudoku-a", kind="train", iteration=1))
    assert [url for url in page.requests if "order-map" in url]


def test_following_a_run_plays_its_newest_completion(browser: Any, service: Dashboard) -> None:
    with playable(service.runs, "growing", iterations=9) as iterate, watched(browser, service.url) as page:
        iterate(1)
        page.wait_until("the new run", lambda: "growing" in service.get("/api/v1/runs").text)
        page.open("/run/growing/play?follow=1&speed=4")
        page.shows("h1", "Iteration 1, completion 1")
        page.wait_until("it plays to the end", lambda: counter(page) == "8 / 8")
        iterate(2)
        page.shows("h1", "Iteration 2, completion 1")
        page.page.get_by_role("button", name="Follow the run").click()
        page.wait_until("the end", lambda: counter(page) == "8 / 8")
        iterate(3)
        page.wait_until("the third", lambda: len(service.api("runs/growing/samples", iteration=3)["items"]) > 0)
        page.page.wait_for_timeout(4000)  # longer than a text stands
        assert page.text("h1") == "Iteration 2, completion 1"


def test_the_address_of_a_step_survives_a_reload(page: Watched, service: Dashboard) -> None:
    play(page, "sudoku-a", sample(service, "sudoku-a", kind="train", iteration=1))
    for _ in range(3):
        page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("c")
    page.page.reload()
    page.shows(".play-cell")
    assert counter(page) == "5 / 8"
    assert page.page.get_by_role("button", name="Entropy", exact=True).get_attribute("aria-pressed") == "true"
