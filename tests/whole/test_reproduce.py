"""The tables that the README shows."""

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


def test_readme_block_is_replaced_and_the_rest_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "before\n<!-- results:sudoku -->\nold\n<!-- /results -->\n<!-- results:other -->\nkept\n<!-- /results -->\n"
    Path("README.md").write_text(text)
    reproduce._into_readme("sudoku", "new\n")
    assert Path("README.md").read_text() == text.replace("old\n", "new\n")


def test_wrong_seeds_are_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["seeds=one"]) == 2
    assert capsys.readouterr().err.startswith("error: seeds=one ")
