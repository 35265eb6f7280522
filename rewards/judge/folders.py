"""Folders for their owner alone."""

from pathlib import Path


def make_private(folder: Path) -> None:
    """Makes a folder and what is missing above it, each with mode 0700. Raises OSError."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)
