"""Plots: all themes from full metrics, and no crash on what a young or broken run leaves."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from learner.reporting.curves import main as curves
from learner.reporting.plots import main, plot_run, read_series
from rewards.errors import UnmaskError

REPOSITORY = Path(__file__).resolve().parents[2]
THEMES = ["reward", "solve_rate", "entropy", "clip_fraction", "staleness", "tokens_per_s"]


def row(iteration: int) -> dict[str, float | int | None]:
    return {
        "iteration": iteration,
        "reward/mean": 1.0,
        "reward/a_$x^{": 0.5,  # a user's component name, which must not be read as a formula
        "solve_rate": 0.2,
        "eval/m/solve_rate": 0.3,
        "eval/m/4/solve_rate": 0.1,
        "entropy": 0.0,
        "clip_fraction/low": 0.0,
        "clip_fraction/high": 0.01,
        "staleness/mean": 0.0,
        "staleness/max": 0.0,
        "machine/tokens_per_s": 0.0,
    }


@pytest.fixture
def write(tmp_path):
    def write(rows: list[dict], tail: str = "") -> Path:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        return tmp_path

    return write


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.mark.parametrize("iterations", [1, 2, 45])
@pytest.mark.slow
def test_every_theme_is_drawn(write, iterations):
    written = plot_run(write([row(i) for i in range(1, iterations + 1)]))
    assert names(written) == [*THEMES, "overview"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_missing_series_are_left_out(write):
    assert names(plot_run(write([{"iteration": 1, "entropy": 0.5, "loss": 1.0}]))) == ["entropy", "overview"]
    assert names(plot_run(write([{"iteration": 1, "staleness/max": 2}]))) == ["staleness", "overview"]


def test_nothing_to_draw_is_no_error(write, capsys):
    assert plot_run(write([])) == []
    assert plot_run(write([{"iteration": 1, "entropy": None, "nonfinite": ["entropy"]}], tail='{"iterat')) == []
    assert main([str(write([]))]) == 0 and "nothing to plot" in capsys.readouterr().out


def test_nulls_are_gaps_and_the_last_report_counts():
    rows = [{"iteration": 2, "a": 2.0}, {"iteration": 1, "a": 1.0}, {"iteration": 3, "a": None, "nonfinite": ["a"]}]
    series = read_series([*rows, {"iteration": 2, "a": 9.0}])
    assert list(series) == ["a"]
    assert series["a"][0].tolist() == [1, 2] and series["a"][1].tolist() == [1.0, 9.0]


def test_the_picture_shows_the_numbers(write):
    from matplotlib.image import imread

    def picture(value: float) -> np.ndarray:
        folder = write([{"iteration": i, "entropy": value * i} for i in range(1, 30)])
        return imread(plot_run(folder)[0])

    assert np.array_equal(picture(0.5), picture(0.5)) and not np.array_equal(picture(0.5), picture(-0.5))


def test_no_run_is_one_sentence(tmp_path, capsys):
    with pytest.raises(UnmaskError, match="no metrics at"):
        plot_run(tmp_path)
    assert main([str(tmp_path)]) == 1 and capsys.readouterr().err.startswith("error: no metrics at")
    assert main([]) == 2


@pytest.mark.slow
def test_as_a_command_matplotlib_needs_no_display_and_is_loaded_late(write):
    folder = write([row(1)])
    command = [sys.executable, "-m", "learner.reporting.plots", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and str(folder / "plots" / "overview.png") in done.stdout, done.stderr
    code = "import sys, learner.reporting.plots, learner.reporting.reporter; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=100).returncode == 0


def test_runs_share_axes(tmp_path, capsys):
    for name, iterations in (("a", 3), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row(i)) + "\n" for i in range(1, iterations + 1))
        )
    folders = [str(tmp_path / "a"), f"{tmp_path / 'b'}=another, sick"]
    assert curves([*folders, "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert curves([*folders, "--out", str(tmp_path / "curves.png"), "--metric", "nope"]) == 1
    assert "no run has the metric nope; there are clip_fraction/high" in capsys.readouterr().err
    assert curves([str(tmp_path / "c")]) == 1
