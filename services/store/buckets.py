"""Down-sampled metrics: of each series and level, what lies in iterations [bucket, bucket + 1) * 8**level.

A level is computed from the one below it, the first from the rows themselves, always anew for whole buckets: rows that
are replaced or reported again change nothing twice. A bucket keeps the lowest and the highest finite value, so that no
spike vanishes, their mean, and the worst value that is no finite number.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from services.store.schema import latest_metrics, metric_buckets, metrics, runs

FACTOR = 8
LEVELS = 4
_MANY_NAMES = 500
_FAR = 64  # buckets between two reports that are refreshed apart


@dataclass(frozen=True)
class Points:
    """Columns of a series, whether of rows or of buckets: ``position`` is the iteration or the bucket."""

    position: sa.ColumnElement[int]
    last_iteration: sa.ColumnElement[int]
    count: sa.ColumnElement[int]
    bad: sa.ColumnElement[int]
    nonfinite: sa.ColumnElement[str | None]
    low: sa.ColumnElement[float | None]
    high: sa.ColumnElement[float | None]
    mean: sa.ColumnElement[float | None]
    time: sa.ColumnElement[float]


def of_rows() -> Points:
    """``metrics`` as buckets of one iteration each."""
    table = metrics.c
    finite = sa.case((table.value.is_(None), 0), else_=1)
    # PostgreSQL raises an error where a product underflows
    mean = sa.case((sa.func.abs(table.value) < 1e-290, 0.0), else_=table.value)
    nonfinite = table.nonfinite
    return Points(
        table.iteration, table.iteration, finite, 1 - finite, nonfinite, table.value, table.value, mean, table.time
    )


def of_buckets() -> Points:
    """``metric_buckets``, whose level the query has to name."""
    table = metric_buckets.c
    return Points(
        table.bucket,
        table.last_iteration,
        table.count,
        table.bad,
        table.nonfinite,
        table.low,
        table.high,
        table.mean,
        table.time,
    )


def merged(points: Points, per_bucket: int, most: int) -> list[sa.ColumnElement[Any]]:
    """Aggregates over ``per_bucket`` neighbours, as columns in the order of ``Points``; to be grouped by the first.

    most: no bucket holds more rows. The mean is summed of parts divided by it, so that large values don't overflow.
    """
    total = sa.func.sum(points.count)
    share = points.mean * (sa.cast(points.count, sa.Double) / float(most))
    mean = sa.func.sum(share) * (float(most) / sa.cast(sa.func.nullif(total, 0), sa.Double))
    return [
        (points.position // per_bucket).label("slot"),
        sa.func.max(points.last_iteration).label("last_iteration"),
        total.label("count"),
        sa.func.sum(points.bad).label("bad"),
        sa.func.max(points.nonfinite).label("nonfinite"),
        sa.func.min(points.low).label("low"),
        sa.func.max(points.high).label("high"),
        mean.label("mean"),
        sa.func.max(points.time).label("time"),
    ]


def follow(connection: sa.Connection, run_id: str, rows: Collection[dict[str, Any]]) -> None:
    """Bring the newest values and the buckets up to date with rows of ``metrics`` just written."""
    newest: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["name"] not in newest or row["iteration"] >= newest[row["name"]]["iteration"]:
            newest[row["name"]] = {"run_id": run_id, **row}
    if not newest:
        return
    insert = _insert_into(connection, latest_metrics)
    upsert = insert.on_conflict_do_update(
        index_elements=["run_id", "name"],
        set_={name: insert.excluded[name] for name in ("iteration", "value", "nonfinite", "time")},
        where=insert.excluded.iteration >= latest_metrics.c.iteration,
    )
    connection.execute(upsert, list(newest.values()))
    refresh(connection, run_id, list(newest), {row["iteration"] for row in rows})


def refresh(connection: sa.Connection, run_id: str, names: Collection[str] | None, iterations: Collection[int]) -> None:
    """Recompute the buckets that hold these iterations, of some series or of all."""
    for level in range(1, LEVELS + 1):
        for first, last in _ranges({iteration // FACTOR**level for iteration in iterations}):
            _refresh_level(connection, run_id, names, level, first, last)


def truncate(connection: sa.Connection, run_id: str, after: int) -> None:
    """Follow ``metrics``, from which the rows beyond ``after`` have just been removed.

    Where the rows up to ``after`` are pruned, those in its last bucket of 8 iterations go with it.
    """
    buckets, latest = metric_buckets.c, latest_metrics.c
    for level in range(1, LEVELS + 1):
        beyond = (
            (buckets.run_id == run_id) & (buckets.level == level) & (buckets.bucket >= (after + 1) // FACTOR**level)
        )
        connection.execute(metric_buckets.delete().where(beyond))
    refresh(connection, run_id, None, [after + 1])
    first_new = (after + 1) // FACTOR * FACTOR
    lower = (runs.c.id == run_id) & (runs.c.raw_from > first_new)
    connection.execute(runs.update().where(lower).values(raw_from=first_new))
    gone = (latest.run_id == run_id) & (latest.iteration > after)
    names = connection.execute(sa.select(latest.name).where(gone)).scalars().all()
    connection.execute(latest_metrics.delete().where(gone))
    for name in names:
        columns = [metrics.c[column.name] for column in latest_metrics.c]
        newest = sa.select(*columns).where(metrics.c.run_id == run_id, metrics.c.name == name)
        newest = newest.order_by(metrics.c.iteration.desc()).limit(1)
        connection.execute(latest_metrics.insert().from_select([column.name for column in columns], newest))


def _refresh_level(
    connection: sa.Connection, run_id: str, names: Collection[str] | None, level: int, first: int, last: int
) -> None:
    table = metrics if level == 1 else metric_buckets
    points = of_rows() if level == 1 else of_buckets()
    bucket, *rest = merged(points, FACTOR, FACTOR**level)
    query = sa.select(table.c.run_id, table.c.name, sa.literal(level), bucket, *rest)
    query = query.where(table.c.run_id == run_id, points.position >= first * FACTOR)
    query = query.where(points.position < (last + 1) * FACTOR)
    if level > 1:
        query = query.where(table.c.level == level - 1)
    if names is not None and len(names) <= _MANY_NAMES:
        query = query.where(table.c.name.in_(names))
    query = query.group_by(table.c.run_id, table.c.name, bucket)
    columns = ["run_id", "name", "level", "bucket", *(column.name for column in rest)]
    insert = _insert_into(connection, metric_buckets)
    replace = insert.from_select(columns, query).on_conflict_do_update(
        index_elements=columns[:4], set_={name: insert.excluded[name] for name in columns[4:]}
    )
    connection.execute(replace)


def _insert_into(connection: sa.Connection, table: sa.Table) -> Any:
    """The dialect's own insert, which knows ON CONFLICT."""
    return (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)


def _ranges(numbers: Collection[int]) -> Sequence[tuple[int, int]]:
    """The numbers as (first, last) of stretches without wide gaps."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and number - ranges[-1][1] <= _FAR:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges
