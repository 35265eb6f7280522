"""Comparisons of methods in the dashboard: the API's answers and the page."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.comparison.cells import Findings, tuning_cells
from services.dashboard.comparisons import comparison_files, read_comparison
from services.dashboard.evaluations import evaluations
from tests.support.browsers import watched
from tests.support.compared import all_done, plan, written
from tests.support.dashboards import Dashboard, dashboard

HOSTILE = "<img src=x onerror=document.title='owned'>"


def leave_comparisons(runs: Path) -> dict[str, Any]:
    """A whole one in the folder of runs, one that is under way in a folder in it, and files that are none. The first
    one's report."""
    config = plan("statistics.resamples=200")
    found = all_done(config, {"agrpo": 0.75, "wd1": 0.5})
    report = written(runs, config, found)
    noise = {"batches": 8, "value": 12.5, "interval": [9.0, None], "signal_fe": 25_000.0, "update_fe": 2000.0}
    report["methods"]["agrpo"]["gradient_noise"] = noise
    report["methods"]["wd1"]["gradient_noise"] = {"failed": "it ran out of time"}
    (runs / "results.json").write_text(json.dumps(report))
    tuning = tuning_cells(config, "agrpo")
    part = {cell.name: found[cell.name] for cell in tuning}
    bad = tuning_cells(config, "wd1")[0]
    written(runs / "part", config, part | {bad.name: Findings(bad.key, HOSTILE, {})})
    for name, text in {"list": "[]", "text": "no JSON", "evaluation": '{"cells": []}', "deep": "[" * 10**5}.items():
        (runs / name).mkdir()
        (runs / name / "results.json").write_text(text)
    (runs / "nan").mkdir()
    odd = json.loads(json.dumps(report))
    odd["methods"]["wd1"]["spent"] = float("nan")
    (runs / "nan" / "results.json").write_text(json.dumps(odd))
    (runs / "link").symlink_to(runs / "part")
    return report


@pytest.mark.slow
def test_what_is_no_comparison_is_none(tmp_path: Path) -> None:
    leave_comparisons(tmp_path)
    read = {name: read_comparison(path) for name, path in comparison_files(tmp_path).items()}
    assert {name for name, comparison in read.items() if comparison} == {tmp_path.name, "part"}
    assert "link" not in read and set(read) >= {"list", "text", "evaluation", "deep", "nan"}
    assert read_comparison(tmp_path / "nowhere" / "results.json") is None


def test_what_is_no_evaluation_is_none(tmp_path: Path) -> None:
    rate = {"value": 0.5, "interval": [0.4, 0.6], "method": "wilson"}
    cell = {
        "label": "greedy",
        "decoding": "greedy",
        "samples": 1,
        "steps": 8,
        "base": {"solve_rate": rate, "solved": 4},
    }
    whole = {"statistics": {"confidence": 0.95}, "problems": 8, "complete": True, "unfinished": [], "cells": [cell]}
    texts = {"good": json.dumps(whole), "list": "[]", "text": "no JSON", "deep": "[" * 10**5, "part": '{"cells": []}'}
    texts["nan"] = json.dumps({**whole, "problems": float("nan")})
    for name, text in texts.items():
        (tmp_path / "evaluations" / name).mkdir(parents=True)
        (tmp_path / "evaluations" / name / "results.json").write_text(text)
    (tmp_path / "evaluations" / "link").symlink_to(tmp_path / "evaluations" / "good")
    (tmp_path / "evaluations" / "pipe").mkdir()
    os.mkfifo(tmp_path / "evaluations" / "pipe" / "results.json")
    (found,) = evaluations(tmp_path)
    assert (found.name, found.problems, found.confidence) == ("good", 8, 0.95)
    assert found.cells[0].base is not None and found.cells[0].base.rates["solve_rate"].interval == (0.4, 0.6)
    assert evaluations(tmp_path / "nowhere") == []


@pytest.mark.slow
def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    config = plan("statistics.resamples=200")
    written(tmp_path, config, {})
    before = read_comparison(tmp_path / "results.json")
    assert before is not None and not before.complete
    report = written(tmp_path / "new", config, all_done(config, {"agrpo": 0.75, "wd1": 0.5}))
    (tmp_path / "new" / "results.json").replace(tmp_path / "results.json")
    after = read_comparison(tmp_path / "results.json")
    assert after is not None and after.complete == report["complete"] is True


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    runs = tmp_path_factory.mktemp("compared")
    leave_comparisons(runs)
    with dashboard(runs) as found:
        yield found


@pytest.mark.slow
def test_the_api_tells_what_was_found(service: Dashboard) -> None:
    listed = service.api("comparisons")["items"]
    assert [(item["name"], item["complete"]) for item in listed] == [(service.runs.name, True), ("part", False)]
    report = json.loads((service.runs / "results.json").read_text())
    answer = service.api(f"comparisons/{service.runs.name}")
    for name, method in report["methods"].items():
        told = answer["methods"][name]
        for part in ("solve_rate", "difference", "base", "runs", "spent"):
            assert told[part] == method[part]
        assert told["curve"]["solve_rate"] == method["curve"]["solve_rate"]
        assert told["point"] == {"learner.lr": "0.001"}
    noise = [answer["methods"][name]["gradient_noise"] for name in ("agrpo", "wd1")]
    assert [each["value"] for each in noise] == [12.5, None] and noise[0]["interval"] == [9.0, None]
    assert "solved" not in json.dumps(answer), "each problem's outcome stays in the file"
    for name in ("nowhere", "nan", "list", "..", "%2e%2e", "part%2fresults.json"):
        assert service.get(f"/api/v1/comparisons/{name}").status_code == 404, name


@pytest.mark.slow
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_the_page_shows_tables_and_curves(browser: Any, service: Dashboard, phone: bool) -> None:
    pytest.importorskip("playwright.sync_api", reason="the pages are tested with playwright")
    with watched(browser, service.url, phone=phone) as page:
        page.open("/runs")
        page.shows("a[href='#/comparisons']").click()
        page.shows("a", service.runs.name).click()
        page.shows("[data-chart=by-work] .main-svg")
        page.page.locator("[data-chart=by-time]").scroll_into_view_if_needed()  # drawn when it is about to be seen
        page.shows("[data-chart=by-time] .main-svg")
        first = page.shows("tbody tr", "agrpo").text_content()
        assert "75.0%" in first and "lr 0.001" in first
        noisy = page.shows("table:has-text('Noise / signal') tbody tr", "agrpo").text_content()
        assert "12.5 9.00 to no end" in noisy and "25,000" in noisy
        assert "-25.0%" in page.text("tbody tr:nth-child(2)").replace("−", "-")
        assert page.overflow() <= 0
        page.open("/comparisons/part")
        page.shows(".banner", HOSTILE)
        page.shows(".note", "Not done yet")
        assert page.overflow() <= 0 and page.page.title() != "owned"
