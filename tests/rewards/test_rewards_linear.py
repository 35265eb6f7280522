"""Graders on hostile text: linear in its length, and what replaced a quadratic expression finds the same matches."""

import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rewards.parsing import has_thinking
from rewards.protocols.d1 import _SOFT_FORMAT
from rewards.protocols.math_verify_raw import MAX_DEPTH, finding
from rewards.protocols.texts import boxes_to_a_brace
from rewards.task import BUILT_IN, get_task
from rewards.tasks.code import code_in

LENGTH = 16_000
CHEAP_S = 0.015
"""CPU time within which no growth is looked at: linear graders need less for LENGTH characters."""
MOST_S = 0.5
"""CPU time of any verdict. A grader is killed after rollout.grade_timeout_s = 2 s."""
GROWTH = 8.0
"""Of the time, for four times the text: 4 when it is linear, 16 when it is quadratic."""

ATOMS = [
    *("<think>", "</think>", "<THINK>", "<answer>", "</answer>", "<reasoning>", "</reasoning>", "<", "<answer"),
    *("\\boxed{", "\\boxed ", "\\boxed", "\\fbox{", "\\frac{", "\\frac", "\\sqrt", "\\text{", "\\left("),
    *("{", "}", "(", ")", "[", "]", "(1+", "((", "1)", "\\(", "\\)", "\\{", "\\\\", "\\", "$", "\\$", "%", "|", "&"),
    *("1", "12,", "1,", "1.", "1 ", "0", "1/", "1=", "=1", "1^", "x^{", "1+1=", "1e5", "0.\\overline{1}", "{,}"),
    *("\u0663", "\u00b2", "\u00bd", "\u00e9", "\u200b", "\0", "\ud800", "+", "-", "--", "*", "**", "/", "=", "^"),
    *(" ", "\n", "\t", "\r\n", "a", "a ", ". ", "; ", "####", "answer is", "answer: ", "the answer to the problem "),
    *("_", "!", "1,000", "\\begin{pmatrix}", "\\cup "),
    *("so ", "or ", "not ", "<<1", "<|", "<|eot_id|>", "```", "```python\n", "```1 ", "`", "def f(x):\n"),
    *("~~~", '"""', "'''", "</answer", "</answer}", "boxed{", "\\\\boxed{", "boxed   ", "\u2212", "\\left("),
]  # fmt: skip
FRAMES = [
    *(("", ""), ("<answer>", "</answer>"), ("<answer>\\boxed{", "}</answer>"), ("<reasoning>", ""), ("$", "$")),
    *(("The answer is ", "."), ("<think>", "</think>"), ("1", "=6"), ("", "</answer>")),
]
MIXTURES = 250


