"""How many different completions there are, and what they are worth when they must be different."""

import itertools

import numpy as np
import pytest

from learner.evaluation.variety import diverse_best, expected_distinct


@pytest.mark.parametrize("k", [1, 2, 3])
def test_different_texts_are_those_of_all_choices(k: int) -> None:
    """Two problems of three completions each; "-" doesn't count."""
    written = [["a", "a", "b"], ["a", "-", "c"]]
    chosen = [
        len((set(first) | set(second)) - {"-"})
        for first in itertools.combinations(written[0], k)
        for second in itertools.combinations(written[1], k)
    ]
    counted = [[text for text in texts if text != "-"] for texts in written]
    assert expected_distinct(counted, 3, k) == pytest.approx(np.mean(chosen))


def test_control_a_text_for_every_problem_counts_once() -> None:
    assert expected_distinct([["a"] * 4, ["a"] * 4], 4, 2) == 1
    assert expected_distinct([["a"] * 4, ["b"] * 4], 4, 2) == 2
    assert expected_distinct([[], []], 4, 2) == 0
    with pytest.raises(ValueError, match="5 of 4"):
        expected_distinct([[]], 4, 5)


def test_the_best_that_are_apart() -> None:
    texts, rewards = ["aaaa", "aaab", "bbbb", "cccc"], [4.0, 3.0, 2.0, 1.0]
    assert diverse_best(texts, rewards, 2, 0.5) == 3.0  # "aaab" lies too near to "aaaa"
    assert diverse_best(texts, rewards, 2, 0.25) == 3.5
    assert diverse_best(["aaab", "aaaa"], [4.0, 4.0], 1, 0.5) == 4.0


def test_control_one_text_for_all_is_worth_a_share() -> None:
    assert diverse_best(["aaaa"] * 8, [4.0] * 8, 4, 0.5) == 1.0
