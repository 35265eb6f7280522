"""Trained policies beside the best of n from their base: every figure from evaluations as they lie on disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from learner.evaluation.best_of_n import (
    GREEDY,
    comparison,
    greedily,
    newest_sampled,
    read_sampled,
    training_forwards,
    variety,
)
from rewards.errors import ConfigError

SAMPLER = {"steps": 4, "position_rule": "random", "temperature": 1.0, "completion_length": 8}


def write_evaluation(
    folder: Path, policy: str, right: list[list[int]], texts: list[str] | None = None, **figures: Any
) -> Path:
    """Two problems a chunk; the reward is 1 more than the verdict. The chunks are not in order, and one comes twice; a
    cell of another sampler has the same label."""
    folder.mkdir(parents=True)
    about = {"mean_nfe": 4.0, "distinct_share": 1.0, "distance": 0.5, "distance_between_problems": 0.75} | figures
    label = "sampled x4 random 4 steps"
    cell = {"key": f"{label} 0123", "decoding": "sampled", "samples": 4, policy: about, **SAMPLER}
    (folder / "results.json").write_text(json.dumps({"cells": [{"decoding": "greedy", policy: {}}, cell]}))
    problems = [
        {
            "id": f"p{n}",
            "correct": of_one,
            "components": {"a": of_one, "b": [1.0] * 4},
            "completions": texts or list("abcd"),
        }
        for n, of_one in enumerate(right)
    ]
    chunk = {"cell": cell["key"], "policy": policy, "grader_failures": 0, "generate_s": 1.0}
    lines = [{**chunk, "chunk": at, "problems": problems[2 * at : 2 * at + 2]} for at in (1, 0, 1)]
    others = [dict(lines[0], policy="other"), dict(lines[0], cell=f"{label} 4567")]
    text = "".join(json.dumps(row) + "\n" for row in [{"settings": {}}, *others, *lines])
    (folder / "results.jsonl").write_text(text)
    return folder


def write_run(run: Path, right: list[list[int]], forwards: list[float], **figures: Any) -> Path:
    write_evaluation(run / "evaluations" / "x", "adapter", right, **figures)
    rows = [{"iteration": 0, "eval/m/solve_rate": 0.0}]
    rows += [{"iteration": n, "forward_equivalents": spent} for n, spent in enumerate(forwards, start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.slow
def test_the_base_gets_as_many_completions_as_the_training_took_forwards(tmp_path: Path) -> None:
    seldom, often = [[0, 0, 0, 1], [0] * 4, [0, 1, 0, 0], [0] * 4], [[1, 1, 1, 0], [1] * 4, [1, 0, 1, 1], [1] * 4]
    base = read_sampled(write_evaluation(tmp_path / "base", "base", seldom), "base")
    run = write_run(tmp_path / "run", often, [8.0, 24.0], naturalness={"value": -1.5})
    assert training_forwards(run) == 32.0
    told = comparison(base, {run: newest_sampled(run)})
    # 32 forwards for 4 problems are 8 each, and 4 of the trained policy's own completion: 3 of the base's.
    row = next(line for line in told.splitlines() if line.startswith("| base, best of 3 |"))
    assert row.split("|")[2].split()[0] == f"{(2 * 3 / 4) / 4:.3f}", "pass@3 where one of 4 is right is 3/4"
    assert row.split("|")[3].split()[0] == "1.38"  # best@3: 1 more
    single = next(line for line in told.splitlines() if line.startswith("| trained, one"))
    assert single.split("|")[2].split()[0] == "0.875" and single.endswith("| 1.00 | 0.50 | 0.75 | -1.50 |")
    assert "took 32 forwards, as many as 3 completions" in told and "seeds" not in told
    # 4 / (2 / 16) = 32 forwards for a right one before, 4 / 0.875 after: 32 / (32 - 4.57) pays.
    assert "takes 32.0 forwards from the base and 4.6 from a trained policy" in told
    assert "training has paid after 1 right ones." in told
    assert told.rstrip().endswith("come 10 right ones from the base, and 63 when the first tenth is spent on training.")


def test_right_and_different_ones_and_reward_at_equal_diversity(tmp_path: Path) -> None:
    right = [[1, 1, 0, 0]] * 4
    base = read_sampled(write_evaluation(tmp_path / "base", "base", right), "base")
    same = write_run(tmp_path / "same", right, [1.0], texts=["a"] * 4)
    told = variety(base, {same: newest_sampled(same)}).splitlines()
    assert told[0].startswith("Of 4 completions of each problem")
    # "a" and "b" are right in all four problems, and "c" and "d" wrong: rewards 2, 2, 1, 1.
    assert told[-2:] == [
        "| base | 2.00 [2.00, 2.00] | 2.0 | 1.50 [1.50, 1.50] |",
        "| same | 1.00 [1.00, 1.00] | 1.0 | 0.50 [0.50, 0.50] |",
    ]


def test_greedy_rates_have_intervals_over_problems_and_seeds(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run, after in zip(runs, (0.5, 0.7), strict=True):
        run.mkdir()
        rows = [{"iteration": n, GREEDY: rate, "eval/problems": 100.0} for n, rate in ((0, 0.1), (9, after))]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = greedily(runs).splitlines()
    assert told[-3].startswith("| a | 0.100 [0.055, 0.174] | 0.500 [0.404, 0.596] |")
    # A variance of 0.02 over two runs, and 0.24 over 100 problems.
    half = 1.96 * (0.02 / 2 + 0.24 / 100) ** 0.5
    assert told[-1] == f"| mean | | 0.600 [{0.6 - half:.3f}, {0.6 + half:.3f}] |"
    assert greedily([*runs, tmp_path]) == "", "no evaluation of its own"


def test_more_than_was_drawn_is_said(tmp_path: Path) -> None:
    base = read_sampled(write_evaluation(tmp_path / "base", "base", [[0, 0, 0, 1]] * 4), "base")
    runs = [write_run(tmp_path / name, [[0] * 4] * 4, [spent]) for name, spent in (("a", 160.0), ("b", 320.0))]
    told = comparison(base, {run: newest_sampled(run) for run in runs})
    assert "as many as 11 to 21 completions" in told and "(no more than 4 were drawn)" in told
    assert "over seeds and problems" in told and told.rstrip().endswith("wrote nothing right.")


def test_what_can_not_be_compared_is_refused(tmp_path: Path) -> None:
    base = read_sampled(write_evaluation(tmp_path / "base", "base", [[0] * 4] * 4), "base")
    other = write_run(tmp_path / "other", [[0] * 4] * 3, [1.0])
    with pytest.raises(ConfigError, match="other problems than the base"):
        comparison(base, {other: newest_sampled(other)})
    with pytest.raises(ConfigError, match="no samples of the adapter"):
        read_sampled(tmp_path / "base", "adapter")
    with pytest.raises(ConfigError, match="has no evaluation"):
        newest_sampled(tmp_path / "base")
    with pytest.raises(ConfigError, match="no iterations"):
        training_forwards(tmp_path / "base")
    with pytest.raises(ConfigError, match="no evaluation that can be read"):
        read_sampled(tmp_path, "base")
