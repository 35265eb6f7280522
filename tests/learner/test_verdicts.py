"""Verdicts that graders failed to give are told, and too many end the run."""

from dataclasses import replace

import pytest

from learner.supply.verdicts import Verdicts
from rewards.errors import GradingFailed
from rollout.messages import GradingFault

DIED = GradingFault("grader", "died", "the grader ended with code 3")
HUNG = GradingFault("grader", "hung", "no verdict within 2 s")


class Told:
    def __init__(self) -> None:
        self.faults: list[tuple[str, str, str, int]] = []

    def __call__(self, part: str, cause: str, text: str, **cost: int) -> None:
        self.faults.append((part, cause, text, cost["times"]))


def test_failures_are_told_at_the_first_and_at_every_doubling() -> None:
    told = Told()
    verdicts = Verdicts(told)
    for number in range(40):
        verdicts.note([HUNG] * (number % 2))
    assert verdicts.failed == 20
    counts = ["1 verdict has", "2 verdicts have", "4 verdicts have", "8 verdicts have", "16 verdicts have"]
    text = "failed so far and count as wrong; the last one: no verdict within 2 s"
    times = [1, 1, 2, 4, 8]
    assert told.faults == [("grader", "hung", f"{c} {text}", t) for c, t in zip(counts, times, strict=True)]


def test_each_kind_is_told_by_itself() -> None:
    told = Told()
    verdicts = Verdicts(told)
    replaced = replace(HUNG, graded=True)
    verdicts.note([HUNG, DIED, replaced, replaced, GradingFault("judge", "failed", "the judge's server is busy")])
    assert verdicts.failed == 3, "what another grader gave is no failure"
    assert [(part, cause) for part, cause, _, _ in told.faults] == [
        ("grader", "hung"),
        ("grader", "died"),
        ("grader", "hung"),
        ("grader", "hung"),
        ("judge", "failed"),
    ]
    again = "graders that hung were replaced so far, and others gave the verdicts; the last one: no verdict within 2 s"
    assert [text for _, _, text, _ in told.faults][3] == f"2 {again}"


def test_a_batch_of_which_most_verdicts_failed_is_refused_with_the_reason() -> None:
    verdicts = Verdicts(Told())
    verdicts.note([DIED] * 17)
    verdicts.require_most("iteration 1", failed=16, asked=32)
    with pytest.raises(GradingFailed, match="17 of 32 verdicts of iteration 1 failed; .*ended with code 3; repair"):
        verdicts.require_most("iteration 1", failed=17, asked=32)
