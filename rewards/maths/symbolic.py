"""Symbolic comparison by math-verify, in a helper process that is killed when it overruns.

sympy can take hours and gigabytes over a short text, inside code that never returns to Python. So each question is
answered by a fork of a helper that has math-verify loaded (``rewards.maths.symbolic_worker``): the fork has a CPU limit
that the kernel enforces, a memory limit and a wall-clock limit, and no question leaves anything behind for the next.

The helper (``rewards.helper``) starts with the first question or at ``start()``. A question costs a few milliseconds
and at most WALL_LIMIT_S; that and the start of another helper once more, where the helper itself hangs or dies.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rewards.helper import Helper
from rewards.maths.expression import Node, to_json

CPU_LIMIT_S = 0.5
WALL_LIMIT_S = 0.75
_GRACE_S = 0.1
"""For the helper to kill its fork; after that the helper itself is killed."""
_ATTEMPTS = 2
"""Helpers that are asked a question: one that hangs or dies costs it nothing but time."""

Finding = Literal["equal", "different", "timeout", "failed"]
"""``failed``: math-verify raised, ran out of memory, or can't be started."""


_helper = Helper("rewards.maths.symbolic_worker", str(CPU_LIMIT_S), str(WALL_LIMIT_S))
start = _helper.start
stop = _helper.stop


def ask(pairs: Sequence[tuple[Node, Node]]) -> Finding:
    """Whether the two expressions of every pair are equal."""
    return _ask([[to_json(gold), to_json(answer)] for gold, answer in pairs])


def ask_plain(gold: str, answer: str) -> Finding:
    """``verify(parse(gold), parse(answer))`` with math-verify's own settings, as the published codes call it."""
    return _ask({"gold": gold, "answer": answer})


def _ask(question: list[Any] | dict[str, str]) -> Finding:
    line = json.dumps(question).encode()
    reply: bytes | None = None
    for _ in range(_ATTEMPTS):
        reply = _helper.ask(line, WALL_LIMIT_S + _GRACE_S)
        for finding in get_args(Finding):
            if reply == finding.encode():
                return finding
        _helper.stop()
    return "timeout" if reply is None else "failed"
