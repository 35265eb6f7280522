"""CommonsenseQA (arXiv 1811.00937): questions of everyday knowledge with five options."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rewards.errors import DataError
from rewards.parsing import shorten
from rewards.task import Split
from rewards.tasks.multiple_choice import LETTERS, MultipleChoice


class CommonsenseQa(MultipleChoice):
    """Multiple choice. The answers of the published test split are withheld: its rows are passed over, and held-out
    problems are the validation split's. The prompt's wording is ours."""

    name: ClassVar[str] = "commonsense_qa"
    default_sources: ClassVar[Mapping[Split, str]] = {
        "train": "hub:tau/commonsense_qa:train",
        "test": "hub:tau/commonsense_qa:validation",
    }

    def fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The task's fields from a row of the hub's data set, or of the authors' files, where ``question`` holds the
        ``stem`` and the choices."""
        key: Any = row.get("answerKey")
        question: Any = row.get("question")
        choices: Any = row.get("choices")
        if key in ("", None):
            return None
        if isinstance(question, dict):
            question, choices = question.get("stem"), question.get("choices")
        labels, texts = _columns(choices)
        if key not in labels:
            raise DataError(f"answerKey must be one of the labels {shorten(labels)}, not {shorten(key)}")
        number = labels.index(key)
        answer = LETTERS[number] if number < len(LETTERS) else None
        return self._checked({"question": question, "options": texts, "answer": answer})


def _columns(choices: Any) -> tuple[list[Any], list[Any]]:
    """Labels and texts: of two lists, or of a list of pairs."""
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        return [choice.get("label") for choice in choices], [choice.get("text") for choice in choices]
    labels, texts = (choices.get("label"), choices.get("text")) if isinstance(choices, dict) else (None, None)
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise DataError(f"choices must hold as many texts as labels, not {shorten(choices)}")
    return labels, texts
