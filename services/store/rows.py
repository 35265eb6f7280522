"""Rows as they come out of a store that may be anybody's: SQLite keeps a value of any type and size in any column."""

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from rewards.errors import StoreError
from services.store import schema
from services.store.values import ROW_BYTES, size

MAX_ANSWER_BYTES = 96 * 2**20
"""Of all rows of one query, roughly: more than a run writes that people can look at."""

Types = frozenset[type] | None
"""That a column's values may have; None: any."""


def dicts(connection: sa.Connection, query: sa.Select[Any]) -> list[dict[str, Any]]:
    """Rows with the types of ``schema``, by the names of their columns. Raises StoreError for others."""
    columns = query.selected_columns
    names, types = columns.keys(), [_OF_COLUMNS.get(column) for column in columns]
    return [dict(zip(names, row, strict=True)) for row in fetched(connection, query, types)]


def fetched(connection: sa.Connection, query: sa.Select[Any], types: Sequence[Types]) -> Iterator[Sequence[Any]]:
    """Rows one by one. Raises StoreError for a value of another type, and when it becomes too much."""
    left = MAX_ANSWER_BYTES
    # Where its texts and objects are, by the types of a row, of which there are few.
    known: dict[tuple[type, ...], tuple[list[int], list[int]]] = {}
    for row in connection.execute(query):
        kinds = tuple(map(type, row))
        if kinds not in known:
            _require_types(kinds, types)
            texts = [index for index, kind in enumerate(kinds) if kind is str or kind is bytes]
            known[kinds] = texts, [index for index, kind in enumerate(kinds) if kind is dict]
        texts, objects = known[kinds]
        left -= ROW_BYTES
        for index in texts:
            left -= len(row[index])
        for index in objects:
            left -= size(row[index])
        if left < 0:
            raise StoreError(f"the run store answers with more than {MAX_ANSWER_BYTES >> 20} MiB, no run writes that")
        yield row


def number(value: float | None, nonfinite: str | None) -> float:
    """The value of a metric out of the columns that keep it. Raises StoreError when they hold none."""
    if nonfinite is None and value is not None and math.isfinite(value):
        return value
    if nonfinite not in ("nan", "inf", "-inf"):
        raise StoreError("the run store holds a metric whose value is none")
    return float(nonfinite)


def whole(value: Any) -> int | None:
    """A single number. Raises StoreError when it is none."""
    if value is not None and type(value) is not int:
        raise StoreError(f"the run store holds a {type(value).__name__} where no run writes one")
    return value


def _require_types(found: Sequence[type], types: Sequence[Types]) -> None:
    for kind, allowed in zip(found, types, strict=True):
        if allowed is not None and kind not in allowed:
            raise StoreError(f"the run store holds a {kind.__name__} where no run writes one")


def _of(*types: type) -> Types:
    return frozenset(types)


def _of_column(column: sa.Column[Any]) -> Types:
    kind = dict if isinstance(column.type, sa.JSON) else column.type.python_type
    return _of(kind, type(None)) if column.nullable else _of(kind)


_OF_COLUMNS: dict[Any, Types] = {
    column: _of_column(column) for table in schema.metadata.tables.values() for column in table.c
}
_FIGURE = _of(float, type(None))
OF_SERIES = [
    *(_of(str), _of(int), _of(int), _of(int, Decimal), _of(int, Decimal)),  # PostgreSQL's sums are Decimal
    *(_of(str, type(None)), _FIGURE, _FIGURE, _FIGURE, _of(float)),
]
"""A name and the columns of ``buckets.merged``."""
