"""Files in a run's folder, which may be anybody's: a pipe, a device or a link may have the name of one."""

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

_SQLITE_NAMES = ("", "-wal", "-shm", "-journal")
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class NotAFile(OSError):
    """Something else has the name; ``strerror`` says so."""


@contextlib.contextmanager
def opened(path: Path, *, follow: bool = False) -> Iterator[int]:
    """A descriptor of the file, for reading.

    follow: take the file that a link leads to.

    Raises:
        NotAFile: it is no regular file.
        OSError: it can't be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe without a writer would wait for one
    if not follow:
        _require_file(path)  # a device may act on being opened; and O_NOFOLLOW's own error says nothing of links
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags)
    try:
        _require(os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def require_sqlite_files(path: Path) -> None:
    """What SQLite opens for the database at ``path`` are regular files, or not there. They are not opened here: whoever
    closes a database's file takes the locks away that this process has on it.

    Raises:
        NotAFile: one of them is not.
        OSError: one can't be looked at.
    """
    for name in _SQLITE_NAMES:
        with contextlib.suppress(FileNotFoundError):
            _require_file(path.with_name(path.name + name))


def is_damage(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is SQLite's for a file that is damaged or no database."""
    while error is not None:
        cause = getattr(error, "orig", None) or error
        code = getattr(cause, "sqlite_errorcode", None)
        if isinstance(cause, UnicodeError) or (code is not None and code & 0xFF in _DAMAGE):
            return True
        error = error.__cause__
    return False


def _require_file(path: Path) -> None:
    _require(path.lstat(), path.name)


def _require(about: os.stat_result, name: str = "it") -> None:
    if not stat.S_ISREG(about.st_mode):
        raise NotAFile(0, f"{name} is no regular file")
