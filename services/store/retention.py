"""What a run store keeps for good, and what it may thin out. Without a setting everything is kept."""

import time
from dataclasses import dataclass

import sqlalchemy as sa

from rewards.errors import ConfigError, StoreError
from services.store import buckets, schema

_LEVEL = 2
_WIDTH = buckets.FACTOR**_LEVEL  # metric rows go by whole buckets of this level


@dataclass(frozen=True)
class Retention:
    """
    Attributes:
        samples: how many of the newest sampled trajectories a run keeps of each kind (train, base, ...).
        metric_days: after how many days a metric's rows give way to their buckets of 8 iterations (mean, lowest,
            highest, count); the newest rows stay.
    """

    samples: int | None = None
    metric_days: float | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 0:
            raise ConfigError(f"a run can't keep {self.samples} samples: give 0 or more")
        if self.metric_days is not None and not self.metric_days >= 0:
            raise ConfigError(f"metrics can't be kept for {self.metric_days} days: give 0 or more")


KEEP_ALL = Retention()


def prune(engine: sa.Engine, run_id: str, retention: Retention) -> tuple[int, int]:
    """Remove what the run need not keep; how many samples and metric rows went. Raises ``StoreError``."""
    samples = metrics = 0
    try:
        if retention.samples is not None:
            samples = _prune_samples(engine, run_id, retention.samples)
        if retention.metric_days is not None:
            metrics = _prune_metrics(engine, run_id, time.time() - 86400.0 * retention.metric_days)
    except schema.UNANSWERED as error:
        raise StoreError(f"cannot prune the run store {engine.url}: {schema.short_reason(error)}") from error
    return samples, metrics


def _prune_samples(engine: sa.Engine, run_id: str, keep: int) -> int:
    table, removed = schema.samples, 0
    with engine.begin() as connection:
        kinds = connection.execute(sa.select(table.c.kind).where(table.c.run_id == run_id).distinct()).scalars().all()
    for kind in kinds:
        mine = (table.c.run_id == run_id) & (table.c.kind == kind)
        oldest_kept = sa.select(table.c.id).where(mine).order_by(table.c.id.desc()).offset(keep).limit(1)
        with engine.begin() as connection:
            newest_gone = connection.execute(oldest_kept).scalar()
            if newest_gone is not None:
                removed += connection.execute(table.delete().where(mine, table.c.id <= newest_gone)).rowcount
    return removed


def _prune_metrics(engine: sa.Engine, run_id: str, before: float) -> int:
    """Remove rows older than ``before`` that lie in whole buckets, a series at a time: no lock is held for long."""
    runs, table, coarse = schema.runs, schema.metrics, schema.metric_buckets
    of_run = (coarse.c.run_id == run_id) & (coarse.c.level == _LEVEL)
    with engine.begin() as connection:
        raw_from = connection.execute(sa.select(runs.c.raw_from).where(runs.c.id == run_id)).scalar()
        young = sa.select(sa.func.min(coarse.c.bucket)).where(of_run, coarse.c.time >= before)
        newest = sa.select(sa.func.max(coarse.c.bucket)).where(of_run)
        first_kept = connection.execute(young).scalar()
        first_kept = connection.execute(newest).scalar() if first_kept is None else first_kept
        if raw_from is None or first_kept is None:
            return 0
        end = max(raw_from, first_kept * _WIDTH)
        connection.execute(runs.update().where(runs.c.id == run_id).values(raw_from=end))
        latest = schema.latest_metrics.c
        names = connection.execute(sa.select(latest.name).where(latest.run_id == run_id)).scalars().all()
    removed = 0
    for name in names:
        old = (table.c.run_id == run_id) & (table.c.name == name) & (table.c.iteration < end)
        with engine.begin() as connection:
            removed += connection.execute(table.delete().where(old)).rowcount
    return removed
