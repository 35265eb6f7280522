"""The tables that README and docs/results.md show."""

import json
import subprocess
from pathlib import Path

import pytest

from learner import reproduce


def summary(base: float, trained: float) -> dict:
    return {
        "base": {"greedy": {"m": base, "m/4": 0.0}},
        "trained": {"greedy": {"m": trained, "m/4": 0.5}},
        "train_seconds": 61.4,
        "held_out_problems": 128,
    }


def test_table_has_every_seed_and_step_count_and_the_command_that_made_it() -> None:
    table = reproduce.results_table({0: summary(0.1, 0.7), 3: summary(0.2, 0.6)}, steps=8, command="the command")
    assert "| 0 | m = 8 | 0.100 | 0.700 | +0.600 | 61 s |" in table
    assert "| 3 | m/4 = 2 | 0.000 | 0.500 | +0.500 |  |" in table
    assert "**+0.500** (smallest +0.400)" in table and "`the command`" in table and "128 held-out" in table


def test_row_has_the_means_over_seeds_and_the_smallest_gain() -> None:
    row = reproduce.results_row("sudoku", {0: summary(0.1, 0.7), 3: summary(0.2, 0.6)})
    assert row == "| `sudoku` | 2 | 0.150 | 0.650 / 0.500 | **+0.500** (+0.400) |\n"


def test_only_the_recipes_block_and_row_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole command, with a run that is over already."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "reproduce-smoke-0"
    place.mkdir(parents=True)
    (place / "summary.json").write_text(json.dumps(summary(0.1, 0.7)))
    monkeypatch.setattr(subprocess, "run", lambda command, timeout: subprocess.CompletedProcess(command, 0))
    page = "a\n<!-- results:smoke -->\nold\n<!-- /results -->\n<!-- results:other -->\nkept\n<!-- /results -->\n"
    readme = "| recipe |\n|---|\n| `smoke` | old |\n| `smoke_too` | kept |\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(page)
    (tmp_path / "README.md").write_text(readme)
    assert reproduce.main(["recipes=smoke", "seeds=0"]) == 0
    table = (tmp_path / "docs" / "results.md").read_text().partition("smoke -->\n")[2].partition("<!--")[0]
    assert table.startswith("| seed |") and "recipes=smoke" in table
    assert (tmp_path / "docs" / "results.md").read_text() == page.replace("old\n", table)
    row = reproduce.results_row("smoke", {0: summary(0.1, 0.7)})
    assert (tmp_path / "README.md").read_text() == readme.replace("| `smoke` | old |\n", row)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("recipe", ["sudoku", "countdown"])
def test_the_pages_have_places_for_both_recipes(recipe: str) -> None:
    assert f"<!-- results:{recipe} -->\n" in (ROOT / "docs" / "results.md").read_text()
    assert f"\n| `{recipe}` | 3 |" in (ROOT / "README.md").read_text()


def test_wrong_seeds_are_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["seeds=one"]) == 2
    assert capsys.readouterr().err.startswith("error: seeds=one ")
