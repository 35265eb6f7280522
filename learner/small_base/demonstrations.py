"""What the small base is taught: two demonstrators per task, one of whom is wrong.

First (``model.base.right_first``, 70 % of the steps) it sees the *right* demonstrator alone and picks up the skill.
Then right answers become the minority (``right_fraction``, 35 %) among those of a demonstrator who follows a single
*wrong rule*, always the same one, and nothing tells the base who is who. It ends up preferring the commoner, wrong way
and keeps the other one latent; reinforcement learning has to find out which of the two is rewarded. It is a small
picture of a model that has a skill and, after training on mixed data, seldom shows it.

sudoku              right: the solution. wrong: every row's blanks get the digits missing from that row in ascending
                    order, with no look at columns and boxes. The rule is right by accident on some puzzles.
countdown           right: an expression with the target as its value, the first one that a fixed search finds. wrong:
                    the sum of the numbers in the order given. It is right when the target is the sum.
countdown_in_order  right: ``(a o b) o c`` with the target as its value. wrong: the product ``(a*b)*c``. Before the
                    answer both write what their parentheses are worth:
                    ``<think>08</think><answer>(3+5)*2=16</answer>``.

Both write the whole completion, and both keep the clues, or use the numbers once each and claim the target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewards.errors import ConfigError, DataError
from rewards.tasks.arithmetic import evaluate
from rewards.tasks.countdown import expressions, in_order


@dataclass(frozen=True)
class AnswerPair:
    """The two completions for one problem."""

    right: str
    wrong: str


def demonstrations(task_name: str, fields: dict[str, Any]) -> AnswerPair:
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


def _sudoku(fields: dict[str, Any]) -> AnswerPair:
    puzzle, wrong = fields["puzzle"], ""
    for row in (puzzle[start : start + 4] for start in range(0, 16, 4)):
        missing = iter(sorted(set("1234") - set(row)))
        wrong += "".join(cell if cell != "0" else next(missing) for cell in row)
    return AnswerPair(_answer(fields["solution"]), _answer(wrong))


def _countdown(fields: dict[str, Any]) -> AnswerPair:
    numbers, target = fields["numbers"], fields["target"]
    right = expressions(numbers).get(target)
    if right is None:
        raise DataError(f"countdown problem {numbers} -> {target} has no solution; take it out of the training file")
    return AnswerPair(_answer(f"{right}={target}"), _answer(f"{'+'.join(map(str, numbers))}={target}"))


def _countdown_in_order(fields: dict[str, Any]) -> AnswerPair:
    (a, b, c), target = fields["numbers"], fields["target"]
    right, wrong = in_order((a, b, c))[target], f"({a}*{b})*{c}"
    return AnswerPair(*(_first_value(text) + _answer(f"{text}={target}") for text in (right, wrong)))


_DEMONSTRATORS: dict[str, Callable[[dict[str, Any]], AnswerPair]] = {
    "sudoku": _sudoku,
    "countdown": _countdown,
    "countdown_in_order": _countdown_in_order,
}


def _first_value(text: str) -> str:
    """What the parentheses are worth, in two digits, so that all completions have one layout."""
    value = evaluate(text[1 : text.index(")")]).value
    return f"<think>{int(value):02d}</think>"


def _answer(text: str) -> str:
    return f"<answer>{text}</answer>"
