"""Reads problem files: csv or jsonl, plain or gzipped, row by row, with every fault named by file and line."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from rewards.errors import ConfigError, DataError
from rewards.task import Problem

SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")

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
    """Line number (from 1) and row, one at a time. CSV values stay strings, so leading zeros survive."""
    if not path.endswith(SUFFIXES):
        raise DataError(f"{path}: the file type is not known; use one of {', '.join(SUFFIXES)}")
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = cast(IO[str], file)
            is_csv = path.removesuffix(".gz").endswith(".csv")
            yield from _csv_rows(text) if is_csv else _jsonl_rows(text, path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read ({error}); check the path and that the file is whole") from error


def _csv_rows(file: IO[str]) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if isinstance(key, str)}


def _jsonl_rows(file: IO[str], path: str) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not JSON ({error}); repair or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: not a JSON object; repair or remove the line")
        yield line, row
