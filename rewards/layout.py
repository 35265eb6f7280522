"""How a task shows an answer to people: as cells, some of which hold characters of the completion."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Mark = Literal["clue", "right", "wrong"]
"""What a cell is worth: given by the problem and kept, right, wrong."""


@dataclass(frozen=True)
class Cell:
    """A part of a layout. With ``start`` it shows the completion's characters from there up to ``end``, once they are
    written, and ``text`` until then; without, always ``text``. ``mark`` is of what it shows; None: not decided."""

    text: str
    mark: Mark | None = None
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Layout:
    """Cells by rows of ``columns`` (a grid), in one line, or texts with line breaks below each other (code)."""

    kind: Literal["grid", "line", "code"]
    cells: tuple[Cell, ...]
    columns: int = 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def place_of(part: str, completion: str) -> tuple[int, int] | None:
    """Start and end of the last place where a completion has ``part``; None for nothing, or where it isn't there."""
    start = completion.rfind(part) if part else -1
    return None if start < 0 else (start, start + len(part))


def answer_line(part: str, completion: str, *, correct: bool) -> Layout | None:
    """A line of one cell: the answer, wherever it stands in the completion. None when it stands nowhere."""
    place = place_of(part, completion)
    return None if place is None else Layout("line", (Cell("", "right" if correct else "wrong", *place),))


def characters(text: str, start: int) -> Iterator[tuple[str, int, int]]:
    """Each character of ``text`` with its start and end in a completion that has the text at ``start``."""
    return ((character, start + at, start + at + 1) for at, character in enumerate(text))
