"""Version 1: runs, metrics, events, workers, samples, checkpoints."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None

_row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _run_id() -> sa.Column[str]:
    return sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False)


def upgrade() -> None:
    op.create_table("schema_version", sa.Column("version", sa.Integer, primary_key=True))
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("objective", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("total_iterations", sa.Integer, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("heartbeat", sa.Double, nullable=False),
        sa.Column("ended", sa.Double),
        sa.Column("starts", sa.Integer, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("lost_rows", sa.Integer, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("summary", sa.JSON(none_as_null=True)),
    )
    op.create_table(
        "metrics",
        _run_id(),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("nonfinite", sa.Text),
        sa.Column("time", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "name", "iteration"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "events",
        sa.Column("id", _row_id, primary_key=True),
        _run_id(),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("level", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_index("events_of_run", "events", ["run_id", "id"])
    op.create_table(
        "workers",
        _run_id(),
        sa.Column("worker_id", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("policy_version", sa.Integer),
        sa.Column("restarts", sa.Integer, nullable=False),
        sa.Column("last_error", sa.Text),
        sa.Column("heartbeat", sa.Double, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "worker_id"),
    )
    op.create_table(
        "samples",
        sa.Column("id", _row_id, primary_key=True),
        _run_id(),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("group_id", sa.BigInteger, nullable=False),
        sa.Column("row", sa.Integer, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("problem_id", sa.Text, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("completion", sa.Text, nullable=False),
        sa.Column("correct", sa.Boolean, nullable=False),
        sa.Column("reward", sa.Double),
        sa.Column("rewards", sa.JSON, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("trajectory", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("run_id", "iteration", "kind", "group_id", "row"),
    )
    op.create_table(
        "checkpoints",
        _run_id(),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "iteration"),
    )
    op.execute("INSERT INTO schema_version (version) VALUES (1)")
