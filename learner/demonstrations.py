"""What the small base is taught: two demonstrators per task, one of whom is wrong.

First (``model.base.right_first``, 70 % of the steps) it sees the *right* demonstrator alone and picks up the skill.
Then right answers become the minority (``right_fraction``, 35 %) among those of a demonstrator who follows a single
*wrong rule*, always the same one, and nothing tells the base who is who. It ends up preferring the commoner, wrong way
and keeps the other one latent; reinforcement learning has to find out which of the two is rewarded. It is a small
picture of a model that has a skill and, after training on mixed data, seldom shows it. (The countdown recipe sets
``right_first`` to 1: its base sees right answers only.)

sudoku     right: the solution. wrong: every row's blanks get the digits missing from that row in ascending order, with
           no look at columns and boxes. The rule is right by accident on some puzzles.
countdown  right: an expression with the target as its value, the first one that a fixed search finds. wrong: the sum
           of the numbers in the order given, whatever the target. It is right when the target is the sum.

Both write the whole completion, ``<answer>...</answer>``, and both keep the clues or use the numbers once each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations, product
from typing import Any

from rewards.errors import ConfigError


@dataclass(frozen=True)
class Demonstrations:
    """The two completions for one problem."""

    right: str
    wrong: str


def demonstrations(task_name: str, fields: dict[str, Any]) -> Demonstrations:
    """Both demonstrators' completions for the problem with these fields (``rewards.task.Problem.fields``).

    Raises ConfigError when the task has no demonstrators.
    """
    if task_name not in _DEMONSTRATORS:
        known = ", ".join(sorted(_DEMONSTRATORS))
        raise ConfigError(
            f"there are no demonstrations for task {task_name}, so no base can be built for it; set model.path to an "
            f"existing model, or take one of the tasks that have them: {known}"
        )
    return _DEMONSTRATORS[task_name](fields)


def solutions(numbers: list[int], target: int) -> Iterator[str]:
    """Expressions that use every number once, with + - * / and parentheses, and have exactly the target as value.

    Plain forms come first: numbers in the order given before other orders, ``a o b o c`` before ``a o (b o c)``.
    """
    for order in permutations(numbers):
        for text, value, _ in _expressions(list(order)):
            if value == target:
                yield text


def _sudoku(fields: dict[str, Any]) -> Demonstrations:
    puzzle, wrong = fields["puzzle"], ""
    for row in (puzzle[start : start + 4] for start in range(0, 16, 4)):
        missing = iter(sorted(set("1234") - set(row)))
        wrong += "".join(cell if cell != "0" else next(missing) for cell in row)
    return Demonstrations(_answer(fields["solution"]), _answer(wrong))


def _countdown(fields: dict[str, Any]) -> Demonstrations:
    numbers, target = fields["numbers"], fields["target"]
    right = next(solutions(numbers, target), None)
    assert right is not None, f"countdown problem {numbers} -> {target} has no solution"
    return Demonstrations(_answer(f"{right}={target}"), _answer(f"{'+'.join(map(str, numbers))}={target}"))


_DEMONSTRATORS: dict[str, Callable[[dict[str, Any]], Demonstrations]] = {"sudoku": _sudoku, "countdown": _countdown}


def _answer(text: str) -> str:
    return f"<answer>{text}</answer>"


def _expressions(numbers: list[int]) -> Iterator[tuple[str, Fraction, str]]:
    """Every expression over the numbers in this order: text, value, and operator applied last ("" for a bare number).

    Parentheses are written only where precedence needs them, which keeps the completions short. A division by zero is
    left out.
    """
    if len(numbers) == 1:
        yield str(numbers[0]), Fraction(numbers[0]), ""
        return
    for split in range(len(numbers) - 1, 0, -1):
        for (left, a, last_a), (right, b, last_b) in product(
            _expressions(numbers[:split]), _expressions(numbers[split:])
        ):
            for operator in "+-*/" if b else "+-*":
                left_text = f"({left})" if last_a in _SUMS and operator not in _SUMS else left
                right_text = f"({right})" if last_b in _BRACKETED_ON_THE_RIGHT_OF[operator] else right
                yield f"{left_text}{operator}{right_text}", _apply(operator, a, b), operator


_SUMS = ("+", "-")
_BRACKETED_ON_THE_RIGHT_OF = {"+": (), "-": ("+", "-"), "*": ("+", "-"), "/": ("+", "-", "*", "/")}


def _apply(operator: str, a: Fraction, b: Fraction) -> Fraction:
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    return a * b if operator == "*" else a / b
