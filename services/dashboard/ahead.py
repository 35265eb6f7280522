"""A run whose store takes nothing (it is locked, its disk is full) and that goes on: what its metrics.jsonl, which lies
beside the store in the folder of the run, has and the store lacks."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from services.store.actions import LIVE_STATUSES
from services.store.catalog import Catalog

BEHIND_S = 20.0
"""A run writes into its store every ten seconds at least."""
_TAIL_BYTES = 2**18
"""More than two lines have."""


class Ahead(NamedTuple):
    """The newest line of a metrics.jsonl that is ahead of the store."""

    iteration: int
    lost_rows: int
    """Of the store, as the run counts them."""
    written: float


def ahead(catalog: Catalog, row: Mapping[str, Any]) -> Ahead | None:
    """``row``: the run's, of the store. None for a run whose store keeps up, is over, or has no folder."""
    if row["status"] not in LIVE_STATUSES or time.time() - row["heartbeat"] < BEHIND_S:
        return None
    try:
        folder = catalog.folder(row["id"])
        if folder is None:
            return None
        path = folder / "metrics.jsonl"
        written = path.stat().st_mtime
        if written < row["heartbeat"] + BEHIND_S:
            return None
        newest = _newest_line(path)
        return Ahead(int(newest["iteration"]), int(newest.get("machine/store_lost_rows") or 0), written)
    except (KeyError, OSError, TypeError, ValueError):  # gone meanwhile, or not a run's
        return None


def _newest_line(path: Path) -> dict[str, Any]:
    """Without one that is being written. Raises ValueError, OSError."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        whole = file.read().rpartition(b"\n")[0]
    found: dict[str, Any] = json.loads(whole.rpartition(b"\n")[2])
    return found
