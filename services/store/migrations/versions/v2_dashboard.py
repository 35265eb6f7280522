"""Version 2: what the dashboard reads: revisions, newest and down-sampled metrics, actions."""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"

_row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _run_id() -> sa.Column[str]:
    return sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False)


def upgrade() -> None:
    for table in ("runs", "metrics", "events", "workers", "samples", "checkpoints"):
        op.add_column(table, sa.Column("revision", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("raw_from", sa.Integer, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("identity", sa.Text, nullable=False, server_default=""))
    op.create_index("metrics_changed", "metrics", ["run_id", "revision"])
    op.create_index("events_changed", "events", ["run_id", "revision"])
    op.create_index("samples_changed", "samples", ["run_id", "revision"])
    op.create_index("samples_of_kind", "samples", ["run_id", "kind", "id"])
    op.create_table(
        "latest_metrics",
        _run_id(),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("nonfinite", sa.Text),
        sa.Column("time", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "name"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "metric_buckets",
        _run_id(),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("level", sa.Integer, nullable=False),
        sa.Column("bucket", sa.Integer, nullable=False),
        sa.Column("last_iteration", sa.Integer, nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("bad", sa.Integer, nullable=False),
        sa.Column("nonfinite", sa.Text),
        sa.Column("low", sa.Double),
        sa.Column("high", sa.Double),
        sa.Column("mean", sa.Double),
        sa.Column("time", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "name", "level", "bucket"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "truncations",
        _run_id(),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("after", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "revision"),
    )
    op.create_table(
        "actions",
        sa.Column("id", _row_id, primary_key=True),
        sa.Column("run_id", sa.Text),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("arguments", sa.JSON, nullable=False),
        sa.Column("requested_by", sa.Text, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("result", sa.Text),
        sa.Column("decided", sa.Double),
    )
    op.create_index("actions_of_run", "actions", ["run_id", "id"])
    op.create_index("actions_waiting", "actions", ["run_id", "status"])
    _fill()
    op.execute("UPDATE schema_version SET version = 2")


def _fill() -> None:
    op.execute(
        """
        INSERT INTO latest_metrics (run_id, name, iteration, value, nonfinite, time)
        SELECT m.run_id, m.name, m.iteration, m.value, m.nonfinite, m.time FROM metrics m
        JOIN (SELECT run_id, name, max(iteration) AS newest FROM metrics GROUP BY run_id, name) AS n
        ON m.run_id = n.run_id AND m.name = n.name AND m.iteration = n.newest
        """
    )
    columns = "run_id, name, level, bucket, last_iteration, count, bad, nonfinite, low, high, mean, time"
    finite = "CASE WHEN abs(value) < 1e-290 THEN 0.0 ELSE value END"  # PostgreSQL refuses products that underflow
    op.execute(
        f"""
        INSERT INTO metric_buckets ({columns})
        SELECT run_id, name, 1, iteration / 8, max(iteration), count(value), count(*) - count(value), max(nonfinite),
               min(value), max(value), sum(({finite}) / 8.0) * (8.0 / nullif(count(value), 0)), max(time)
        FROM metrics GROUP BY run_id, name, iteration / 8
        """
    )
    for level in (2, 3, 4):
        most = f"{8**level}.0"
        op.execute(
            f"""
            INSERT INTO metric_buckets ({columns})
            SELECT run_id, name, {level}, bucket / 8, max(last_iteration), sum(count), sum(bad), max(nonfinite),
                   min(low), max(high), sum(mean * (count / {most})) * ({most} / nullif(sum(count), 0)), max(time)
            FROM metric_buckets WHERE level = {level - 1} GROUP BY run_id, name, bucket / 8
            """
        )
