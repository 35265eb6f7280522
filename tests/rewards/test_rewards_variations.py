r"""Golds with one thing changed are wrong, golds in another spelling are right: any gold, not chosen cases."""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from rewards.maths import symbolic
from rewards.maths.equivalence import equivalent
from tests.support.answer_golds import GOLDS
from tests.support.answer_variations import flips, rewrites

FILES = ("math_train", "math_test_rest", "math500_test")
MOST_LOST = 0.005

SAME_BY_OUR_RULES = {
    (r"A \cup B", r"B \cup A"),
    ("(a+b)^2 - c", "(b+a)^2 - c"),
    (r"\frac{-b \pm \sqrt{b^2-4 a c}}{2 a}", r"\frac{-b \pm \sqrt{b^2-4 c a}}{2 a}"),
    ("A B - B A", "B A - B A"),  # letters are numbers, so both are 0
    ("A B - B A", "A B - A B"),
    (r"\frac{d y}{d x} = -\frac{x}{y}", r"\frac{y d}{d x} = -\frac{x}{y}"),
    (r"\frac{d y}{d x} = -\frac{x}{y}", r"\frac{d y}{x d} = -\frac{x}{y}"),
    ("3 - 2f(x)", "3 - 2x(f)"),
    ("49x^2 - 42xy + 9y^2 - 222x - 54y + 603 = 0", "49x^2 - 42yx + 9y^2 - 222x - 54y + 603 = 0"),
    ("a + b + c", "b + a + c"),
    ("a + b + c", "a + c + b"),
}
"""Flips that leave the value and that math-verify takes for another answer."""


@pytest.fixture(scope="module", autouse=True)
def helper() -> None:
    assert symbolic.start()


def changes(golds: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(what was done, gold, flipped) of all flips but those that leave the value as it is: a zero with a sign, letters
    of a unit's word (a number stands with any), the order of choices."""
    for gold in golds:
        for kind, flipped in flips(gold):
            a_unit = re.search(r"[0-9}]\s*(?:\\,)?\s*\\(?:text|mbox|textnormal)", gold) and kind in ("text", "letters")
            a_zero = kind == "sign" and re.match(r"0(?![0-9.])", gold)
            choices = kind == "text" and re.fullmatch(r"\\text\{[A-Z](, ?[A-Z])+\}", gold)
            if flipped == gold or a_unit or a_zero or choices:
                continue
            if (gold, flipped) not in SAME_BY_OUR_RULES:
                yield kind, gold, flipped


def accepted(golds: Iterable[str]) -> tuple[list[tuple[str, str, str]], int]:
    """The changes that are taken for the gold answer, but for those that math-verify, which reads by itself, finds
    equal too (two letters of a sum exchanged), and how many were tried."""
    tried = list(changes(golds))
    taken = [change for change in tried if equivalent(*change[1:]).correct]
    return [change for change in taken if not equal_to_others(*change[1:])], len(tried)


def equal_to_others(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    trees = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*trees, timeout_seconds=None))


def lost(golds: Iterable[str]) -> tuple[list[tuple[str, str, str]], int]:
    """The rewrites that are not taken for the gold answer, and how many were tried."""
    tried = [(kind, gold, text) for gold in golds for kind, text in set(rewrites(gold)) if text != gold]
    return [(kind, gold, text) for kind, gold, text in tried if not equivalent(gold, text).correct], len(tried)


def test_changes_of_our_own_golds_are_wrong() -> None:
    taken, tried = accepted(GOLDS)
    assert taken == [] and tried > 900


def test_rewrites_of_our_own_golds_are_right() -> None:
    refused, tried = lost(GOLDS)
    assert refused == [] and tried > 1900


def test_letters_and_digits_alone_do_not_tell_the_changes_apart() -> None:
    """The control: what compares less than the signs accepts many, and what compares the spelling loses rewrites."""
    letters = [re.sub(r"[\W_]", "", gold) == re.sub(r"[\W_]", "", flipped) for _, gold, flipped in changes(GOLDS)]
    assert sum(letters) > 100
    spelling = [gold == "".join(text.split()) for gold in GOLDS for _, text in rewrites(gold) if text != gold]
    assert sum(spelling) < len(spelling) / 2


@pytest.mark.slow
def test_changes_and_rewrites_of_published_golds(shared: Path) -> None:
    golds = sorted({gold for name in FILES for gold in _golds(shared / "data" / f"{name}.jsonl.gz")} - {""})
    taken, changed = accepted(golds)
    refused, rewritten = lost(golds)
    print(f"{len(golds)} golds: {len(taken)} of {changed} flips accepted, {len(refused)} of {rewritten} rewrites lost")
    assert taken == [] and changed > 25_000
    assert len(refused) <= MOST_LOST * rewritten, refused[:20]


def _golds(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["answer"].strip() for line in file]
