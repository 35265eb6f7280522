"""metrics.jsonl and the other files of one JSON object a line: written whole line by whole line, read whatever befell
them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMING_PREFIXES = ("time/", "machine/")
"""Metrics under these say how the machine did; all others repeat exactly when a synchronous run is repeated."""


class LineFile:
    """A file that grows by whole lines: each is one write, and a line that doesn't fit is taken back."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def append(self, line: str) -> None:
        """Raises OSError; the file then ends as it did before."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        data = line.encode("utf-8", "replace")
        before = os.fstat(self._descriptor).st_size
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError:
            if written:
                os.ftruncate(self._descriptor, before)
            raise

    def sync(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def json_line(row: dict[str, Any]) -> str:
    """The row as such a file holds it. Raises ValueError for a number that is not finite."""
    return json.dumps(row, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file, each with an ``iteration``; a line cut short by a kill or a full disk is left out."""
    return [row for _, row in _lines(path) if row is not None]


def unreadable_lines(path: Path) -> list[int]:
    """Numbers, from 1, of the lines of such a file that are no rows; the last one may have been cut short."""
    return [number for number, row in _lines(path) if row is None]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    whole, _, rest = text.rpartition("\n")
    for number, line in enumerate([*whole.split("\n"), rest], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            yield number, row
        elif line.strip() and line is not rest:
            yield number, None
