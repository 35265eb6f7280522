"""Verdicts that graders failed to give are told, and too many end the run."""

import pytest

from learner.supply.verdicts import Verdicts
from rewards.errors import GradingFailed


def test_failures_are_told_at_the_first_and_at_every_doubling() -> None:
    told: list[str] = []
    verdicts = Verdicts(lambda level, kind, text: told.append(f"{level} {kind}: {text.partition(';')[0]}"))
    for number in range(40):
        verdicts.note(number % 2, "no verdict within 2 s")
    assert verdicts.failed == 20
    counts = ["1 verdict has", "2 verdicts have", "4 verdicts have", "8 verdicts have", "16 verdicts have"]
    assert told == [f"warning grader: {count} failed so far and count as wrong" for count in counts]


def test_the_reason_is_told() -> None:
    told: list[str] = []
    Verdicts(lambda level, kind, text: told.append(text)).note(3, "the grader ended with code 3")
    (text,) = told
    assert text == "3 verdicts have failed so far and count as wrong; the last one: the grader ended with code 3"


def test_a_batch_of_which_most_verdicts_failed_is_refused_with_the_reason() -> None:
    verdicts = Verdicts(lambda *_: None)
    verdicts.note(17, "the grader ended with code 3")
    verdicts.require_most("iteration 1", failed=16, asked=32)
    with pytest.raises(GradingFailed, match="17 of 32 verdicts of iteration 1 failed; .*ended with code 3; repair"):
        verdicts.require_most("iteration 1", failed=17, asked=32)
