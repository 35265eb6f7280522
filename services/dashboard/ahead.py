"""A run whose store takes nothing (it is locked, its disk is full) and that goes on: what its metrics.jsonl, which lies
beside the store in the folder of the run, has and the store lacks."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from rewards.errors import StoreError
from services.store.actions import LIVE_STATUSES
from services.store.catalog import Catalog
from services.store.files import NotAFile, opened

BEHIND_S = 20.0
"""A run writes into its store every ten seconds at least."""
_TAIL_BYTES = 2**18
"""More than two lines have."""
_MOST = 2**63


class Ahead(NamedTuple):
    """The newest line of a metrics.jsonl that is ahead of the store."""

    iteration: int
    lost_rows: int
    """Of the store, as the run counts them."""
    written: float


def ahead(catalog: Catalog, row: Mapping[str, Any]) -> Ahead | None:
    """``row``: the run's, of the store. None for a run whose store keeps up, is over, or has no folder.

    Raises StoreError when something else than a file is in the place of its metrics.jsonl.
    """
    if row["status"] not in LIVE_STATUSES or time.time() - row["heartbeat"] < BEHIND_S:
        return None
    try:
        folder = catalog.folder(row["id"])
        if folder is None:
            return None
        with opened(folder / "metrics.jsonl") as descriptor:
            about = os.fstat(descriptor)
            if about.st_mtime < row["heartbeat"] + BEHIND_S:
                return None
            newest = _newest_line(descriptor, about.st_size)
        iteration, lost = int(newest["iteration"]), int(newest.get("machine/store_lost_rows") or 0)
    except NotAFile as error:
        raise StoreError(f"run {row['id']}: {error.strerror}") from None
    except (KeyError, OSError, TypeError, ValueError, OverflowError, RecursionError):  # gone meanwhile, or not a run's
        return None
    return Ahead(iteration, lost, about.st_mtime) if 0 <= iteration < _MOST and 0 <= lost < _MOST else None


def _newest_line(descriptor: int, size: int) -> dict[str, Any]:
    """Without one that is being written. Raises ValueError, OSError, RecursionError."""
    tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    found: dict[str, Any] = json.loads(tail.rpartition(b"\n")[0].rpartition(b"\n")[2])
    return found
