"""Files and folders that are either there whole or not at all: written under a temporary name, fsynced, renamed.

A full disk raises ``UnmaskError`` in one sentence that names the path and the space left, one that we may not write a
sentence that names what places it.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from rewards.errors import UnmaskError

_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
"""Errors to which room is no answer."""


def atomic_write_text(path: Path | str, text: str) -> None:
    """Replace ``path`` by a file with this text (UTF-8); readers see the old text or the new, never a part.

    Raises ``UnmaskError`` when the disk refuses; the old file is then untouched.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    with disk_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """``with atomic_dir(path) as folder:`` fill ``folder``; when the block ends well it becomes ``path``.

    If the block raises, nothing of it remains and an older ``path`` is untouched. An older ``path`` is replaced by two
    renames, and a crash just between them leaves the old content as ``.NAME.old``, which ``recover_replaced`` puts
    back. So where a reader must never find nothing (the newest checkpoint), give every folder a name of its own and
    point at it with a small file.

    Raises ``UnmaskError`` when the disk refuses, safetensors' own I/O errors included.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            recover_replaced(path)
            temporary.mkdir()
            yield temporary
            _fsync_tree(temporary)
            old = _old_name(path)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
            _fsync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_replaced(path: Path) -> None:
    """Undo or finish a replacement by ``atomic_dir`` that a crash cut in two. Only for the one writer of ``path``."""
    old = _old_name(path)
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left half-written in ``folder``. Call it as the only writer of ``folder``."""
    for path in folder.glob(".*.tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error in the block into an ``UnmaskError`` naming ``path`` and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, UnmaskError):  # one of ours that is an OSError too (WaitTimeout) has said it already
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.errno in _NOT_OURS:
            remedy = "; choose a folder that can be written (run.dir; for built bases model.cache_dir or UNMASK_CACHE)"
        else:
            remedy = f" ({_free_space(path)}); make room or choose another disk, then resume"
        raise UnmaskError(f"cannot write {path}: {reason}{remedy}") from error


def _free_space(path: Path) -> str:
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError):  # not there (any more): its parent is on the same disk
            return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free there"
    return "free space unknown"


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"


def _old_name(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _fsync(path: Path | str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _fsync(os.path.join(root, name))
        _fsync(root)
