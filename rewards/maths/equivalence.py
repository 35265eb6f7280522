r"""Whether an answer is the gold answer in another spelling: ``equivalent(gold, answer)``. Strict, total, bounded.

How a verdict is reached, first what is cheap: equal text after ``rewards.maths.latex``; exact rationals; exact algebra
modulo a prime and a numeric comparison that only tells apart (``rewards.maths.algebra``); and math-verify in a helper
process with hard limits (``rewards.maths.symbolic``) for the few expressions that agree numerically but have no exact
arithmetic here (nested or cube roots, trigonometry, logarithms). A wrong number never gets that far.

The rules:

- Numbers are exact. 3.50 = 3.5, 1,234 = 1234, .5 = 1/2 = \frac12 = 0.5, 1\frac12 = 3/2, 1.2\times10^3 = 1200; 0.333 is
  not 1/3 and 3.14 is not \pi. An unevaluated expression equals its value (``rewards.tasks.math`` refuses one that is
  copied from the problem).
- Percent: with the sign on both sides the numbers are compared. A gold 8\% also takes 8 and 0.08. A gold number takes
  a percentage of the same value (1/2, 50%), and from 1 on the same number with the sign (50, 50%).
- Degree and currency signs and unit words may be missing or added on either side. Two well-known units must agree
  (``rewards.maths.units``: cm is not cm^2); nothing is converted.
- ``2, 3`` (also with "and", "or", braces, \pm written out) are several answers: all of them and no other, in any order,
  as often as the gold has them. Tuples and intervals keep order and brackets: (1,2) is not (2,1), [1,2] or \{1,2\}. An
  inequality of one name is the interval that it describes; a union is in any order.
- x = 5 and 5 are the same answer, x = 5 and y = 5 are not. Equations of two sides are the same up to a constant
  factor. Of a chain of equal constants (6/4 = 1.5) any stands for the value.
- Matrices agree by entry, whatever their brackets (not determinants). 1011_2 takes 1011 but no other base. A ratio a:b
  takes the same ratio of the same numbers, and answers a gold fraction.
- Text is compared without case, spaces, hyphens and full stops, single letters with case; (A) is A. Letters of a
  ``\text``, three and more, and capitals are a word, in order: ABC is not CAB. xy is yx.
- Names are real numbers: \sqrt{x^2} is |x|, and not x. An inequality of two sides that are no names is the same up to a
  positive factor.
- A formula that can't be read is equal to the same signs in the same order and to nothing else.
- Empty answers and texts of more than 1000 characters are wrong.
"""

from collections import Counter
from fractions import Fraction
from typing import Literal, NamedTuple

from rewards.maths import symbolic
from rewards.maths.algebra import PRIME, Inexact, approximation, residue
from rewards.maths.answer_forms import (
    MAX_CHARACTERS,
    Based,
    Bracketed,
    Equation,
    Form,
    Items,
    Matrix,
    Named,
    Ratio,
    Relation,
    Scalar,
    Words,
    read,
)
from rewards.maths.expression import Node
from rewards.maths.units import UNIT

How = Literal["text", "number", "algebra", "approximation", "form", "symbolic", "timeout", "failed", "none"]
"""``form``: another kind of answer; ``timeout``, ``failed``: the symbolic comparison came to no verdict, so the answer
is wrong; ``none``: empty or too long."""

_TOLERANCE = 1e-8
_LINE = r"(-\infty,\infty)"
_REALS = frozenset({"R", "allrealnumbers", "allreals", "allrealnumber"})

counts: Counter[How] = Counter()
"""Verdicts of this process by how they were reached."""


class Verdict(NamedTuple):
    correct: bool
    how: How


def equivalent(gold: str, answer: str, *, by_symbols: bool = True) -> Verdict:
    """Whether ``answer`` gives the value ``gold``. Total; at most ``symbolic.WALL_LIMIT_S`` and a little. Without
    ``by_symbols``, what only math-verify could decide is wrong, and no helper is started."""
    verdict = _decide(gold, answer, by_symbols)
    counts[verdict.how] += 1
    return verdict


