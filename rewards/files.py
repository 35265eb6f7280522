"""Reads problem files: csv, tsv, jsonl or json, plain or gzipped, and parquet, row by row, with every fault named by
file and line.

A file may come from anybody, and a few hundred kilobytes of gzip can be gigabytes. So no row is read beyond
``MAX_ROW`` characters, no gzipped file beyond ``MAX_UNPACKED`` and no json that is one list beyond ``MAX_LIST``; what
isn't compressed is as large as it looks.
"""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from rewards.errors import ConfigError, DataError, first_line
from rewards.task import Problem

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""What a file may be, in any case; all but parquet also with .gz behind it."""

MAX_ROW = 16 * 2**20
"""Characters of a row (of its line, or of all lines of a csv row): a thousand times the longest published trace."""
MAX_UNPACKED = 4 * 2**30
"""Characters of a gzipped file."""
MAX_LIST = 2**29
"""Characters of a json file that is one list, which is read whole."""
_SPACE = re.compile(r"[ \t\n\r]*")
_PARQUET_ROWS = 16
"""Rows unpacked at once."""

csv.field_size_limit(MAX_ROW)  # the module's own is 131,072, less than some traces have

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
    rows = read_rows(path)
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


def read_rows(path: str) -> Iterator[tuple[int, str, Row]]:
    """Number, place (for messages) and row, one at a time. The number is the line's, from 1, but in parquet files and
    JSON lists, which may stand on one line, the row's. CSV values stay strings, so leading
    zeros survive.

    Raises DataError, naming file and line, for a row that can't be read or is longer than the bounds above.
    """
    name = path.lower()
    packed = name.endswith(".gz")
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in SUFFIXES or (packed and kind == ".parquet"):
        raise DataError(f"{path}: the file type is not known; use {known_types()}")
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
            return
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            lines = _lines(cast(IO[str], file), path, packed)
            if kind in (".csv", ".tsv"):
                yield from _csv_rows(lines, path, "," if kind == ".csv" else "\t")
            elif kind == ".json" and _is_list(file):
                yield from _listed_rows(cast(IO[str], file), path)
            else:
                yield from _jsonl_rows(lines, path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}); check the path and that the file is whole") from error


def shipped_rows(name: str, split: str, size: int) -> list[Row]:
    """The first ``size`` rows of a split of a file in ``rewards/data``, by its column ``split``."""
    path = Path(__file__).parent / "data" / name
    return list(islice((row for _, _, row in read_rows(str(path)) if row["split"] == split), size))


def known_types() -> str:
    """For messages."""
    return f"one of {', '.join(SUFFIXES)}, all but .parquet also with .gz"


def characters(value: Any) -> int:
    """Of all texts in a row, and one for everything else in it."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return 1 + sum(map(characters, value)) if isinstance(value, list | tuple) else 1


def _lines(file: IO[str], path: str, packed: bool) -> Iterator[str]:
    left = MAX_UNPACKED if packed else math.inf
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


def _csv_rows(lines: Iterator[str], path: str, delimiter: str) -> Iterator[tuple[int, str, Row]]:
    length = number = 0  # of the row so far, whose quoted fields may hold line ends, and of the line

    def counted() -> Iterator[str]:
        nonlocal length, number
        for line in lines:
            length, number = length + len(line), number + 1
            if length > MAX_ROW:
                raise DataError(f"{path}, line {number}: {too_long()}")
            yield line

    reader = csv.DictReader(counted(), delimiter=delimiter)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {number}: not csv ({error}); repair or remove the row") from None
        if row is None:
            return
        named = {key.strip(): value for key, value in row.items() if isinstance(key, str)}
        yield number, f"{path}, line {number}", named
        length = 0


def _parquet_rows(path: str) -> Iterator[tuple[int, str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package pyarrow ({error}); install it with `pip install pyarrow`, or convert the file"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    if characters(row) > MAX_ROW:
                        raise DataError(f"{where}: {too_long()}")
                    yield number, where, row
    except ArrowException as error:
        raise DataError(f"{path}, row {number + 1}: not parquet ({first_line(error)}); repair the file") from None


def _is_list(file: Any) -> bool:
    """Whether a file that was just opened begins with a JSON list; it is at its beginning afterwards."""
    begins = file.read(4096).lstrip().startswith("[")
    file.seek(0)
    return begins


def _listed_rows(file: IO[str], path: str) -> Iterator[tuple[int, str, Row]]:
    """One list of objects, an element at a time."""
    text = file.read(MAX_LIST + 1)
    if len(text) > MAX_LIST:
        raise DataError(f"{path}: a JSON list of more than {MAX_LIST} characters; write it as .jsonl, an object a line")
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    place = _behind_space(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        number, line, counted = number + 1, line + text.count("\n", counted, place), place
        where = f"{path}, line {line}"
        try:
            row, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); repair or remove the element") from None
        if end - place > MAX_ROW:
            raise DataError(f"{where}: {too_long()}")
        yield number, where, _checked(row, text[place:end], where)
        place = _behind_space(text, end)
        if text[place : place + 1] == ",":
            place = _behind_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(f"{where}: not JSON (neither a comma nor ] behind this element); repair or remove it")


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None, "it matches nothing at all too"
    return found.end()


def _checked(row: Any, text: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object; repair or remove it")
    if "\\ud" in text.lower():  # half of a pair is JSON, but no text
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: half of a surrogate pair, which is no character; remove it") from None
    return row


def _jsonl_rows(lines: Iterator[str], path: str) -> Iterator[tuple[int, str, Row]]:
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); repair or remove the line") from None
        yield number, where, _checked(row, text, where)
