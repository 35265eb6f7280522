"""What the folder of a run that is under way tells beyond its store: that the store takes nothing (it is locked, its
disk is full) while metrics.jsonl grows, or that the run's process on this machine is no more."""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
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
    """The newest line of a metrics.jsonl that is ahead of the store, or that the run is dead."""

    iteration: int = 0
    lost_rows: int = 0
    """Of the store, as the run counts them."""
    written: float = 0.0
    dead: bool = False


def ahead(catalog: Catalog, row: Mapping[str, Any]) -> Ahead | None:
    """``row``: the run's, of the store. None for a run whose store keeps up, is over, or has no folder.

    Raises StoreError when something else than a file is in the place of its metrics.jsonl.
    """
    if row["status"] not in LIVE_STATUSES:
        return None
    try:
        folder = catalog.folder(row["id"])
        if folder is None:
            return None
        if _is_dead(folder / "run.lock", row["pid"]):
            return Ahead(dead=True)
        if time.time() - row["heartbeat"] < BEHIND_S:
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


def _is_dead(lock: Path, pid: int) -> bool:
    """Whether the process that left its name in the run's lock was one of this machine (and, in containers, of this
    one) and has ended: one that ends by itself takes its name out."""
    try:
        with opened(lock) as descriptor:
            record = json.loads(os.pread(descriptor, 1000, 0))
        here = (pid, socket.gethostname(), os.readlink("/proc/self/ns/pid"))
        if (record["pid"], record["host"], record["pids"]) != here:
            return False
    except (KeyError, OSError, TypeError, ValueError, RecursionError):  # none, or not a run's
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return True


def _newest_line(descriptor: int, size: int) -> dict[str, Any]:
    """Without one that is being written. Raises ValueError, OSError, RecursionError."""
    tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    found: dict[str, Any] = json.loads(tail.rpartition(b"\n")[0].rpartition(b"\n")[2])
    return found
