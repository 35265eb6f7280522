"""Reads problem files: csv or jsonl, plain or gzipped, row by row, with every fault named by file and line.

A file may come from anybody, and a few hundred kilobytes of gzip can be gigabytes. So no row is read beyond
``MAX_ROW`` characters, and no gzipped file beyond ``MAX_UNPACKED``; what isn't compressed is as large as it looks.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from rewards.errors import ConfigError, DataError
from rewards.task import Problem

SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")

MAX_ROW = 16 * 2**20
"""Characters of a row (of its line, or of all lines of a csv row): a thousand times the longest published trace."""
MAX_UNPACKED = 4 * 2**30
"""Characters of a gzipped file."""

Row = dict[str, Any]


def problems_from_file(
    path: str, *, task: str, size: int, convert: Callable[[Row], dict[str, Any] | None]
) -> list[Problem]:
    """The first ``size`` usable rows of a file as problems, in file order.

    ``convert`` makes a row into a task's fields, returns None for a row that is well formed but of another kind
    (Countdown with four numbers), and raises DataError for a row that is wrong, which ends the reading. Raises
    DataError naming the file and line, and for a file without one usable row.
    """
    stem = Path(path).name.split(".")[0]
    rows = ((line, f"{path}, line {line}", row) for line, row in read_rows(path))
    return problems_from_rows(rows, source=path, stem=f"{task}-{stem}", task=task, size=size, convert=convert)


def problems_from_rows(
    rows: Iterable[tuple[int, str, Row]],
    *,
    source: str,
    stem: str,
    task: str,
    size: int,
    convert: Callable[[Row], dict[str, Any] | None],
) -> list[Problem]:
    """``problems_from_file`` for rows from anywhere: number, place (for messages) and content of each. Problem ids are
    the stem and the row's number."""
    if size < 1:
        raise ConfigError(f"{task}: size is {size}; ask for at least 1 problem")

    def usable() -> Iterator[Problem]:
        for number, place, row in rows:
            try:
                fields = convert(row)
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            if fields is not None:
                yield Problem(f"{stem}-{number}", fields)

    problems = list(islice(usable(), size))
    if not problems:
        raise DataError(f"{source} has no problem for the task {task}; choose a source in that task's format")
    return problems


def read_rows(path: str) -> Iterator[tuple[int, Row]]:
    """Line number (from 1) and row, one at a time. CSV values stay strings, so leading zeros survive.

    Raises DataError, naming file and line, for a row that can't be read or is longer than the bounds above.
    """
    if not path.endswith(SUFFIXES):
        raise DataError(f"{path}: the file type is not known; use one of {', '.join(SUFFIXES)}")
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            lines = _lines(cast(IO[str], file), path)
            yield from _csv_rows(lines, path) if path.removesuffix(".gz").endswith(".csv") else _jsonl_rows(lines, path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}); check the path and that the file is whole") from error


def _lines(file: IO[str], path: str) -> Iterator[str]:
    left = MAX_UNPACKED if path.endswith(".gz") else math.inf
    number = 1
    while line := file.readline(MAX_ROW + 1):
        left -= len(line)
        if len(line) > MAX_ROW:
            raise DataError(f"{path}, line {number}: {too_long()}")
        if left < 0:
            raise DataError(
                f"{path}, line {number}: the file unpacks to more than {MAX_UNPACKED} characters; unpack it first if "
                "that is what it should hold"
            )
        yield line
        number += 1


def too_long() -> str:
    """What is said of a row over the bound."""
    return f"longer than {MAX_ROW} characters, which no problem needs; shorten or remove the row"


def _csv_rows(lines: Iterator[str], path: str) -> Iterator[tuple[int, Row]]:
    length = number = 0  # of the row so far, whose quoted fields may hold line ends, and of the line

    def counted() -> Iterator[str]:
        nonlocal length, number
        for line in lines:
            length, number = length + len(line), number + 1
            if length > MAX_ROW:
                raise DataError(f"{path}, line {number}: {too_long()}")
            yield line

    reader = csv.DictReader(counted())
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {number}: not csv ({error}); repair or remove the row") from None
        if row is None:
            return
        yield number, {key: value for key, value in row.items() if isinstance(key, str)}
        length = 0


def _jsonl_rows(lines: Iterator[str], path: str) -> Iterator[tuple[int, Row]]:
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); repair or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object; repair or remove the line")
        yield number, row
