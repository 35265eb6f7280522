"""Reading the run store. ``engine`` is ``schema.open_engine(url, create=False)``; times are Unix seconds, rows dicts of
the columns in ``schema``, and metric values that are no finite number come as floats nan, inf and -inf.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import sqlalchemy as sa

from rewards.errors import StoreError
from services.store import buckets, schema
from services.store.pages import Page, read_cursor, write_cursor
from services.store.rows import OF_SERIES, dicts, fetched, number, whole
from services.store.schema import checkpoints, events, latest_metrics, metric_buckets, metrics, runs, samples, workers
from services.store.values import plain


class Series(TypedDict):
    """Points of a metric by rising iteration.

    A point stands for up to as many iterations as the series needs to fit: ``iteration`` is the last of them, ``value``
    their mean, or the worst of nan, inf and -inf when one is among them, ``low`` and ``high`` the extremes of the
    finite values (None without any), ``count`` how many values there are.
    """

    iteration: list[int]
    value: list[float]
    low: list[float | None]
    high: list[float | None]
    count: list[int]


class Changes(NamedTuple):
    """What is new behind a marker. Apply it in this order: ``reset``, ``truncated_after``, then the rows, which replace
    those with the same key (name and iteration, event id, worker id, ...).

    Attributes:
        marker: where the next call begins; ``more``: and that it will find something right away.
        reset: the marker was of another run by this name: forget everything and load it anew.
        truncated_after: the run went back: metrics, samples and checkpoints of later iterations are gone.
        run: as it is now, without config and summary; None when it is gone.
        metrics: name, iteration, value, time, revision. ``samples``: without texts and trajectories.
    """

    marker: str
    more: bool = False
    reset: bool = False
    truncated_after: int | None = None
    run: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = []  # noqa: RUF012
    events: list[dict[str, Any]] = []
    workers: list[dict[str, Any]] = []
    checkpoints: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []


class Reader:
    """The runs of one store. Every method raises ``StoreError`` when the database can't answer (locked, damaged, gone),
    or holds what no run writes; a run that isn't there has no rows. Values of columns have the types of ``schema``.
    """

    def __init__(self, engine: sa.Engine) -> None:
        """engine: opened with ``read_only``, so that each answer is of one moment."""
        self._engine = engine

    def list_runs(self, *, limit: int = 100, cursor: str | None = None) -> Page:
        """Runs, the newest first, without config and summary, each with ``latest`` (see ``latest_metrics``).

        Raises ``ValueError`` for a cursor that is none.
        """
        query = sa.select(*_LISTED)
        if cursor is not None:
            created, run_id = read_cursor(cursor, (int, float), str)
            query = query.where(
                sa.tuple_(runs.c.created, runs.c.id) < sa.tuple_(sa.literal(created), sa.literal(run_id))
            )
        query = query.order_by(runs.c.created.desc(), runs.c.id.desc()).limit(limit + 1)
        with self._reading() as connection:
            rows = dicts(connection, query)
            latest = _latest(connection, [row["id"] for row in rows[:limit]])
        last = rows[limit - 1] if len(rows) > limit else None
        following = None if last is None else write_cursor(last["created"], last["id"])
        return Page([row | {"latest": latest[row["id"]]} for row in rows[:limit]], following)

    def run_ids(self) -> list[str]:
        return [row["id"] for row in self.select(sa.select(runs.c.id).order_by(runs.c.id))]

    def run(self, run_id: str) -> dict[str, Any] | None:
        """All there is in ``runs``, config and summary too."""
        return next(iter(self.select(sa.select(runs).where(runs.c.id == plain(run_id)))), None)

    def latest_metrics(self, run_id: str) -> dict[str, dict[str, Any]]:
        """By name the newest ``iteration``, ``value`` and ``time``."""
        with self._reading() as connection:
            return _latest(connection, [plain(run_id)])[plain(run_id)]

    def metric_names(self, run_id: str) -> list[str]:
        return sorted(self.latest_metrics(run_id))

    def series(
        self, run_id: str, names: Sequence[str], *, first: int | None = None, last: int | None = None, points: int = 500
    ) -> dict[str, Series]:
        """Each name's course from iteration ``first`` to ``last`` (0 and the newest), in at most ``points`` points, a
        few more where rows were pruned. The points of all names lie on the same grid of iterations."""
        with self._reading() as connection:
            parts = _plan(connection, run_id, names, first, last, points)
            queries = [_grouped(run_id, names, part) for part in parts]
            rows = [row for query in queries for row in fetched(connection, query, OF_SERIES)]
        series: dict[str, Series] = {name: Series(iteration=[], value=[], low=[], high=[], count=[]) for name in names}
        stored_as = {plain(name): name for name in names}
        for name, _, iteration, count, bad, nonfinite, low, high, mean, _ in rows:
            if name not in stored_as:
                raise StoreError(_NOT_ASKED_FOR)
            one = series[stored_as[name]]
            one["iteration"].append(iteration)
            one["value"].append(number(mean, nonfinite) if mean is None or nonfinite is not None else mean)
            one["low"].append(low)
            one["high"].append(high)
            one["count"].append(int(count + bad))
        return series

    def events(
        self,
        run_id: str,
        *,
        after_id: int = 0,
        before_id: int | None = None,
        level: str | None = None,
        kind: str | None = None,
        limit: int = 200,
        newest: bool = False,
    ) -> list[dict[str, Any]]:
        """By rising id, in the order in which they happened: the first ``limit``, or with ``newest`` the last."""
        query = sa.select(events).where(events.c.run_id == plain(run_id), events.c.id > _int64(after_id))
        if before_id is not None:
            query = query.where(events.c.id < _int64(before_id))
        for column, wanted in ((events.c.level, level), (events.c.kind, kind)):
            if wanted is not None:
                query = query.where(column == plain(wanted))
        rows = self.select(query.order_by(events.c.id.desc() if newest else events.c.id).limit(limit))
        return rows[::-1] if newest else rows

    def workers(self, run_id: str) -> list[dict[str, Any]]:
        return self.select(sa.select(workers).where(workers.c.run_id == plain(run_id)).order_by(workers.c.worker_id))

    def checkpoints(self, run_id: str) -> list[dict[str, Any]]:
        of_run = checkpoints.c.run_id == plain(run_id)
        return self.select(sa.select(checkpoints).where(of_run).order_by(checkpoints.c.iteration))

    def samples(
        self,
        run_id: str,
        *,
        kind: str | None = None,
        iteration: int | None = None,
        correct: bool | None = None,
        text: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """Sampled completions, the newest iteration first, without their trajectories; with ``text`` those that have it
        in their problem's id, prompt or completion, in any case. Raises ``ValueError`` for a cursor that is none."""
        table = samples.c
        query = sa.select(*_WITHOUT_TRAJECTORY).where(table.run_id == plain(run_id))
        if kind is not None:
            query = query.where(table.kind == plain(kind))
        if iteration is not None:
            query = query.where(table.iteration == _int64(iteration))
        if correct is not None:
            query = query.where(table.correct == correct)
        if text is not None:
            places = (table.problem_id, table.prompt, table.completion)
            query = query.where(sa.or_(*(place.icontains(plain(text), autoescape=True) for place in places)))
        if cursor is not None:
            seen, id_ = read_cursor(cursor, int, int)
            query = query.where((table.iteration < seen) | ((table.iteration == seen) & (table.id > id_)))
        rows = self.select(query.order_by(table.iteration.desc(), table.id).limit(limit + 1))
        more = len(rows) > limit
        return Page(rows[:limit], write_cursor(rows[limit - 1]["iteration"], rows[limit - 1]["id"]) if more else None)

    def sample(self, run_id: str, sample_id: int) -> dict[str, Any] | None:
        """One of them with its ``trajectory``, safetensors bytes; None instead of one above
        ``schema.MAX_BLOB_BYTES``."""
        return self.first_sample(samples.c.run_id == plain(run_id), samples.c.id == _int64(sample_id))

    def first_sample(self, *where: sa.ColumnElement[bool], order: Sequence[Any] = ()) -> dict[str, Any] | None:
        """As ``sample``, the first that fits."""
        query = sa.select(*_WITHOUT_TRAJECTORY, _TRAJECTORY).where(*where).order_by(*order).limit(1)
        return next(iter(self.select(query)), None)

    def marker(self, run_id: str) -> str:
        """Where the run's rows end now: take it, load what is there, then follow with ``changes_since``."""
        with self._reading() as connection:
            return _marker(_run(connection, run_id))

    def changes_since(self, run_id: str, marker: str, *, limit: int = 5000) -> Changes:
        """What was written since, once each, as long as each call takes the marker of the one before; a service that
        starts anew, or reads a copy of the store, goes on with it too.

        Whole transactions of the writer, whose metrics and events together are about ``limit`` rows at most. Nothing of
        what stood in a version 1 store, which carries no revision, is ever a change.
        """
        with self._reading() as connection:
            run = _run(connection, run_id)
            identity, _, seen = marker.partition("-")
            known = identity == _marker(run).partition("-")[0] and seen.isdecimal() and len(seen) < 19
            if run is None or not known or int(seen) > run["revision"]:
                return Changes(_marker(run), reset=True, run=run)
            since, until = int(seen), run["revision"]
            for table in (metrics, events):
                until = _until(connection, table, run["id"], since, until, limit)

            def new(table: sa.Table, *columns: sa.Column[Any]) -> list[dict[str, Any]]:
                between = (table.c.run_id == run["id"]) & (table.c.revision > since) & (table.c.revision <= until)
                return dicts(connection, sa.select(*(columns or [table])).where(between).order_by(table.c.revision))

            went_back = [row["after"] for row in new(schema.truncations)]
            return Changes(
                f"{identity}-{until}",
                more=until < run["revision"],
                truncated_after=min(went_back, default=None),
                run=run,
                metrics=[_value(row) for row in new(metrics, *_METRIC)],
                events=new(events),
                workers=new(workers),
                checkpoints=new(checkpoints),
                samples=new(samples, *_BRIEF),
            )

    def select(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        """Rows of a query of one's own on the tables of ``schema``."""
        with self._reading() as connection:
            return dicts(connection, query)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except schema.UNANSWERED as error:
            reason = schema.short_reason(error)
            raise StoreError(f"cannot read the run store {self._engine.url}: {reason}") from error


class _Part(NamedTuple):
    """Iterations first to last from one level, ``width`` to a point."""

    level: int
    first: int
    last: int
    width: int


_NOT_ASKED_FOR = "the run store is damaged: it answers with what it was not asked for"
_LISTED = [column for column in runs.c if column.name not in ("config", "summary")]
_WITHOUT_TRAJECTORY = [column for column in samples.c if column is not samples.c.trajectory]
_TRAJECTORY = sa.type_coerce(
    sa.case((sa.func.length(samples.c.trajectory) <= schema.MAX_BLOB_BYTES, samples.c.trajectory)), sa.types.NullType()
).label("trajectory")
_METRIC = [metrics.c[name] for name in ("name", "iteration", "value", "nonfinite", "time", "revision")]
_BRIEF = [
    samples.c[name] for name in ("id", "iteration", "kind", "group_id", "row", "time", "correct", "reward", "revision")
]


def _plan(
    connection: sa.Connection, run_id: str, names: Sequence[str], first: int | None, last: int | None, points: int
) -> list[_Part]:
    """What to read so that no name has to give much more than eight rows a point."""
    run = _run(connection, run_id)
    of_names = (latest_metrics.c.run_id == plain(run_id)) & latest_metrics.c.name.in_([plain(name) for name in names])
    newest = whole(connection.execute(sa.select(sa.func.max(latest_metrics.c.iteration)).where(of_names)).scalar())
    if run is None or newest is None:
        return []
    first, last = max(0, first or 0), newest if last is None else min(last, newest)
    if first > last:
        return []
    width = -(-(last - first + 1) // max(points, 1))
    while last // width - first // width >= max(points, 1) and width <= last:  # the grid's first point may be cut short
        width += 1
    level = max(level for level in range(buckets.LEVELS + 1) if buckets.FACTOR**level <= width)
    unit = buckets.FACTOR**level
    width = -(-width // unit) * unit
    if level > 0 or first >= run["raw_from"]:
        return [_Part(level, first, last, width)]
    pruned = _Part(1, first, min(last, run["raw_from"] - 1), buckets.FACTOR)
    return [pruned, *([_Part(0, run["raw_from"], last, width)] if last >= run["raw_from"] else [])]


def _grouped(run_id: str, names: Sequence[str], part: _Part) -> sa.Select[Any]:
    table = metrics if part.level == 0 else metric_buckets
    points = buckets.of_rows() if part.level == 0 else buckets.of_buckets()
    unit = buckets.FACTOR**part.level
    slot, *rest = buckets.merged(points, part.width // unit, part.width)
    query = sa.select(table.c.name, slot, *rest)
    query = query.where(table.c.run_id == plain(run_id), table.c.name.in_([plain(name) for name in names]))
    query = query.where(points.position >= part.first // unit, points.position <= part.last // unit)
    if part.level > 0:
        query = query.where(table.c.level == part.level)
    return query.group_by(table.c.name, slot).order_by(table.c.name, slot)


def _until(connection: sa.Connection, table: sa.Table, run_id: str, since: int, until: int, limit: int) -> int:
    """The last revision before the table's new rows are more than ``limit``; one revision always fits."""
    new = sa.select(table.c.revision).where(table.c.run_id == run_id, table.c.revision > since)
    new = new.where(table.c.revision <= until).order_by(table.c.revision)
    over = whole(connection.execute(new.offset(limit).limit(1)).scalar())
    if over is None:
        return until
    return over if connection.execute(new.limit(1)).scalar() == over else over - 1


def _latest(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {run_id: {} for run_id in run_ids}
    for row in dicts(connection, sa.select(latest_metrics).where(latest_metrics.c.run_id.in_(run_ids))):
        run_id, name = row.pop("run_id"), row.pop("name")
        if run_id not in found:
            raise StoreError(_NOT_ASKED_FOR)
        found[run_id][name] = _value(row)
    return found


def _run(connection: sa.Connection, run_id: str) -> dict[str, Any] | None:
    return next(iter(dicts(connection, sa.select(*_LISTED).where(runs.c.id == plain(run_id)))), None)


def _marker(run: dict[str, Any] | None) -> str:
    """When the run was first entered, which tells it from another of its name, and its revision."""
    return "0-0" if run is None else f"{round(run['created'] * 1e6):x}-{run['revision']}"


def _value(row: dict[str, Any]) -> dict[str, Any]:
    row["value"] = number(row["value"], row.pop("nonfinite"))
    return row


def _int64(value: int) -> int:
    return max(-(2**63), min(value, 2**63 - 1))
