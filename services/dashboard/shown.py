"""What people look at first in a sample: question, right answer and layout, as the run recorded them.

They are in the column ``data`` of a row of ``samples`` (``learner.reporting.playback``), which may come from anybody's
store: what isn't as recorded counts as not there.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, get_args

from rewards.layout import Mark
from services.dashboard.models import Number
from services.dashboard.playback_models import Cells, Layout, LayoutCell, Scales

MAX_CELLS = 1000
MAX_COMPONENTS = 100
LONGEST = 20_000
"""Characters of a question or an expected answer."""

_MARKS: tuple[Mark, ...] = get_args(Mark)
_SPECIAL = re.compile(r"<[|｜][^<>]{1,40}[|｜]>|</?s>|\[/?INST\]")
_ROLE = re.compile(r"\s*(?:system|user|assistant)\s*", re.IGNORECASE)


class Owners:
    """Which position wrote a character of the completion. A token's own text can differ from its part of the whole (a
    character of several tokens): beginning and end are matched, what lies between belongs to none."""

    def __init__(self, cells: Cells, completion: str) -> None:
        written = [at for at, special in enumerate(cells.special) if not special]
        owner = [at for at in written for _ in cells.text[at]]
        whole = "".join(cells.text[at] for at in written)
        first = len(os.path.commonprefix([whole, completion]))
        last = len(os.path.commonprefix([whole[first:][::-1], completion[first:][::-1]]))
        middle: list[int | None] = [None] * (len(completion) - first - last)
        self._owner = [*owner[:first], *middle, *owner[len(owner) - last :]]

    def of(self, start: int, end: int) -> list[int]:
        return sorted({at for at in self._owner[start:end] if at is not None})


def question(row: Mapping[str, Any]) -> str:
    """What the task asked; where that wasn't recorded, the prompt without the template that can be told from it."""
    data = row["data"] if isinstance(row["data"], dict) else {}
    if (recorded := text_of(data.get("question"))) is not None:
        return recorded
    prompt = str(row["prompt"]).encode("utf-8", "replace").decode()[:LONGEST]
    parts = [part.strip() for part in _SPECIAL.split(prompt)]
    parts = [re.sub(r"^(?:system|user|assistant)\n", "", part) for part in parts if not _ROLE.fullmatch(part)]
    return next((part for part in reversed(parts) if part), prompt)


def text_of(value: Any) -> str | None:
    """Text that UTF-8 can carry; None for anything else."""
    return value[:LONGEST].encode("utf-8", "replace").decode() if isinstance(value, str) else None


def layout_of(data: Mapping[str, Any], completion: str, owners: Owners) -> Layout | None:
    """The recorded layout, with the positions that each cell comes from."""
    return _layout(data.get("layout"), completion, owners)


def frame_layout(data: Mapping[str, Any], completion: str) -> Layout | None:
    """The same without positions."""
    return _layout(data.get("layout"), completion, None)


def mark_of(layout: Layout | None, positions: int) -> list[Mark | None]:
    """Each position's mark; of one that is in several cells the worst. Code as a whole marks none."""
    found: list[Mark | None] = [None] * positions
    if layout is not None and layout.kind != "code":
        for cell in layout.cells:
            for at in cell.positions:
                found[at] = max(found[at], cell.mark, key=lambda mark: -1 if mark is None else _MARKS.index(mark))
    return found


def scales(data: Mapping[str, Any]) -> Scales | None:
    given = data.get("scales")
    if not isinstance(given, dict):
        return None
    entropy, weight, log_ratio = (_amount(given.get(name)) for name in ("entropy", "weight", "log_ratio"))
    if entropy is None or weight is None or log_ratio is None:
        return None
    return Scales(entropy=entropy, weight=weight, log_ratio=log_ratio)


def largest(data: Mapping[str, Any]) -> dict[str, Number]:
    given = data.get("largest")
    found = list(given.items())[:MAX_COMPONENTS] if isinstance(given, dict) else []
    amounts = {str(text_of(name)): _amount(value) for name, value in found}
    return {name: value for name, value in amounts.items() if value}


def _amount(value: Any) -> float | None:
    """A finite number that isn't negative."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    return float(value) if fits else None


def _layout(given: Any, completion: str, owners: Owners | None) -> Layout | None:
    if not isinstance(given, dict) or given.get("kind") not in ("grid", "line", "code"):
        return None
    cells, columns = given.get("cells"), given.get("columns")
    if not isinstance(cells, list) or not 0 < len(cells) <= MAX_CELLS:
        return None
    if not isinstance(columns, int) or not 0 < columns <= MAX_CELLS:
        return None
    found = [_cell(cell, completion, owners) for cell in cells]
    return Layout(kind=given["kind"], columns=columns, cells=[cell for cell in found if cell is not None])


def _cell(given: Any, completion: str, owners: Owners | None) -> LayoutCell | None:
    text, mark = (given.get("text"), given.get("mark")) if isinstance(given, dict) else (None, None)
    if not isinstance(text, str) or mark not in (None, *_MARKS):
        return None
    start, end = given.get("start"), given.get("end")
    stands = isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(completion)
    return LayoutCell(
        text=str(text_of(text)),
        written=completion[start:end] if stands else None,
        mark=mark,
        positions=owners.of(start, end) if stands and owners is not None else [],
    )
