"""What one process of a node has hashed, the others of that node believe.

All processes of a node read a published adapter out of the same shared memory, where nobody can change it. The first
that asks for its digest computes it and vouches for it in a file of the node's, as long as it lives. Whoever keeps the
adapter keeps this copy where it is. A process that would have to wait long, or finds a file that others could have
written, computes the digest itself.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray

from rollout.adapters import AdapterState, digest

PATIENCE_S = 10.0
"""For another process that hashes; it may hang."""
_LOOK_S = 0.005
_SHARED_BYTES = 2**20
"""Ray may give each process a copy of its own of what is smaller."""
_KEPT_S = 86_400.0
"""For files of nodes of which nothing has been heard."""


def digest_by_node(ref: ray.ObjectRef[AdapterState]) -> Callable[[AdapterState], str]:
    """The digest of the adapter that was fetched from here."""

    def hashed(adapter: AdapterState) -> str:
        if sum(tensor.data.nbytes for tensor in adapter.values()) < _SHARED_BYTES:
            return digest(adapter)
        return vouched(ray.get_runtime_context().get_node_id(), ref.hex(), lambda: digest(adapter))

    return hashed


def private_folder() -> Path:
    """Where nodes of this machine have their files, of this user's processes."""
    return Path(tempfile.gettempdir()) / f"unmask-{os.getuid()}"


def vouched(
    node: str, thing: str, find: Callable[[], str], *, folder: Path | None = None, patience_s: float = PATIENCE_S
) -> str:
    """What ``find`` returns, in whichever process of the node was the first to ask about the thing.

    Args:
        node: names the node; a file name.
        thing: names what doesn't change while this process lives; a word.
    """
    file = _opened(folder or private_folder(), node)
    if file is None:
        return find()
    try:
        deadline = time.monotonic() + patience_s
        while not _locked(file):
            if time.monotonic() >= deadline:
                return find()
            time.sleep(_LOOK_S)
        said = os.pread(file, 1000, 0).decode().split()
        if len(said) == 4 and said[0] == thing and _started(said[2]) == said[3]:
            return said[1]
        found, me = find(), str(os.getpid())
        os.ftruncate(file, 0)
        os.pwrite(file, f"{thing} {found} {me} {_started(me)}".encode(), 0)
        return found
    finally:
        os.close(file)


def _opened(folder: Path, node: str) -> int | None:
    """The node's file; None when it isn't ours alone."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            return None
        if not (folder / node).exists():
            for old in folder.iterdir():
                if old.stat().st_mtime < time.time() - _KEPT_S:
                    old.unlink()
        return os.open(folder / node, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _started(pid: str) -> str | None:
    """When a process began, in ticks since the machine's start; None when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
