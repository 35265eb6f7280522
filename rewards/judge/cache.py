"""Scores on disk, one small file each, by a digest of all that was asked. Any number of processes may share a folder:
a file appears whole or not at all, and all would write the same."""

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path

from rewards.judge.folders import make_private, writing


class Cache:
    """Scores below ``folder``, which is made for its owner alone. Raises ConfigError when it can't be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_private(folder)
        with writing(folder):
            tempfile.TemporaryFile(dir=folder).close()

    def get(self, key: str) -> float | None:
        """The score of this digest; None when it isn't there, or its file is damaged."""
        try:
            score = json.loads(self._path(key).read_bytes())["score"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return score if isinstance(score, float) and math.isfinite(score) else None

    def put(self, key: str, score: float) -> None:
        """Keeps a score. Raises ConfigError when the disk refuses."""
        path = self._path(key)
        make_private(path.parent)
        with writing(path):
            number, name = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(number, "w") as file:
                    json.dump({"score": score}, file)
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                raise

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"
