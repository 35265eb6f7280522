"""Countdown: an arithmetic expression that uses every given number exactly once and equals the target.

Reward components (AGRPO's table, 4.0 in all). In a tagged answer with at least one ``=``: ``one_equals`` -0.5 when
there are more; ``right_side`` 1/3 when the text after the last ``=`` is the target in digits; ``left_side`` 1/3 when
the text before the first is made of digits, spaces and ``+ - * / ( )``; ``numbers`` 1/3 when the integers in it are the
given ones. And ``value`` 3.0 when the verdict is right.

The verdict: the submission is an expression, with or without a trailing ``= target``, that uses every number exactly
once and has the target as its exact rational value. A wrong, empty or computed right-hand side is wrong, and so is a
second ``=``. ``rewards.tasks.arithmetic`` says what an expression is; signs in Unicode and LaTeX (``\\times \\div``,
``\\left(``, ``$``) count as plain ones, other LaTeX is not read.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations, combinations_with_replacement, permutations
from typing import Any, ClassVar

from rewards.cells import listed, whole
from rewards.errors import ConfigError, DataError
from rewards.layout import Cell, Layout, Mark, place_of
from rewards.parsing import plain_operators, shorten, submission
from rewards.task import AnswerPair, Grade, Problem, Split, Task
from rewards.tasks.arithmetic import MAX_CHARACTERS, ExpressionError, evaluate
from rewards.tasks.hub import problems_from_source

MAX_NUMBERS = 16
LARGEST_FIELD = 10**9

MAX_SEARCHED = 4
"""Numbers of a problem whose solution is searched for."""

MAX_SHOWN = 100
"""Characters of an answer that is laid out."""

_INTEGER = re.compile(r"-?[0-9]{1,12}")
_PIECE = re.compile(r"[0-9]+|\S")
_LEFT_SIDE = re.compile(r"[0-9 +\-*/()]+")


class Countdown(Task):
    """Fields: ``numbers`` (1 to 16 integers of at least 0) and ``target`` (an integer). Problems have three numbers;
    the grader takes any count. Whole multisets of numbers go to train or to test."""

    name: ClassVar[str] = "countdown"
    components: ClassVar[tuple[str, ...]] = ("one_equals", "right_side", "left_side", "numbers", "value")
    largest: ClassVar[Mapping[str, float]] = {
        "one_equals": 0.5,
        "right_side": 1 / 3,
        "left_side": 1 / 3,
        "numbers": 1 / 3,
        "value": 3.0,
    }

    COUNT: ClassVar[int] = 3
    """Numbers in a problem; rows of a file with another count are passed over."""
    LARGEST_NUMBER: ClassVar[int] = 9
    LARGEST_TARGET: ClassVar[int] = 100
    """Generated problems have numbers from 1 and targets from 1 to these."""
    TEST_SHARE: ClassVar[float] = 0.2
    """Share of the number multisets whose problems are test problems."""

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        if path is not None:
            return problems_from_source(path, task=self.name, size=size, convert=self._fields_from_row)
        if size < 1:
            raise ConfigError(f"{self.name}: size is {size}; ask for at least 1 problem")
        problems: list[Problem] = []
        for fields in self._generate(split, seed):
            problems.append(Problem(f"{self.name}-{split}-{seed}-{len(problems)}", fields))
            if len(problems) == size:
                return problems
        raise ConfigError(
            f"{self.name}: size is {size}; the {split} split of seed {seed} has {len(problems)} problems, ask for fewer"
        )

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        numbers = ",".join(map(str, fields["numbers"]))
        return [{"role": "user", "content": f"Numbers: {numbers} Target: {fields['target']}"}]

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        numbers, target = sorted(fields["numbers"]), fields["target"]
        answer = submission(completion)
        text = plain_operators(answer.text)
        error = _fault(text, numbers, target)
        components = dict.fromkeys(self.components, 0.0)
        components["value"] = 3.0 * (error is None)
        if answer.tagged and "=" in text and len(text) <= MAX_CHARACTERS:
            left, *_, right = (side.strip() for side in text.split("="))
            components["one_equals"] = -0.5 if text.count("=") > 1 else 0.0
            components["right_side"] = (_integer(right) == target) / 3
            components["left_side"] = bool(_LEFT_SIDE.fullmatch(left)) / 3
            components["numbers"] = (sorted(map(int, re.findall("[0-9]+", left))) == numbers) / 3
        return Grade(error is None, components, error)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        numbers, target = fields.get("numbers"), fields.get("target")
        if not isinstance(numbers, list | tuple) or not 1 <= len(numbers) <= MAX_NUMBERS:
            raise DataError(f"numbers must be a list of 1 to {MAX_NUMBERS} integers, not {shorten(numbers)}")
        for number in numbers:
            if type(number) is not int or not 0 <= number <= LARGEST_FIELD:
                raise DataError(f"each of numbers must be an integer from 0 to {LARGEST_FIELD}, not {shorten(number)}")
        if type(target) is not int or abs(target) > LARGEST_FIELD:
            raise DataError(f"target must be an integer of at most {LARGEST_FIELD}, not {shorten(target)}")

    def demonstrations(self, fields: dict[str, Any]) -> AnswerPair:
        """Right: the first expression that a fixed search finds. The wrong rule: the sum of the numbers in the order
        given, which is right when the target is the sum."""
        numbers, target = fields["numbers"], fields["target"]
        right = expressions(numbers).get(target)
        if right is None:
            raise DataError(
                f"countdown problem {numbers} -> {target} has no solution; take it out of the training file"
            )
        return AnswerPair(*(f"<answer>{text}={target}</answer>" for text in (right, "+".join(map(str, numbers)))))

    def solvable(self, fields: dict[str, Any]) -> bool:
        """Whether an expression reaches the target; more than three numbers are taken to have one."""
        return len(fields["numbers"]) > 3 or _may_reach(fields["numbers"], fields["target"])

    def expected(self, fields: dict[str, Any]) -> str | None:
        """An equation, one of many; None for more numbers than are searched."""
        numbers, target = fields["numbers"], fields["target"]
        found = expressions(numbers).get(target) if len(numbers) <= MAX_SEARCHED else None
        return None if found is None else f"{found}={target}"

    def layout(self, fields: dict[str, Any], completion: str, *, correct: bool) -> Layout | None:
        """The answer, piece by piece: a number is right that was given and not used before; what stands right of the
        ``=`` is right where it is the target and the whole answer is. Nothing for what is no short answer."""
        text = submission(completion).text
        place = place_of(text, completion)
        if place is None or len(text) > MAX_SHOWN:
            return None
        left = Counter(map(str, fields["numbers"]))
        cells: list[Cell] = []
        behind = False
        for piece in _PIECE.finditer(text):
            mark: Mark | None = None
            if piece[0].isdigit():
                good = correct and piece[0] == str(fields["target"]) if behind else left[piece[0]] > 0
                mark = "right" if good else "wrong"
                left[piece[0]] -= 1
            behind = behind or piece[0] == "="
            cells.append(Cell("", mark, place[0] + piece.start(), place[0] + piece.end()))
        return Layout("line", tuple(cells)) if cells else None

    def leak_key(self, fields: dict[str, Any]) -> tuple[int, ...]:
        """The numbers without their order."""
        return tuple(sorted(fields["numbers"]))

    def _generate(self, split: Split, seed: int) -> Iterator[dict[str, Any]]:
        """One target of every multiset of the split, then a second of each, and so on: no pair comes twice."""
        sets = self._sets(split, seed)
        rng = random.Random(f"countdown/{seed}/{split}/problems")
        left: dict[tuple[int, ...], list[int]] = {}
        for turn in range(self.LARGEST_TARGET):
            for numbers in sets:
                if turn == 0:
                    left[numbers] = [target for target in _reachable(numbers) if target <= self.LARGEST_TARGET]
                    rng.shuffle(left[numbers])
                if left[numbers]:
                    yield {"numbers": rng.sample(numbers, self.COUNT), "target": left[numbers].pop()}

    def _sets(self, split: Split, seed: int) -> list[tuple[int, ...]]:
        """The split's multisets of numbers."""
        sets = list(combinations_with_replacement(range(1, self.LARGEST_NUMBER + 1), self.COUNT))
        random.Random(f"countdown/{seed}/split").shuffle(sets)
        tests = round(self.TEST_SHARE * len(sets))
        return sets[:tests] if split == "test" else sets[tests:]

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        numbers: Any = listed(row.get("numbers", row.get("nums", row.get("input"))))
        if isinstance(numbers, str):  # 44,19,35, or as numpy prints it: [44 19 35]
            numbers = re.split(r"\s*,\s*|\s+", numbers.strip().removeprefix("[").removesuffix("]").strip())
        if isinstance(numbers, list):
            numbers = [whole(number) for number in numbers]
        fields = {"numbers": numbers, "target": whole(row.get("target", row.get("output")))}
        self.validate_fields(fields)
        return fields if len(numbers) == self.COUNT else None