def filled(before: str, atom: str, after: str, length: int) -> str:
    return before + atom * ((length - len(before) - len(after)) // len(atom)) + after


def hostile() -> Iterator[tuple[str, str, str]]:
    """What begins, fills and ends a text: each atom in each frame, and mixtures of two to four."""
    yield from ((before, atom, after) for before, after in FRAMES for atom in ATOMS)
    yield "<reasoning>", "</reasoning><answer>", ""
    draw = random.Random(0)
    for number in range(MIXTURES):
        before, after = draw.choice(FRAMES)
        yield before, "".join(draw.sample(ATOMS, 2 + number % 3)), after


def fields_of(name: str) -> dict[str, Any]:
    kind = name.partition("_")[0]
    choice = {"question": "Where?", "options": ["a bank", "a text", "1", "answer is"], "answer": "B"}
    return {
        "antibody": {"chain": "EVQLARDYWGQG", "loops": [[1, 3], [4, 5], [6, 8]][: 3 if name.endswith("s") else 1]},
        "commonsense": choice,
        "countdown": {"numbers": [1, 2, 3], "target": 6},
        "gsm8k": {"question": "How many?", "answer": "72"},
        "hellaswag": choice,
        "math": {"problem": "What is $1/4+1/4$?", "answer": "\\frac{1}{2}"},
        "open": {"prompt": "Why?"},
        "reaction": {"reactants": "CCO.Br", "product": "CCBr", "gap": [1, 3]},
        "sudoku": {"puzzle": "0321003004002100", "solution": "4321123434122143"},
    }[kind]


def grader(name: str) -> Callable[[str], object]:
    if name == "code":
        return lambda completion: code_in(completion, ["f"])
    task, fields = get_task(name), fields_of(name)
    task.prepare()
    task.grade(fields, "<answer>1</answer>")
    return lambda completion: task.grade(fields, completion)


def cpu_s(grade: Callable[[str], object], text: str, repeats: int = 1) -> float:
    """The least of several tries: a busy machine adds time, and takes none away."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        grade(text)
        times.append(time.process_time() - start)
    return min(times)


def too_slow(grade: Callable[[str], object], parts: tuple[str, str, str]) -> str | None:
    before, atom, after = parts
    text = filled(before, atom, after, LENGTH)
    if cpu_s(grade, text) < CHEAP_S or (least := cpu_s(grade, text, 3)) < CHEAP_S:
        return None
    growth = least / cpu_s(grade, filled(before, atom, after, LENGTH // 4), 5)
    return f"{parts}: {least:.3f} s, times {growth:.1f}" if least > MOST_S or growth > GROWTH else None


NO_CODE = [name for name in BUILT_IN if name not in ("mbpp", "humaneval")]


@pytest.mark.parametrize("name", [*NO_CODE, "code"])
@pytest.mark.slow
def test_a_verdict_takes_time_linear_in_the_text(name: str) -> None:
    grade = grader(name)
    assert [fault for parts in hostile() if (fault := too_slow(grade, parts))] == []


THINK_BLOCK = re.compile(r"<think>.*?</think>", re.IGNORECASE | re.ASCII | re.DOTALL)
BOX = re.compile(r"\\boxed\{([^}\n]*)\}")
SOFT_FORMAT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")


@pytest.mark.parametrize(
    "published",
    [THINK_BLOCK.search, BOX.findall, lambda text: SOFT_FORMAT.match("<reasoning>" + text)],
    ids=["think", "box", "soft format"],
)
def test_the_expressions_that_were_replaced_are_found_too_slow(published: Callable[[str], object]) -> None:
    """The control of the test above."""
    assert any(too_slow(published, parts) for parts in hostile() if "o" in parts[1] or "think" in parts[1])


PIECES = (
    *("<think>", "</think>", "<THINK>", "</Think>", "<th\u0131nk>", "\\boxed{", "\\boxed", "{", "}", "\n", " ", "1"),
    *("\r", "\u2028", "\x1c", "\\boxed{1}", "x"),
)
TAGS = (*("</reasoning>", "<answer>", "</answer>") * 3, "\n", " ", "\r", "\x1c", "x", "<reasoning>")


def test_what_replaced_them_finds_the_same() -> None:
    draw, seen = random.Random(1), [0, 0, 0]
    for _ in range(40_000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(12)))
        found = THINK_BLOCK.search(text) is not None, BOX.findall(text)
        assert (has_thinking(text), list(boxes_to_a_brace(text))) == found, repr(text)
        tags = "<reasoning>" + "".join(draw.choices(TAGS, k=draw.randrange(12)))
        soft = SOFT_FORMAT.match(tags) is not None
        assert (_SOFT_FORMAT.match(tags) is not None) == soft, repr(tags)
        seen = [count + bool(hit) for count, hit in zip(seen, (*found, soft), strict=True)]
    assert min(seen) > 1000, "the texts hold what is looked for"


NESTED = ["(1+" * 1000, "(1+" * 400 + "1" + ")" * 400, "\\sqrt{" * 150 + "1" + "}" * 150, "[" * 2000, "\\frac{" * 500]


@pytest.mark.parametrize("text", NESTED, ids=[text[:12] for text in NESTED])
def test_deeply_nested_text_does_not_get_to_the_parser(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify's parser takes seconds for it; the control shows that the depth is what stops it."""
    finding.cache_clear()
    monkeypatch.setattr("rewards.maths.symbolic.ask_plain", lambda gold, answer: "asked")
    assert finding("$72$", f"${text}$") == "failed"
    shallow = "(1+" * MAX_DEPTH + "1" + ")" * MAX_DEPTH
    assert finding("$72$", f"${shallow}$") == "asked"
    assert finding("$72$", "$" + "[0, 1) and (2, 3] " * 100 + "$") == "asked"
    finding.cache_clear()
