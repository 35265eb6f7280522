"""Playback of prompts with gaps: what stands around them is shown on both sides, on the page and in its picture."""

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.browsers import Watched
from tests.support.dashboards import Dashboard, dashboard
from tests.support.gapped import Gapped
from tests.support.playable_runs import GRID, write_gapped, write_playable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

GAPPED: dict[str, tuple[list[str], list[list[str]]]] = {
    "one-gap": (["left", "right"], [["1234"], ["56"]]),
    "two-gaps": (["aaa", "aaaa", "a"], [["123456", "789"], ["1b2c", "7 9"]]),
    "long": (["x" * 400 + "left", "right" + "y" * 400], [["1234"]]),
}
"""Of each run the texts around the gaps, and of each completion what it has in them; gaps have several lengths."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    runs = tmp_path_factory.mktemp("gaps")
    for name, (around, rows) in GAPPED.items():
        write_gapped(runs, name, Gapped(), {"letter": "a", "of": "train", "n": 0}, around, rows)
    write_playable(runs, "none", iterations=1, scored="nothing")
    with dashboard(runs) as found:
        yield found


def completions(service: Dashboard, run: str) -> list[int]:
    """By row."""
    items: list[dict[str, Any]] = service.api(f"runs/{run}/samples", kind="train")["items"]
    return [item["id"] for item in sorted(items, key=lambda item: (item["group_id"], item["row"]))]


@pytest.mark.parametrize("run", ["one-gap", "two-gaps"])
def test_text_around_gaps_stands_on_both_sides(page: Watched, service: Dashboard, run: str) -> None:
    around, rows = GAPPED[run]
    for sample, gaps in zip(completions(service, run), rows, strict=True):
        page.open(f"/run/{run}/play/{sample}?step=99")
        page.shows(".play-context", around[0])
        shown = [("play-context", around[0])]
        masked = around[0]
        for gap, text in zip(gaps, around[1:], strict=True):
            shown += [("play-gap", gap.replace(" ", "␣")), ("play-context", text)]
            masked += f"[MASK ×{len(gap)}]{text}"
        parts = page.page.locator(".play-flow > *").evaluate_all("all => all.map((e) => [e.className, e.textContent])")
        assert [tuple(part) for part in parts] == shown
        assert page.page.locator(".play-cell.masked").count() == 0
        page.page.keyboard.press("Home")
        assert page.page.locator(".play-gap .play-cell.masked").count() == sum(map(len, gaps))
        assert page.text("p.sr").endswith(masked)
        assert page.page.locator(".play-flow .play-context").evaluate_all(
            "all => all.every((e) => e.checkVisibility() && getComputedStyle(e).color !== 'rgba(0, 0, 0, 0)')"
        )


def test_without_gaps_nothing_is_marked_as_one(page: Watched, service: Dashboard) -> None:
    page.open(f"/run/none/play/{completions(service, 'none')[0]}?step=0")
    page.shows(".play-cell.masked")
    assert page.page.locator(".play-gap, .play-context").count() == 0


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ("two-gaps", "aaa123456aaaa789a"),
        ("long", f"…{'x' * 296}left1234right{'y' * 295}…"),
        ("none", "".join(GRID[:9])),
    ],
)
def test_a_picture_has_the_text_around_gaps(service: Dashboard, run: str, text: str) -> None:
    """Of a long one what stands beside the gap."""
    answer = service.get(f"/api/v1/runs/{run}/samples/{completions(service, run)[0]}/animation")
    picture = ElementTree.fromstring(answer.text)
    texts = [element.text or "" for element in picture.iter() if element.tag.endswith("}text")]
    before = next(place for place, each in enumerate(texts) if each.startswith("Step 0 of"))
    assert text in "".join(texts[:before])