class CountdownInOrder(Countdown):
    """Countdown whose generated problems need no search over orders: the target, of two digits, is what ``+ - *`` make
    of the numbers taken from left to right as given, such as ``(3+5)*2``. What is left to find is the operators.

    Only the problems differ: prompt, verdict and reward are Countdown's, and any right expression counts. A multiset
    comes in all orders and with all such targets, on one side of the split. Rows of a file that can't be solved in
    order are passed over."""

    name: ClassVar[str] = "countdown_in_order"

    def demonstrations(self, fields: dict[str, Any]) -> AnswerPair:
        """Right: ``(a o b) o c`` with the target as its value. The wrong rule: the product ``(a*b)*c``. Before the
        answer both write what their parentheses are worth: ``<think>08</think><answer>(3+5)*2=16</answer>``."""
        (a, b, c), target = fields["numbers"], fields["target"]
        pair = in_order((a, b, c))[target], f"({a}*{b})*{c}"
        return AnswerPair(*(f"{_first_value(text)}<answer>{text}={target}</answer>" for text in pair))

    def _generate(self, split: Split, seed: int) -> Iterator[dict[str, Any]]:
        problems = [
            {"numbers": list(order), "target": target}
            for numbers in self._sets(split, seed)
            for order in sorted(set(permutations(numbers)))
            for target in in_order(order)
            if 10 <= target <= 99
        ]
        random.Random(f"countdown_in_order/{seed}/{split}/problems").shuffle(problems)
        yield from problems

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        fields = super()._fields_from_row(row)
        return fields if fields and fields["target"] in in_order(fields["numbers"]) else None


