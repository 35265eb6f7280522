"""Fill stores with long runs, for load tests.

python -m tests.support.store_load FOLDER_OR_URL --runs 100 --rows 100000
"""

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import psycopg
import sqlalchemy as sa

from services.store import buckets, schema
from services.store.writer import StoreWriter

NAMES = (
    "reward/mean", "reward/std", "solve_rate", "loss", "grad_norm", "entropy/mean", "ratio/mean", "ratio/clip_fraction",
    "staleness/mean", "kl", "time/iteration_s", "time/rollout_s", "time/score_s", "time/update_s", "learning_rate",
    "machine/memory_bytes", "ledger/pending", "ledger/leased", "ledger/ready", "ledger/consumed", "ledger/dropped",
    "machine/tokens_per_s", "completion/length", "advantage/std", "eval/m/1/solve_rate",
)  # fmt: skip


def fill_run(url: str, run_id: str, rows: int, *, names: Sequence[str] = NAMES, seconds: float = 10.0) -> None:
    """Add a run with about ``rows`` metric rows, an iteration every ``seconds`` up to now, through the writer for all
    but those."""
    iterations = rows // len(names)
    with StoreWriter(url, run_id, task="sudoku", objective="agrpo", total_iterations=2 * iterations) as writer:
        for worker in range(4):
            writer.worker(f"actor-{worker}", role="actor", status="alive", policy_version=iterations)
        for event in range(200):
            writer.event(("info", "info", "info", "warning", "error")[event % 5], "load", f"event {event}")
        assert writer.flush(60)
    engine = schema.open_engine(url, create=True)
    with engine.begin() as connection:
        _put_metrics(connection, run_id, iterations, names, seconds)
        rebuild(connection, run_id)
    engine.dispose()


def fill_folder(folder: Path, runs: int, rows: int) -> None:
    """Run directories ``load-000`` and so on with a store each."""
    for number in range(runs):
        path = folder / f"load-{number:03d}"
        path.mkdir(parents=True)
        fill_run(schema.sqlite_url(path / "store.sqlite"), path.name, rows)


def rebuild(connection: sa.Connection, run_id: str) -> None:
    """All buckets and newest values of a run whose ``metrics`` were put there in bulk."""
    table, latest = schema.metrics, schema.latest_metrics
    newest = sa.select(table.c.name, sa.func.max(table.c.iteration).label("iteration"))
    newest_of = newest.where(table.c.run_id == run_id).group_by(table.c.name).subquery()
    same = (table.c.name == newest_of.c.name) & (table.c.iteration == newest_of.c.iteration)
    columns = [column.name for column in latest.c]
    rows = sa.select(*(table.c[name] for name in columns)).join(newest_of, same).where(table.c.run_id == run_id)
    connection.execute(latest.delete().where(latest.c.run_id == run_id))
    connection.execute(latest.insert().from_select(columns, rows))
    iterations = sa.select(table.c.iteration).where(table.c.run_id == run_id).distinct()
    buckets.refresh(connection, run_id, None, connection.execute(iterations).scalars().all())


def _put_metrics(connection: sa.Connection, run_id: str, iterations: int, names: Sequence[str], seconds: float) -> None:
    revision, started = sa.select(schema.runs.c.revision), sa.select(schema.runs.c.created)
    last = connection.execute(revision.where(schema.runs.c.id == run_id)).scalar_one()
    now = connection.execute(started.where(schema.runs.c.id == run_id)).scalar_one()
    noise = random.Random(run_id)
    rows = (
        (run_id, name, i, math.sin(i / 300 + k) + noise.random(), now - seconds * (iterations - i), last + 1 + i)
        for k, name in enumerate(sorted(names))
        for i in range(iterations)
    )
    columns = "run_id, name, iteration, value, time, revision"
    raw = connection.connection.dbapi_connection
    if isinstance(raw, psycopg.Connection):
        raw.execute("SET LOCAL statement_timeout = 0")
        with raw.cursor().copy(f"COPY metrics ({columns}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
    else:
        raw.executemany(f"INSERT INTO metrics ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows)
    moved = schema.runs.update().where(schema.runs.c.id == run_id)
    connection.execute(moved.values(revision=last + iterations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="folder of run directories, made when it isn't there, or a store's URL")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    if "://" not in options.target:
        fill_folder(Path(options.target).absolute(), options.runs, options.rows)
        return
    for number in range(options.runs):
        fill_run(options.target, f"load-{number:03d}", options.rows)


if __name__ == "__main__":
    main()
