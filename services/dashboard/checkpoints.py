"""A run's checkpoints with what they are worth, and the commands that take one."""

import shlex
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.dashboard.models import Checkpoint, number
from services.store import schema
from services.store.reader import Reader

_MEASURES = {"eval/m/solve_rate": 1, "held_out/loss": -1}
"""What held-out problems or demonstrations say, and whether more (1) or less (-1) of it is better."""


def checkpoints_of(reader: Reader, run_id: str, folder: Path | None) -> list[Checkpoint]:
    """By rising iteration. ``folder``: the run's directory, None where it isn't known, as in a store by URL."""
    rows = reader.checkpoints(run_id)
    table = schema.metrics.c
    of_them = (table.run_id == run_id) & table.iteration.in_([row["iteration"] for row in rows])
    query = sa.select(table.iteration, table.name, table.value)
    found = reader.select(query.where(of_them, table.name.in_(list(_MEASURES)), table.value.is_not(None)))
    measured = {row["iteration"]: row for row in found}
    best = max(found, key=lambda row: (_MEASURES[row["name"]] * row["value"], -row["iteration"]), default=None)
    return [
        Checkpoint(
            **row | _place(row, folder),
            held_out=number(measured[row["iteration"]]["value"]) if row["iteration"] in measured else None,
            measure=measured[row["iteration"]]["name"] if row["iteration"] in measured else None,
            best=best is not None and best["iteration"] == row["iteration"],
            last=row is rows[-1],
        )
        for row in rows
    ]


def _place(row: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """A run's folder may have been moved since; only in it is looked what is there."""
    path, on_disk = Path(row["path"]), None
    if folder is not None:
        path = folder.resolve() / "checkpoints" / path.name
        on_disk = path.is_dir()
    run, adapter = path.parent.parent, path / "adapter"
    return {
        "path": str(path),
        "on_disk": on_disk,
        "evaluate": shlex.join(["python", "-m", "learner.evaluate", "--run", str(run), f"adapter={adapter}"]),
        "export": shlex.join(["python", "-m", "learner.export", "--adapter", str(adapter), "--out", "merged"]),
    }
