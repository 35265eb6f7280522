"""A task whose prompts have gaps, for runs of tests."""

from typing import Any

from rewards.infill import Infill, contents, infill
from rewards.task import Grade, InfillTask, Problem, Split


class Gapped(InfillTask):
    """Between a letter and its repetition, of one gap of two lengths and one of three tokens: digits are rewarded."""

    name = "gapped"
    components = ("digits",)

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        return [Problem(f"{split}-{n}", {"letter": "abcdefgh"[n % 8], "of": split, "n": n}) for n in range(size)]

    def prompt(self, fields: dict[str, Any]) -> Infill:
        letter = fields["letter"]
        asked = [{"role": "user", "content": f"Fill in digits {fields['n']}"}]
        return infill(letter * 3, (4, 6), letter * 4, 3, letter, messages=asked)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        pass

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        found = contents(completion)
        if len(found) != 2:
            return Grade(False, {"digits": -1.0}, f"{len(found)} gaps were filled, not 2")
        digits = [sum(character.isdigit() for character in text) for text in found]
        return Grade(all(digits), {"digits": sum(digits) / 9})
