"""Folders for their owner alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rewards.errors import ConfigError


def make_private(folder: Path) -> None:
    """Makes a folder and what is missing above it, each with mode 0700. Raises ConfigError when the disk refuses."""
    with writing(folder):
        for path in (*reversed(folder.parents), folder):
            if not path.is_dir():
                path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a ConfigError of what the disk refuses."""
    try:
        yield
    except OSError as error:
        reason = f"{path} can't be written ({error.strerror or error})"
        raise ConfigError(f"{reason}; make room there, or name another folder with task.judge.cache_dir") from None
