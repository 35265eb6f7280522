"""All rows of a run store, as they are: what tests compare with what was written."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from services.store.reader import Reader
from services.store.schema import events, metrics, runs, samples


def list_runs(engine: sa.Engine) -> list[dict[str, Any]]:
    """All runs, newest first, as dicts of the columns of ``runs``."""
    return Reader(engine).select(sa.select(runs).order_by(runs.c.created.desc(), runs.c.id))


def metric_series(engine: sa.Engine, run_id: str, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(iteration, value) of each name by rising iteration; NaN and infinities come back as floats."""
    table = metrics
    query = sa.select(table.c.name, table.c.iteration, table.c.value, table.c.nonfinite)
    query = query.where(table.c.run_id == run_id, table.c.name.in_(names)).order_by(table.c.name, table.c.iteration)
    series: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for row in Reader(engine).select(query):
        value = row["value"] if row["nonfinite"] is None else float(row["nonfinite"])
        series[row["name"]].append((row["iteration"], value))
    return series


def list_events(engine: sa.Engine, run_id: str, *, after_id: int = 0) -> list[dict[str, Any]]:
    """Events in the order in which they were written, from behind ``after_id`` on."""
    table = events
    query = sa.select(table).where(table.c.run_id == run_id, table.c.id > after_id).order_by(table.c.id)
    return Reader(engine).select(query)


def list_samples(engine: sa.Engine, run_id: str) -> list[dict[str, Any]]:
    """Sampled trajectories by iteration, group and row, without their ``trajectory`` bytes."""
    table = samples
    columns = [column for column in table.c if column is not table.c.trajectory]
    query = sa.select(*columns).where(table.c.run_id == run_id)
    return Reader(engine).select(query.order_by(table.c.iteration, table.c.kind, table.c.group_id, table.c.row))


def sample_trajectory(engine: sa.Engine, sample_id: int) -> bytes | None:
    """The safetensors bytes of one sample, None when there is no such sample."""
    query = sa.select(samples.c.trajectory).where(samples.c.id == sample_id)
    with engine.connect() as connection:
        return connection.execute(query).scalar()
