"""HellaSwag (arXiv 1905.07830): which of four endings continues a text. Half of it describes videos (ActivityNet), half
are instructions (WikiHow)."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from rewards.cells import listed, whole
from rewards.errors import DataError
from rewards.parsing import shorten
from rewards.task import Split
from rewards.tasks.multiple_choice import LETTERS, MultipleChoice

_WIKIHOW_MARK = re.compile(r"\s?\[(header|title|step|substeps)\]\s?")


class HellaSwag(MultipleChoice):
    """Multiple choice; of a file also ``source_id``, the video or article, which grading does not need. The labels of
    the published test split are withheld: its rows are passed over, and held-out problems are the validation split's.
    The prompt's wording is ours, and WikiHow's marks (``[title]``, ``[step]``) are left out of it."""

    name: ClassVar[str] = "hellaswag"
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:Rowan/hellaswag:train",
        "test": "hub:Rowan/hellaswag:validation",
    }

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        system, user = super().messages(fields)
        return [system, user | {"content": f"Which option continues the text best?\n\n{user['content']}"}]

    def fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The task's fields from a row of the published files; ``label`` counts the endings from 0."""
        label = whole(row.get("label"))
        if label in ("", None):
            return None
        endings, context, activity = listed(row.get("endings")), row.get("ctx"), row.get("activity_label")
        if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
            raise DataError(f"endings must be a list of texts, not {shorten(endings)}")
        if type(label) is not int or not 0 <= label < len(endings):
            raise DataError(f"label must be the number of an ending, from 0, not {shorten(label)}")
        if not isinstance(context, str):
            raise DataError(f"ctx must be the text to continue, not {shorten(context)}")
        fields = {
            "question": f"{activity}: {_unmarked(context)}" if activity else _unmarked(context),
            "options": [_unmarked(ending) for ending in endings],
            "answer": LETTERS[label] if label < len(LETTERS) else None,
            "source_id": row.get("source_id"),
        }
        return self._checked(fields)


def _unmarked(text: str) -> str:
    """Without WikiHow's marks; what one of them parted is parted by a space."""
    return " ".join(_WIKIHOW_MARK.sub(" ", text).split())
