"""The helper of ``rewards.maths.symbolic``: questions on standard input.

    python -m rewards.maths.symbolic_worker CPU_S WALL_S

A question is a line: a JSON list of pairs of expressions (``rewards.maths.expression.to_json``), or one object with
``gold`` and ``answer``, two texts to be read and compared with math-verify's own settings. The answer is one word. A
fork answers it. The kernel ends the fork at its CPU limit (SIGPROF, not caught, so it works inside code that never
returns to Python) and this process ends it at the wall-clock limit; it may not get more than MEMORY_BYTES and writes no
file.
"""

import json
import operator
import os
import resource
import select
import signal
import sys
import zlib
from typing import Any

from rewards.parent import die_with_parent

MEMORY_BYTES = 2 * 2**30
DIGITS = 50

_THREE = ["number", "3"]
_WARMING = [
    [
        ["root", ["number", "2"], ["+", _THREE, ["root", ["number", "2"], _THREE]]],
        ["^", ["name", "x"], ["number", "1/3"]],
    ],
    [["call", "sin", ["*", _THREE, ["name", "x"]]], ["call", "cos", ["/", ["name", r"\pi"], _THREE]]],
]
_WARMING_PLAIN = [("$1$", "the answer is 2"), (r"$\frac{1}{2}$", r"$\boxed{\frac{\sqrt{3}}{2}}$")]
"""Answered before the helper is ready: what they make sympy and math-verify load and cache, every fork then has."""


def main() -> None:
    cpu_s, wall_s = (float(text) for text in sys.argv[1:])
    _compare(_WARMING)
    for pair in _WARMING_PLAIN:
        _compare_plain(*pair)
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        print(_answer(json.loads(line), cpu_s, wall_s), flush=True)


def _answer(question: Any, cpu_s: float, wall_s: float) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _confine(cpu_s)
            found = _compare_plain(**question) if isinstance(question, dict) else _compare(question)
            os.write(writing, found.encode())
        finally:
            os._exit(0)
    os.close(writing)
    if not select.select([reading], [], [], wall_s)[0]:
        os.kill(child, signal.SIGKILL)
    answer = os.read(reading, 100).decode()
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if answer:
        return answer
    return "timeout" if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL) else "failed"


def _confine(cpu_s: float) -> None:
    die_with_parent()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _compare(pairs: list[Any]) -> str:
    """Whether the two expressions of every pair are equal. math-verify's time limits are off: they are signals."""
    from math_verify import verify

    try:
        for gold, answer in pairs:
            trees = _expression(gold), _expression(answer)
            if not _agree(*trees) and not verify(*trees, timeout_seconds=None):
                return "different"
    except Exception:
        return "failed"
    return "equal"


def _expression(node: list[Any]) -> Any:
    """The sympy expression."""
    import sympy

    operation, *operands = node
    if operation == "number":
        return sympy.Rational(operands[0])
    if operation == "name":
        return {r"\pi": sympy.pi, "e": sympy.E}.get(operands[0]) or sympy.Symbol(operands[0], real=True)
    if operation == "i":
        return sympy.I
    if operation == "call":
        function = {"abs": "Abs", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(operands[0], operands[0])
        value = _expression(operands[1])
        return sympy.log(value, 10) if function == "log" else getattr(sympy, function)(value)
    parts = [_expression(operand) for operand in operands]
    if operation == "root":
        index, radicand = parts
        return (
            sympy.real_root(radicand, index) if index.is_odd and radicand.is_negative else sympy.root(radicand, index)
        )
    if operation == "/":
        return parts[0] / parts[1]
    apply = {"negate": operator.neg, "+": operator.add, "*": operator.mul, "^": operator.pow, "!": sympy.factorial}
    return apply[operation](*parts)


def _agree(gold: Any, answer: Any) -> bool:
    """Whether two expressions agree to DIGITS digits wherever their variables are put: quicker than simplifying the
    difference, and more than math-verify itself asks of numbers."""
    from sympy import Rational

    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for point in range(2 if names else 1):
        values = {name: Rational(zlib.crc32(f"{name}/{point}".encode()), 2**31) + 1 for name in names}
        one, other = (tree.subs(values).evalf(DIGITS + 10) for tree in (gold, answer))
        if not abs(one - other) <= Rational(10) ** -DIGITS * (abs(one) + abs(other)):
            return False
    return True


def _compare_plain(gold: str, answer: str) -> str:
    from math_verify import parse, verify

    try:
        trees = [parse(text, parsing_timeout=None) for text in (gold, answer)]
        return "equal" if verify(trees[0], trees[1], timeout_seconds=None) else "different"
    except Exception:
        return "failed"


if __name__ == "__main__":
    main()
