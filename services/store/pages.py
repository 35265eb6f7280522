"""Lists that come a page at a time. A cursor names the last row seen: what comes or goes meanwhile shifts nothing."""

import base64
import json
import math
from typing import Any, NamedTuple

import sqlalchemy as sa

from services.store.schema import latest_metrics, runs
from services.store.values import plain

RUN_ORDERS = ("created", "heartbeat", "id", "task", "objective", "status")
_METRIC = "metric:"
_LOWEST = -1.5e308  # runs without the metric, or with one that is no finite number, come after all others


class Page(NamedTuple):
    """``next`` is the cursor of the page behind this one; None at the end."""

    rows: list[dict[str, Any]]
    next: str | None


class RunOrder:
    """``created``, ``heartbeat``, ``id``, ``task``, ``objective``, ``status`` or ``metric:NAME``, with - for downwards.

    Raises ``ValueError`` for anything else.
    """

    def __init__(self, sort: str) -> None:
        self.down, name = sort.startswith("-"), sort.removeprefix("-")
        if name not in RUN_ORDERS and not name.startswith(_METRIC):
            known = ", ".join(RUN_ORDERS)
            raise ValueError(
                f"runs can't be sorted by {sort!r}: take one of {known}, metric:NAME, with - for downwards"
            )
        self.sort = plain(sort)
        self._metric = plain(name.removeprefix(_METRIC)) if name.startswith(_METRIC) else None
        self._key: sa.ColumnElement[Any] = runs.c[name] if self._metric is None else self._metric_key()

    def apply(self, query: sa.Select[Any], cursor: str | None) -> sa.Select[Any]:
        """The query in this order, from behind the cursor on, with a column ``sort_key``. Raises ``ValueError`` for a
        cursor that is none of this order."""
        if self._metric is not None:
            of_run = (latest_metrics.c.run_id == runs.c.id) & (latest_metrics.c.name == self._metric)
            query = query.select_from(runs.outerjoin(latest_metrics, of_run))
        if cursor is not None:
            sort, value, run_id = read_cursor(cursor, str, (str, int, float), str)
            is_text = self._metric is None and isinstance(runs.c[self.sort.removeprefix("-")].type, sa.Text)
            if sort != self.sort or isinstance(value, str) != is_text:
                raise ValueError("the cursor belongs to another list: begin again without it")
            here, there = sa.tuple_(self._key, runs.c.id), sa.tuple_(sa.literal(value), sa.literal(run_id))
            query = query.where(here < there if self.down else here > there)
        orders = (self._key, runs.c.id)
        query = query.order_by(*(order.desc() for order in orders) if self.down else orders)
        return query.add_columns(self._key.label("sort_key"))

    def cursor(self, row: dict[str, Any]) -> str:
        return write_cursor(self.sort, row["sort_key"], row["id"])

    def _metric_key(self) -> sa.ColumnElement[float]:
        sign = -1.0 if not self.down else 1.0  # at the end in either direction
        return sa.func.coalesce(latest_metrics.c.value, sa.literal(sign * _LOWEST, sa.Double))


def write_cursor(*values: str | int | float) -> str:
    return base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode().rstrip("=")


def read_cursor(cursor: str, *kinds: type | tuple[type, ...]) -> list[Any]:
    """What ``write_cursor`` packed. Raises ``ValueError`` for anything that it didn't write."""
    try:
        values = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        fits = isinstance(values, list) and len(values) == len(kinds)
        fits = fits and all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
    except (ValueError, RecursionError):
        fits = False
    if not fits or any(isinstance(value, bool) or _too_large(value) for value in values):
        raise ValueError("the cursor is none: take the one that came with the page before, or none for the first page")
    return [plain(value) if isinstance(value, str) else value for value in values]


def _too_large(value: Any) -> bool:
    return not math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and not abs(value) < 2**63
