"""The run directory: where everything of one run lies, and the lock that keeps a second writer out.

runs/<id>/
  config.json     the resolved configuration        store.sqlite   run store (services.store)
  metrics.jsonl   one JSON object a report          summary.json   base against trained
  plots/  checkpoints/  adapter/ (PEFT)  samples/   run.lock       who writes here
  run.uuid        tells the run from others of its name
"""

import contextlib
import json
import re
import secrets
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from learner.runs.atomic import atomic_write_text, disk_errors, recover_replaced, remove_leftovers
from learner.runs.lock import FileLock, Held
from learner.settings.run import name_problems
from rewards.errors import ConfigError
from services.store.schema import sqlite_url


class RunDirectory:
    """Paths of one run. ``RunDirectory(path)`` only names them, for readers; ``create`` and ``open`` are for the one
    process that writes: they hold the lock until ``close`` (or the end of a ``with`` block, or of the process).
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self.id = self.path.name
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.store_path = self.path / "store.sqlite"
        self.store_url = sqlite_url(self.store_path)
        self.summary_path = self.path / "summary.json"
        self.plots_dir = self.path / "plots"
        self.checkpoints_dir = self.path / "checkpoints"
        self.adapter_dir = self.path / "adapter"
        self.samples_dir = self.path / "samples"
        self.samples_path = self.samples_dir / "completions.jsonl"
        self._uuid_path = self.path / "run.uuid"
        self._lock: FileLock | None = None

    @classmethod
    def create(
        cls, base: Path | str, name: str | None = None, *, label: str = "run", shared: bool = False
    ) -> "RunDirectory":
        """Make ``base/name``; without a name the id is time stamp, label and four random hex digits. Only its owner can
        look into it unless it is ``shared``: completions, settings and logs are in it.

        Raises ``ConfigError`` for a name that is no plain folder name or is taken, ``UnmaskError`` when the disk
        refuses.
        """
        if name is None:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}-{secrets.token_hex(2)}"
        elif problems := name_problems(name):
            raise ConfigError(problems[0])
        run = cls(Path(base) / name)
        with disk_errors(run.path):
            if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
                raise ConfigError(f"run directory {run.path} exists already: choose another name, or resume that run")
            make_folder(run.path, shared=shared)
            if not shared:
                run.path.chmod(0o700)  # an empty folder that was there
            run.samples_dir.mkdir(exist_ok=True)
            run.plots_dir.mkdir(exist_ok=True)
            run.checkpoints_dir.mkdir(exist_ok=True)
        run._acquire()
        atomic_write_text(run._uuid_path, f"{uuid.uuid4()}\n")
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Take over an existing run directory as its writer and clear what a killed writer left half-written.

        Raises ``ConfigError`` when there is no run at ``path`` or another live process writes it.
        """
        run = cls(path)
        if not run.config_path.is_file():
            raise ConfigError(f"no run at {run.path}: config.json is not there; give the folder of an earlier run")
        run._acquire()
        with disk_errors(run.path):
            recover_replaced(run.adapter_dir)
            for folder in (run.path, run.checkpoints_dir, run.samples_dir):
                folder.mkdir(exist_ok=True)
                remove_leftovers(folder)
        return run

    @property
    def identity(self) -> str:
        """Tells the run from others of its name, wherever its records lie; empty for a run of an Unmask that gave none.
        Raises ``UnmaskError`` when the disk refuses."""
        with disk_errors(self._uuid_path), contextlib.suppress(FileNotFoundError):
            return self._uuid_path.read_text().strip()
        return ""

    def write_config(self, text: str) -> None:
        """Save the resolved configuration (JSON text). Raises ``UnmaskError`` when the disk refuses."""
        atomic_write_text(self.config_path, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Save the summary as JSON. Raises ``UnmaskError`` when the disk refuses."""
        atomic_write_text(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Give the lock back. A second call does nothing."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _acquire(self) -> None:
        try:
            self._lock = FileLock(self.path / "run.lock")
        except Held as owner:
            raise ConfigError(
                f"run directory {self.path} is being written by {owner}: stop that process or choose "
                f"another run directory"
            ) from None


def make_folder(path: Path, *, shared: bool) -> None:
    """Make a folder for completions, settings and logs unless it is there: its owner's alone, or ``shared`` as the
    umask says."""
    path.mkdir(mode=0o777 if shared else 0o700, parents=True, exist_ok=True)