def _decide(gold: str, answer: str, by_symbols: bool) -> Verdict:
    if not answer.strip() or len(answer) > MAX_CHARACTERS:
        return Verdict(False, "none")
    if gold == answer and (answer[0].isalnum() or answer[-1].isalnum()):
        return Verdict(True, "text")  # as most right answers are: nothing to read
    gold_form, answer_form = read(gold), read(answer)
    if not answer_form.key:
        return Verdict(False, "none")
    if gold_form.key == answer_form.key:
        return Verdict(True, "text")
    comparison = _Comparison()
    same = comparison.same(gold_form, answer_form)
    if not same or not comparison.open:
        return Verdict(same, comparison.how)
    if not by_symbols:
        return Verdict(False, "approximation")
    finding = symbolic.ask(comparison.open)
    if finding == "equal" or finding == "different":
        return Verdict(finding == "equal", "symbolic")
    return Verdict(False, finding)


class _Comparison:
    """Compares forms. ``open`` holds the pairs of expressions that must still be found equal for a right answer."""

    def __init__(self) -> None:
        self.open: list[tuple[Node, Node]] = []
        self.how: How = "form"

    def same(self, gold: Form, answer: Form) -> bool:
        if gold.key == answer.key:
            return gold.key != ""
        if isinstance(gold, Named) or isinstance(answer, Named):
            return self._same_named(gold, answer)
        if isinstance(gold, Scalar) and isinstance(answer, Scalar):
            return self._same_scalar(gold, answer)
        if isinstance(gold, Items) and len(gold.items) == 1:
            return self.same(gold.items[0], answer)
        if isinstance(answer, Items) and len(answer.items) == 1:
            return self.same(gold, answer.items[0])
        if isinstance(gold, Items) and isinstance(answer, Items):
            return self._same_items(gold.items, answer.items)
        if isinstance(gold, Bracketed) and isinstance(answer, Bracketed):
            return gold.brackets == answer.brackets and self._same_in_order(gold.items, answer.items)
        if isinstance(gold, Matrix) and isinstance(answer, Matrix):
            return len(gold.rows) == len(answer.rows) and all(map(self._same_in_order, gold.rows, answer.rows))
        if isinstance(gold, Equation) and isinstance(answer, Equation):
            return _proportional(gold.node, answer.node)
        if isinstance(gold, Relation) and isinstance(answer, Relation):
            return len(gold.steps) == len(answer.steps) and all(map(_same_step, gold.steps, answer.steps))
        if isinstance(gold, Based):
            if isinstance(answer, Based):
                return (gold.digits, gold.base) == (answer.digits, answer.base)
            return answer.key.strip("()") == gold.digits
        if isinstance(answer, Based):
            return answer.base == 10 and gold.key == answer.digits
        if isinstance(answer, Ratio):
            return self._same_ratio(gold, answer)
        if isinstance(gold, Words) or isinstance(answer, Words):
            return _plain(gold) == _plain(answer) != "" or (gold.key == _LINE and _plain(answer) in _REALS)
        return gold.key == _LINE and answer.key in _REALS

    def _same_named(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, Named) and isinstance(answer, Named):
            if gold.name == answer.name:
                return self.same(gold.form, answer.form)
        elif isinstance(gold, Named) and isinstance(answer, Equation):
            return isinstance(gold.form, Scalar) and _proportional(_difference(gold.name, gold.form), answer.node)
        elif isinstance(answer, Named) and isinstance(gold, Equation):
            return isinstance(answer.form, Scalar) and _proportional(gold.node, _difference(answer.name, answer.form))
        elif isinstance(gold, Named):
            return self.same(gold.form, answer)
        elif isinstance(answer, Named):
            if isinstance(gold, Items) and not isinstance(answer.form, Items):
                return False
            return self.same(gold, answer.form)
        return False

    def _same_items(self, gold: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
        """Without order. Greedy is enough: sameness is transitive but for percent signs, units and names."""
        if len(gold) != len(answer):
            return False
        left = list(answer)
        for item in gold:
            match = next((other for other in left if other.key == item.key), None)
            match = match or next((other for other in left if self._same_part(item, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True

    def _same_part(self, gold: Form, answer: Form) -> bool:
        """``same``, with no question left open by parts that are not."""
        known = len(self.open)
        same = self.same(gold, answer)
        if not same:
            del self.open[known:]
        return same

    def _same_in_order(self, gold: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
        return len(gold) == len(answer) and all(map(self.same, gold, answer))

    def _same_ratio(self, gold: Form, answer: Ratio) -> bool:
        if isinstance(gold, Ratio):
            return gold.parts == answer.parts and gold.half in ("", answer.half)
        if isinstance(gold, Scalar) and answer.key.split(":")[1][:2] == "00" and len(answer.parts) == 2:
            return gold.value == answer.parts[0]  # a full hour
        if not isinstance(gold, Scalar) or gold.value is None or len(answer.parts) != 2 or not answer.parts[1]:
            return False
        self.how = "number"
        return gold.value == answer.parts[0] / answer.parts[1]

    def _same_scalar(self, gold: Scalar, answer: Scalar) -> bool:
        if gold.whole is not None and not (gold.units and gold.units == answer.units):
            return self._same_expression(gold.whole, answer.whole or answer.node)
        one, other = (form.units | {"percent"} if form.percent else form.units for form in (gold, answer))
        if one and other and one != other and not _same_power(one, other):
            return False
        if gold.value is not None and answer.value is not None:
            self.how = "number"
            return _same_number(gold.value, gold.percent, answer.value, answer.percent)
        if gold.percent != answer.percent and gold.value is None and answer.value is None:
            return False
        return self._same_expression(gold.node, answer.node)

    def _same_expression(self, gold: Node, answer: Node) -> bool:
        try:
            exact = residue(gold) == residue(answer)
            self.how = "algebra"
            return exact
        except Inexact:
            pass
        try:
            if residue(gold, opaque=True) == residue(answer, opaque=True):
                self.how = "algebra"
                return True
        except Inexact:
            pass
        self.how = "approximation"
        try:
            values = zip(approximation(gold), approximation(answer), strict=True)
        except Inexact:
            return False
        if any(one is not None and other is not None and not _near(one, other) for one, other in values):
            return False
        self.open.append((gold, answer))
        return True


def _same_number(gold: Fraction, gold_percent: bool, answer: Fraction, answer_percent: bool) -> bool:
    if gold_percent == answer_percent:
        return gold == answer
    if gold_percent:
        return answer in (gold, gold / 100)
    return answer / 100 == gold or (answer == gold and gold >= 1)


def _same_power(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether ``square units`` is one side and some area the other."""
    powers = [{unit.partition("^")[2] for unit in units} for units in (one, other)]
    return powers[0] == powers[1] and any(unit.startswith(f"{UNIT}^") for unit in one | other)


def _near(one: complex, other: complex) -> bool:
    return abs(one - other) <= _TOLERANCE * (abs(one) + abs(other)) + 1e-12


def _same_step(gold: tuple[str, Node], answer: tuple[str, Node]) -> bool:
    """Whether two comparisons with 0 are the same: up to a factor, which must be positive where the order counts."""
    if gold[0] != answer[0] or not _proportional(gold[1], answer[1]):
        return False
    if gold[0] == r"\ne":
        return True
    try:
        one, other = approximation(gold[1])[0], approximation(answer[1])[0]
    except Inexact:
        return gold[1] == answer[1]
    return one is not None and other is not None and (one * other.conjugate()).real > 0


def _proportional(gold: Node, answer: Node) -> bool:
    """Whether one difference of sides is the other times a constant that is not 0."""
    try:
        (a, b), (c, d) = ([residue(node, point, opaque=True) for point in (0, 1)] for node in (gold, answer))
    except Inexact:
        return False
    return a != 0 and c != 0 and (a * d - b * c) % PRIME == 0


def _difference(name: str, value: Scalar) -> Node:
    return ("+", ("name", name), ("negate", value.node))


def _plain(form: Form) -> str:
    """What is compared where one of two forms is text: of others only a run of letters is."""
    if isinstance(form, Words):
        return form.plain
    return form.key.casefold() if form.key.isalpha() and len(form.key) > 1 else ""