def in_order(numbers: Sequence[int]) -> dict[int, str]:
    """Every value that ``+ - *`` make of ``numbers`` from left to right, each with an expression, ``(3+5)*2``."""
    found = {numbers[0]: str(numbers[0])}
    for number in numbers[1:]:
        longer: dict[int, str] = {}
        for value, text in found.items():
            left = text if text.isdigit() else f"({text})"
            for operator, result in (("+", value + number), ("-", value - number), ("*", value * number)):
                longer.setdefault(result, f"{left}{operator}{number}")
        found = longer
    return found


def expressions(numbers: Sequence[int]) -> dict[Fraction, str]:
    """Every value that ``numbers`` reach, each used once, with one expression for it, such as ``(3+5)*2``.

    By exhaustion: quick for three or four numbers. The first expression found is kept, in a fixed order.
    """
    found: dict[Fraction, str] = {}
    states: list[list[tuple[Fraction, str]]] = [[(Fraction(number), str(number)) for number in numbers]]
    for state in states:  # grows while it is read
        if len(state) == 1:
            found.setdefault(*state[0])
        for first, second in combinations(range(len(state)), 2):
            rest = [item for index, item in enumerate(state) if index not in (first, second)]
            states += [[result, *rest] for result in _combinations(state[first], state[second])]
    return found


def _may_reach(numbers: Sequence[float], target: int) -> bool:
    """Whether an expression has this value, in floating point: several times as quick as ``expressions``, and never
    False where one has it exactly."""
    if len(numbers) == 1:
        return abs(numbers[0] - target) <= 1e-9 * max(1.0, abs(target))
    for first, second in combinations(range(len(numbers)), 2):
        rest = [number for index, number in enumerate(numbers) if index not in (first, second)]
        a, b = numbers[first], numbers[second]
        values = [a + b, a - b, b - a, a * b, *([a / b] if b else []), *([b / a] if a else [])]
        if any(_may_reach([value, *rest], target) for value in values):
            return True
    return False


def _combinations(one: tuple[Fraction, str], other: tuple[Fraction, str]) -> Iterator[tuple[Fraction, str]]:
    (a, a_text), (b, b_text) = [(value, text if text.isdigit() else f"({text})") for value, text in (one, other)]
    yield a + b, f"{a_text}+{b_text}"
    yield a * b, f"{a_text}*{b_text}"
    yield a - b, f"{a_text}-{b_text}"
    yield b - a, f"{b_text}-{a_text}"
    if b:
        yield a / b, f"{a_text}/{b_text}"
    if a:
        yield b / a, f"{b_text}/{a_text}"


@cache
def _reachable(numbers: tuple[int, ...]) -> list[int]:
    return sorted(value.numerator for value in expressions(numbers) if value.denominator == 1 and value >= 1)


def _first_value(text: str) -> str:
    """What the parentheses are worth, in two digits, so that all completions have one layout."""
    return f"<think>{int(evaluate(text[1 : text.index(')')]).value):02d}</think>"


def _integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) else None


def _fault(text: str, numbers: list[int], target: int) -> str | None:
    """The verdict's reason: None when the text is right."""
    if not text:
        return "there is no answer"
    if text.count("=") > 1:
        return f"the answer {shorten(text)} has more than one '='"
    left, equals, right = (part.strip() for part in text.partition("="))
    try:
        expression = evaluate(left)
    except ExpressionError as error:
        return f"{shorten(left)} is not an expression that can be computed: {error}"
    if sorted(expression.numbers) != numbers:
        return f"the numbers used are {shorten(sorted(expression.numbers))}, not {shorten(numbers)}"
    if expression.value != target:
        return f"the value of {shorten(left)} is {expression.value}, not {target}"
    if equals and _integer(right) != target:
        return f"the right-hand side is {shorten(right)}, not {target}"
    return None
