"""Products of reactions: reactants and the beginning of a product as SMILES, whose end is to be written.

The verdict: the product means the same molecule as the recorded one (``rewards.reactions.same_molecules``; with RDKit
also when it is written otherwise). Reward components: ``words`` the share of words that are those of the recorded
product, in their places; ``value`` 1 when the verdict is right.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

from rewards.cells import listed
from rewards.errors import ConfigError, DataError
from rewards.files import shipped_rows
from rewards.infill import Infill, contents, infill
from rewards.reactions import same_molecules, told_by, words
from rewards.task import Grade, InfillTask, Problem, Split
from rewards.tasks.hub import problems_from_source

LONGEST = 1000
"""Characters of reactants or product."""


class Reaction(InfillTask):
    """The last words of a product.

    Fields: ``reactants``, ``product`` (SMILES) and ``gap`` ([start, end] in words of the product, counted from 0, the
    end not included). Problems are the reactions that ship (``rewards/data``), split by the product's scaffold; a
    file's rows need ``reactants`` and ``product`` alone.
    """

    name: ClassVar[str] = "reaction"
    components: ClassVar[tuple[str, ...]] = ("words", "value")
    largest: ClassVar[Mapping[str, float]] = dict.fromkeys(components, 1.0)

    WORDS: ClassVar[int] = 16
    """Of the product, masked; fewer where it is shorter, for its first word always stands."""

    def gap(self, reactants: str, product: str) -> list[int]:
        """Where the gap of a reaction is."""
        count = len(words(product))
        return [max(1, count - self.WORDS), count]

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        if path is not None:
            return problems_from_source(path, task=self.name, size=size, convert=self._fields_from_row)
        if size < 1:
            raise ConfigError(f"{self.name}: size is {size}; ask for at least 1 problem")
        found = []
        for number, row in enumerate(shipped_rows("reactions.csv.gz", split, size)):
            fields = self._fields_from_row(row)
            assert fields is not None, "every reaction that ships is a problem"
            found.append(Problem(f"{self.name}-{split}-{number}", fields))
        return found

    def prompt(self, fields: dict[str, Any]) -> Infill:
        start, end = fields["gap"]
        product = words(fields["product"])
        before, behind = "".join(product[:start]), "".join(product[end:])
        return infill(f"{fields['reactants']}>>{before}", end - start, behind, form="single")

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        (start, end), product = fields["gap"], words(fields["product"])
        found = contents(completion)
        if len(found) != 1 or len(completion) > LONGEST:
            return Grade(False, dict.fromkeys(self.components, 0.0), "not one gap was filled")
        written = words("".join(found[0].split()))
        asked = product[start:end]
        same = sum(a == b for a, b in zip(written, asked, strict=False))
        whole = "".join([*product[:start], *written, *product[end:]])
        right = same_molecules(whole, fields["product"])
        error = None if right else f"{whole[:100]} is another molecule, or none"
        return Grade(right, {"words": same / len(asked), "value": float(right)}, error)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        for name in ("reactants", "product"):
            value = fields.get(name)
            if not isinstance(value, str) or value.split() != [value] or len(value) > LONGEST or ">>" in value:
                raise DataError(
                    f"{name} is {str(value)[:60]!r}; it must be SMILES of 1 to {LONGEST} characters, without blanks"
                )
        gap, count = fields.get("gap"), len(words(fields["product"]))
        two = gap if isinstance(gap, list) and len(gap) == 2 and all(type(at) is int for at in gap) else [0, 0]
        if not 1 <= two[0] < two[1] <= count:
            raise DataError(f"gap is {str(gap)[:60]}; it must be [start, end] with 1 <= start < end <= {count}")

    def verdicts_by(self) -> str:
        return told_by()

    def leak_key(self, fields: dict[str, Any]) -> str:
        """The product: the same one of other reagents is the same text to write."""
        return str(fields["product"])

    def expected(self, fields: dict[str, Any]) -> str | None:
        return self.original(fields)[0]

    def original(self, fields: dict[str, Any]) -> list[str]:
        start, end = fields["gap"]
        return ["".join(words(fields["product"])[start:end])]

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        reactants, product = row.get("reactants"), row.get("product")
        if not isinstance(reactants, str) or not isinstance(product, str):
            raise DataError(f"a reaction needs reactants and product as SMILES; this one has {', '.join(row)}")
        reactants, product = "".join(reactants.split()), "".join(product.split())  # SMILES has no blanks
        if len(words(product)) < 2:
            return None  # nothing would stand before the gap
        gap = listed(row.get("gap"))
        gap = self.gap(reactants, product) if gap in (None, "") else gap
        fields = {"reactants": reactants, "product": product, "gap": gap}
        self.validate_fields(fields)
        return fields


class ReactionSpan(Reaction):
    """Words in the middle of a product: where, follows from the reaction."""

    name: ClassVar[str] = "reaction_span"
    WORDS: ClassVar[int] = 12

    def gap(self, reactants: str, product: str) -> list[int]:
        count = len(words(product))
        length = min(self.WORDS, count - 1)
        digest = hashlib.sha256(f"{reactants}>>{product}".encode()).digest()
        start = 1 + int.from_bytes(digest[:8], "little") % (count - length)
        return [start, start + length]
