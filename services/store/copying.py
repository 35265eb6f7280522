"""Moving runs from store to store, say from their directories into one PostgreSQL."""

import sqlalchemy as sa

from rewards.errors import StoreError
from services.store import schema

_CHUNK = 2000
_BLOBS = 50  # rows at a time that carry a trajectory


def copy_runs(source: sa.Engine, target: sa.Engine) -> tuple[list[str], list[str]]:
    """Copy every run whose name the target has not yet; the ids copied, and what was left out. ``source`` is opened
    read-only.

    A run is copied whole or not at all, as it is at one moment. Ids of events, samples and actions are given anew, in
    the same order; revisions stay, so a reader's marker goes on in the copy. Raises ``StoreError``.
    """
    copied, skipped = [], []
    runs = schema.runs.c
    try:
        with source.connect() as reading:
            for run_id, identity in reading.execute(sa.select(runs.id, runs.identity).order_by(runs.id)).all():
                with target.begin() as writing:
                    there = writing.execute(sa.select(runs.identity).where(runs.id == run_id)).scalar()
                    if there is not None:
                        skipped.append(run_id if there == identity else f"{run_id} (another run of this name)")
                        continue
                    _copy_run(reading, writing, run_id)
                copied.append(run_id)
    except schema.UNANSWERED as error:
        reason = schema.short_reason(error)
        raise StoreError(f"cannot copy {source.url} to {target.url}: {reason}") from error
    return copied, skipped


def _copy_run(reading: sa.Connection, writing: sa.Connection, run_id: str) -> None:
    run = reading.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id)).mappings().one()
    writing.execute(schema.runs.insert().values(dict(run)))
    for table in schema.OF_A_RUN:
        columns = [column for column in table.c if column.name != "id"]
        query = sa.select(*columns).where(table.c.run_id == run_id).order_by(*table.primary_key.columns)
        chunk = _BLOBS if table is schema.samples else _CHUNK
        for rows in reading.execution_options(yield_per=chunk).execute(query).mappings().partitions(chunk):
            writing.execute(table.insert(), [dict(row) for row in rows])
